"""One dense prefill that serves all methods: it keeps the queries that any of the methods asks for."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from hshare_jax.decode_state import DecodeState, state_for
from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.mesh import make_on, put
from hshare_jax.methods.base import Method, MethodState, PromptQueries
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import read_prompt
from hshare_jax.shapes import PerRow, Tokens


@dataclasses.dataclass
class Prefilled:
    """Prompts in a cache, and the queries from which methods find their channels, plans and lists.

    One state at a time decodes on that cache, which is not copied. Decode steps write only behind a row's prompt, so
    their tokens are forgotten when the row's length is set back.
    """

    model: Model
    cache: KVCache | None  # None while a state has it
    lengths: Int[np.ndarray, "B"]  # tokens of each prompt
    queries: PromptQueries | None  # at ascending positions; missing positions of a row lie beyond all slots
    impl: str = "auto"  # which implementation finds what a method needs of the prompts
    # Results that a method can use again for its next variant (`Method.after_prefill`).
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)

    def start(self, method: Method | None) -> DecodeState:
        """A state for one of the methods that the prefill was made for; None is dense. `take_back` it before the next.

        Raises:
            ValueError: the prefill was not made for this method, or the state before has not been taken back.
        """
        if self.cache is None:
            raise ValueError("a state that was started has the prompts' cache: give it to take_back first")
        cache, config, mesh, method_state = self.cache, self.model.config, self.model.mesh, None
        if method is not None:
            queries = self._queries_for(method, cache)
            sizes = config, self.lengths.size, cache.capacity, method, cache.keys[0].dtype
            empty = method.start(config, cache) if mesh is None else make_on(mesh, _start, *sizes)
            method_state = method.after_prefill(
                empty, queries, cache, config, memo=self.memo, impl=self.impl, mesh=mesh
            )
        self.cache = None
        return DecodeState(cache, method_state, mesh)

    def take_back(self, state: DecodeState) -> None:
        """Takes the cache back from the last state that decode steps returned. The tokens that they read are forgotten.

        Raises:
            ValueError: a state that was given to decode steps, which donate it.
        """
        if state.cache.lengths.is_deleted():
            raise ValueError("state was given to decode steps, which donates it: give the state that they returned")
        self.cache = dataclasses.replace(state.cache, lengths=put(self.lengths, "B", state.mesh))

    def _queries_for(self, method: Method, cache: KVCache) -> PromptQueries:
        """The queries that a prefill for this method alone would have kept."""
        if self.queries is None or (method.wants_received and self.queries.received is None):
            raise ValueError(f"the prefill was not made for {method}: name it among its methods")
        starts = jnp.zeros_like(cache.lengths)
        asked = np.asarray(method.probe_positions(starts, cache.lengths, int(cache.lengths.max())))
        held = np.asarray(self.queries.positions)
        padded = np.pad(held, ((0, 0), (0, 1)), constant_values=cache.capacity)
        index = np.stack([np.searchsorted(of_row, wanted) for of_row, wanted in zip(padded, asked, strict=True)])
        index = np.minimum(index, held.shape[1])
        if (np.take_along_axis(padded, index, axis=1) != asked)[asked >= 0].any():
            raise ValueError(f"the prefill was not made for {method}: name it among its methods")
        # A position without a query gets zeros, as in a prefill for this method alone.
        index = jnp.asarray(np.where(asked >= 0, index, cache.capacity))[:, :, None, None]
        take = functools.partial(jnp.take_along_axis, indices=index, axis=1, mode="fill", fill_value=0)
        received = self.queries.received if method.wants_received else None
        return PromptQueries(jnp.asarray(asked), tuple(map(take, self.queries.probes)), self.queries.sizes, received)


def _start(config: ModelConfig, batch_size: int, capacity: int, method: Method, dtype: jnp.dtype) -> MethodState:
    """A method's state for an empty cache; within a program, where the cache takes no memory."""
    return method.start(config, init_cache(config, batch_size, capacity, dtype))


def prefill_for(
    model: Model,
    tokens: Tokens,
    lengths: PerRow,
    capacity: int,
    methods: Sequence[Method | None],
    *,
    progress: Callable[[int], object] | None = None,
    impl: str = "auto",
) -> Prefilled:
    """Reads prompts densely, once, so that any of `methods` may start from them.

    Args:
        model: from `load_model`.
        tokens, lengths, progress, impl: as for `prefill`.
        capacity: tokens that each row must be able to hold.
        methods: the methods that will be started; None is dense decoding.

    Raises:
        ValueError: a method that does not fit the model; before anything is computed.
    """
    config, B = model.config, tokens.shape[0]
    cache = state_for(model, B, capacity).cache
    sparse = [method for method in methods if method is not None]
    for method in sparse:  # refuses a method that does not fit the model
        if model.mesh is not None:
            method.check_mesh(config, model.mesh)
        jax.eval_shape(lambda method=method: jax.tree.leaves(method.start(config, cache)))
    positions = None
    if sparse:
        starts = jnp.zeros_like(lengths)
        asked = [np.asarray(method.probe_positions(starts, lengths, tokens.shape[1])) for method in sparse]
        rows = [np.unique(row[row >= 0]) for row in np.concatenate(asked, axis=1)]
        held = np.full((B, max(map(len, rows))), cache.capacity, np.int32)
        for b, row in enumerate(rows):
            held[b, : len(row)] = row
        positions = jnp.asarray(held)
    _, cache, queries = read_prompt(
        model.params, tokens, lengths, cache, positions,
        config=config, sums_received=any(method.wants_received for method in sparse), progress=progress,
        impl=impl, mesh=model.mesh,
    )  # fmt: skip
    return Prefilled(model, cache, np.array(lengths), queries, impl)
