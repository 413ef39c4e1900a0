"""One dense prefill that serves all methods: what each of them asks of a prompt is kept once, for all."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.config import HShareConfig
from hshare_jax.decode_state import DecodeState, init_state, start_method
from hshare_jax.kv_cache import KVCache
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import after_prefill, read_prompt, unembed
from hshare_jax.selection import Method, PromptQueries
from hshare_jax.shapes import PerRow, Tokens
from hshare_jax.share_plan import SharePlan


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts in a cache, and the queries that methods find their channels, plans and lists from."""

    model: Model
    cache: KVCache
    logits: Float[Array, "B V"]  # after each row's last token
    queries: PromptQueries | None
    positions: Int[np.ndarray, "B P"]  # where the queries stand, ascending; beyond each row's last one past all slots

    def start(
        self,
        method: HShareConfig | Method | None,
        *,
        plan: SharePlan | None = None,
        channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    ) -> DecodeState:
        """Returns a state of its own for one of the methods that the prefill was made for."""
        config, cache = self.model.config, _copy(self.cache)
        selection = start_method(method, config, cache, plan=plan, channels=channels)
        if selection is None:
            return DecodeState(cache, None)
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
        queries = PromptQueries(probes, self.queries.sizes, received)
        selection = after_prefill(selection, queries, jnp.asarray(positions), cache, config=config)
        return DecodeState(cache, selection)


def prefill_for(
    model: Model,
    tokens: Tokens,
    lengths: PerRow,
    capacity: int,
    methods: Sequence[HShareConfig | Method | None],
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
    hidden, cache, queries = read_prompt(
        model.params, tokens, lengths, cache, jnp.asarray(positions) if len(asked) > 1 else None,
        config=config, sums_received=sums_received, progress=progress,
    )  # fmt: skip
    return Prefilled(model, cache, unembed(model.params, hidden, config=config), queries, positions)


def _copy(cache: KVCache) -> KVCache:
    return jax.tree.map(lambda array: jnp.array(array, copy=True), cache)
