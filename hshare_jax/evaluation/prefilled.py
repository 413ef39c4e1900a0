"""One dense prefill that serves all methods: what each of them asks of a prompt is kept once, for all."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from hshare_jax.calibration import measure_prompt, plan_from
from hshare_jax.decode_state import DecodeState, init_state, start_method
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.base import Method, MethodState, PromptQueries
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import read_prompt
from hshare_jax.shapes import PerRow, Similarity, Tokens


@dataclasses.dataclass
class Prefilled:
    """Prompts in a cache, and the queries that methods find their channels, plans and lists from.

    One state at a time decodes on that cache, which is not copied: decode steps write behind a row's prompt alone, so
    what they leave there is forgotten with the row's length.
    """

    model: Model
    cache: KVCache | None  # None while a state has it
    lengths: Int[np.ndarray, "B"]  # the prompts' tokens
    queries: PromptQueries | None
    positions: Int[np.ndarray, "B P"]  # where the queries stand, ascending; beyond each row's last one past all slots
    # What plans are found from, by `HShareSettings.for_measuring`: measured once for all ratios. Only the last, for its
    # labels are large.
    measured: dict[HShareSettings, tuple[SharedLists, Similarity]] = dataclasses.field(default_factory=dict, repr=False)

    def start(
        self,
        method: HShareSettings | Method | None,
        *,
        plan: SharePlan | None = None,
        channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    ) -> DecodeState:
        """Returns a state for one of the methods that the prefill was made for; `take_back` it before the next.

        Args:
            method: the settings; None is dense decoding.
            plan, channels: known beforehand, as for `init_state`; None finds them from the prompts.

        Raises:
            ValueError: a method that it was not made for, or the state before has not been taken back.
        """
        if self.cache is None:
            raise ValueError("a state that was started has the prompts' cache: give it to take_back first")
        config, cache = self.model.config, self.cache
        selection = start_method(method, config, cache, plan=plan, channels=channels)
        if selection is not None:
            selection = self._prepare(selection, method, cache, is_given=plan is not None or channels is not None)
        self.cache = None
        return DecodeState(cache, selection)

    def take_back(self, state: DecodeState) -> None:
        """Takes the cache back from the last state that decode steps on it returned; what they read is forgotten.

        Raises:
            ValueError: a state that was given to steps, which donates it.
        """
        if state.cache.keys[0].is_deleted():
            raise ValueError("state was given to decode steps, which donates it: give the state that they returned")
        self.cache = dataclasses.replace(state.cache, lengths=jnp.array(self.lengths))

    def _prepare(
        self, selection: MethodState, method: HShareSettings | Method | None, cache: KVCache, *, is_given: bool
    ) -> MethodState:
        """Returns the selection as after a prefill of its own; `is_given`: its plan or channels were."""
        config = self.model.config
        if self.queries is None or (selection.wants_received and self.queries.received is None):
            raise ValueError(f"the prefill was not made for {method}: name it among its methods")
        starts = jnp.zeros_like(cache.lengths)
        positions = np.asarray(selection.probe_positions(starts, cache.lengths, int(cache.lengths.max())))
        kept = np.pad(self.positions, ((0, 0), (0, 1)), constant_values=cache.capacity)
        index = np.stack([np.searchsorted(of_row, asked) for of_row, asked in zip(kept, positions, strict=True)])
        index = np.minimum(index, self.positions.shape[1])
        if (np.take_along_axis(kept, index, axis=1) != positions)[positions >= 0].any():
            raise ValueError(f"the prefill was not made for {method}: name it among its methods")
        # A query that is not asked for is zero, as after a prefill of the method's own.
        index = jnp.asarray(np.where(positions >= 0, index, cache.capacity))[:, :, None, None]
        take = functools.partial(jnp.take_along_axis, indices=index, axis=1, mode="fill", fill_value=0)
        probes = tuple(map(take, self.queries.probes))
        received = self.queries.received if selection.wants_received else None
        queries, places = PromptQueries(probes, self.queries.sizes, received), jnp.asarray(positions)
        if isinstance(selection, SharedLists) and selection.config.shares_lists(config) and not is_given:
            return self._find_plan(selection, queries, places, cache)
        return selection.after_prefill(queries, places, cache, config)

    def _find_plan(self, lists: SharedLists, queries: PromptQueries, positions: Array, cache: KVCache) -> SharedLists:
        """Returns lists as after a prefill of their own."""
        hshare, config = lists.config, self.model.config
        key = hshare.for_measuring()
        if key not in self.measured:
            lists = dataclasses.replace(lists, config=key)
            self.measured.clear()
            self.measured[key] = measure_prompt(lists, queries, positions, cache, config=config)
        lists, similarity = self.measured[key]
        source = plan_from(similarity, model=config, config=hshare)
        lists = jax.tree.map(lambda array: jnp.array(array, copy=True), lists)  # decode steps will be given them
        return dataclasses.replace(lists, source=source, config=hshare)


def prefill_for(
    model: Model,
    tokens: Tokens,
    lengths: PerRow,
    capacity: int,
    methods: Sequence[HShareSettings | Method | None],
    *,
    progress: Callable[[int], object] | None = None,
) -> Prefilled:
    """Returns the prompts, read densely once, from which any of `methods` may start.

    Args:
        model: from `load_model`.
        tokens, lengths, progress: as for `prefill`.
        capacity: tokens that each row must be able to hold.
        methods: what will be started; None is dense decoding.
    """
    config, B = model.config, tokens.shape[0]
    cache = init_state(config, B, capacity, dtype=jnp.dtype(model.dtype)).cache
    asked, sums_received = [np.full((B, 0), -1)], False
    for method in methods:
        if (selection := start_method(method, config, cache)) is not None:
            starts = jnp.zeros_like(lengths)
            asked.append(np.asarray(selection.probe_positions(starts, lengths, tokens.shape[1])))
            sums_received |= selection.wants_received
    rows = [np.unique(row[row >= 0]) for row in np.concatenate(asked, axis=1)]
    positions = np.full((B, max(map(len, rows))), cache.capacity, np.int32)
    for b, row in enumerate(rows):
        positions[b, : len(row)] = row
    _, cache, queries = read_prompt(
        model.params, tokens, lengths, cache, jnp.asarray(positions) if len(asked) > 1 else None,
        config=config, sums_received=sums_received, progress=progress,
    )  # fmt: skip
    return Prefilled(model, cache, np.array(lengths), queries, positions)
