"""Prefill: reads prompts into the cache, exactly and in chunks; then a sparse method finds from them what it needs.

A refit does the same with the last tokens of a row that has been decoded for long.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Int

from hshare_jax.attend import prefill_attend
from hshare_jax.decode_state import DecodeState, state_for
from hshare_jax.kernels.api import project
from hshare_jax.kv_cache import KVCache
from hshare_jax.mesh import by_parts, make_on, num_parts, put, to_host
from hshare_jax.methods.base import Method, PromptQueries
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts, run_decoder, unembed
from hshare_jax.prompts import pad_prompts
from hshare_jax.shapes import Logits, PerRow, Tokens, check_rows

if TYPE_CHECKING:
    from hshare_jax.models.pretrained import Model

CHUNKS = (REFIT_TOKENS, 512)  # widths of the prefill programs; these two serve prompts of every length


def prefill(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    method: Method | None = None,
    progress: Callable[[int], object] | None = None,
    impl: str = "auto",
) -> tuple[Logits, DecodeState]:
    """Reads prompts into the state, and gives float32 logits after each row's last token [B, V].

    Attention is dense and exact. The state may be empty, or hold tokens already (the next turn of a chat). A sparse
    method then finds what it needs from the tokens of this prefill alone, however few; the next decode step refreshes.
    The state is donated, so use the returned one.

    Args:
        params: the decoder's parameters.
        tokens: the new tokens of each row, right-padded with any id [B, T].
        lengths: how many tokens of each row are real, at least 1 [B].
        state: from `init_state`, or a previous call.
        config: the model.
        method: the method that `init_state` was given.
        progress: called with the tokens per row of each chunk, once the chunk is computed. It makes the host wait, and
            cannot be used under jit.
        impl: which implementation appends, and computes attention, projections and what the method finds, as for
            `decode_step`.

    Raises:
        ValueError: shapes that disagree, a state of another method, or rows that outgrow the capacity. Where lengths
            are traced, the logits of a row that outgrows it are NaN instead.
    """
    cache, T = state.cache, getattr(tokens, "shape", (0,))[-1]
    B = cache.lengths.shape[0]
    check_rows("tokens", tokens, (B, T), jnp.integer)
    check_rows("lengths", lengths, (B,), jnp.integer)
    if (method is None) != (state.method_state is None):
        started = "dense decoding" if state.method_state is None else type(state.method_state).__name__
        raise ValueError(
            f"method={method!r} does not fit the state, which init_state made for {started}: give both the same method"
        )
    if method is not None and state.method_state is not None and not state.method_state.is_of(method):
        raise ValueError(
            f"method={method!r} differs from the method that init_state was given, in more than how a plan is searched "
            "for: give both the same method"
        )
    if not any(isinstance(array, Tracer) for array in (cache.lengths, lengths)):
        _check_lengths(lengths, cache.lengths, T, cache.capacity, config)
    fits = (lengths >= 1) & (cache.lengths + lengths <= min(cache.capacity, config.max_positions))
    hidden, state = _read(params, tokens, lengths, state, config=config, method=method, progress=progress, impl=impl)
    logits = _unembed(params, hidden, config=config, impl=impl, mesh=state.mesh)
    return jnp.where(fits[:, None], logits, jnp.nan), state


def prefill_prompts(
    model: "Model",
    prompts: Sequence[Sequence[int]],
    capacity: int,
    *,
    method: Method | None,
    progress: Callable[[int], object] | None = None,
    impl: str = "auto",
) -> tuple[Logits, DecodeState]:
    """`prefill` of a batch of token ids into a new state, on the model's devices and in its dtypes.

    Args:
        model: from `load_model`.
        prompts: token ids of any lengths.
        capacity, method: as for `init_state`.
        progress, impl: as for `prefill`.
    """
    config, mesh = model.config, model.mesh
    state = state_for(model, len(prompts), capacity, method=method)
    tokens, lengths = pad_prompts(prompts)
    tokens, lengths = put(tokens, "B T", mesh), put(lengths, "B", mesh)
    return prefill(model.params, tokens, lengths, state, config=config, method=method, progress=progress, impl=impl)


def refit(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    method: Method,
    impl: str = "auto",
) -> DecodeState:
    """The state with what a method found from the prompt found anew, from each row's last tokens, read once more.

    Refits are this package's own. A plan and tails fit the text that they were found from; as a row grows away from
    that text they age. docs/quality.md has how much, and what a refit costs. The last tokens are read densely and
    exactly, as `prefill` reads them, into their old places in the cache. `generate` calls this every
    `Method.refit_interval` steps. The state is donated, so use the returned one; the next decode step refreshes.

    Args:
        params: the decoder's parameters.
        tokens: the last tokens of each row that are in the cache, in order, right-padded [B, T]. `REFIT_TOKENS` of them
            are enough.
        lengths: how many of them are real [B]; 0 leaves a row's cache as it is, and without tails and a plan.
        state: from decode steps.
        config: the model.
        method: the method that `init_state` was given.
        impl: as for `prefill`.

    Raises:
        ValueError: shapes that disagree.
    """
    B = state.cache.lengths.shape[0]
    check_rows("tokens", tokens, (B, getattr(tokens, "shape", (0,))[-1]), jnp.integer)
    check_rows("lengths", lengths, (B,), jnp.integer)
    cache = dataclasses.replace(state.cache, lengths=state.cache.lengths - lengths)
    state = dataclasses.replace(state, cache=cache)
    return _read(params, tokens, lengths, state, config=config, method=method, impl=impl)[1]


def _read(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    method: Method | None,
    progress: Callable[[int], object] | None = None,
    impl: str,
) -> tuple[Array, DecodeState]:
    """The hidden state after each row's last token [B, D], and the state with what the method found from the tokens."""
    cache, method_state = state.cache, state.method_state
    starts, T = cache.lengths, tokens.shape[1]
    positions = None if method is None else method.probe_positions(starts, starts + lengths, T)
    hidden, cache, queries = read_prompt(
        params, tokens, lengths, cache, positions,
        sums_received=method is not None and method.wants_received, config=config, progress=progress, impl=impl,
        mesh=state.mesh,
    )  # fmt: skip
    if method is not None and queries is not None:
        method_state = method.after_prefill(method_state, queries, cache, config, impl=impl, mesh=state.mesh)
    return hidden, DecodeState(cache, method_state, state.mesh)


def read_prompt(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    cache: KVCache,
    positions: Int[Array, "B P"] | None,
    *,
    config: ModelConfig,
    sums_received: bool = False,
    progress: Callable[[int], object] | None = None,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[Array, KVCache, PromptQueries | None]:
    """Reads prompts into the cache: the hidden state after each row's last token [B, D], the cache, the kept queries.

    Args:
        params, tokens, lengths, config, progress, impl: as for `prefill`, which checks them.
        cache: donated.
        positions: of the queries that are kept; -1, or the capacity, where a row has none. None keeps nothing.
        sums_received: whether to add up the attention that each slot receives.
        mesh: the devices that hold the cache in parts; None for one device.
    """
    T, kept = tokens.shape[1], None
    if positions is not None:
        (B, P), S = positions.shape, cache.capacity if sums_received else None
        kept = make_on(mesh, _no_queries, config, B, P, S, cache.keys[0].dtype)
        # A copy of the positions, because the chunks donate them.
        kept = dataclasses.replace(kept, positions=jnp.array(positions, copy=True))
    sizes = tokens.shape[0], config.width
    hidden = make_on(mesh, jnp.zeros, sizes, jnp.dtype(params["embedding"].dtype), takes="B D")
    widths = _chunk_widths(T)
    # Concrete tokens are padded on the host, because jnp.pad would compile anew for each length of prompt.
    margin = (0, 0), (0, sum(widths) - T)
    padded = jnp.pad(tokens, margin) if isinstance(tokens, Tracer) else np.pad(to_host(tokens), margin)
    offset = 0
    for width in widths:
        chunk, num_new = padded[:, offset : offset + width], jnp.clip(lengths - offset, 0, width)
        hidden, cache, kept = _prefill_chunk(
            params, chunk, num_new, hidden, cache, kept, config=config, impl=impl, mesh=mesh
        )
        offset += width
        if progress is not None:
            hidden.block_until_ready()
            progress(min(width, T - offset + width))
    return hidden, cache, kept


def _no_queries(
    config: ModelConfig, batch_size: int, num_probes: int, capacity: int | None, dtype: jnp.dtype
) -> PromptQueries:
    """Zeros for the queries that a prefill keeps; with a capacity also for the attention that slots receive."""
    B, P, L, N, H = batch_size, num_probes, config.num_layers, config.num_heads, config.head_dim
    return PromptQueries(
        positions=jnp.zeros((B, P), jnp.int32),
        probes=tuple(jnp.zeros((B, P, N, H), dtype) for _ in range(L)),
        sizes=tuple(jnp.zeros((B, N, H), jnp.float32) for _ in config.kv_layers),
        received=None if capacity is None else tuple(jnp.zeros((B, N, capacity), jnp.float32) for _ in range(L)),
    )


def _chunk_widths(num_tokens: int) -> list[int]:
    widths = []
    while (left := num_tokens - sum(widths)) > 0:
        widths.append(next((width for width in CHUNKS if width >= left), CHUNKS[-1]))
    return widths


def _check_lengths(lengths: Array, starts: Array, num_tokens: int, capacity: int, config: ModelConfig) -> None:
    for row, (length, start) in enumerate(zip(to_host(lengths).tolist(), to_host(starts).tolist(), strict=True)):
        if not 1 <= length <= num_tokens:
            raise ValueError(f"lengths[{row}]={length} must lie between 1 and the {num_tokens} tokens given")
        if start + length > config.max_positions:
            raise ValueError(
                f"row {row} would hold {start + length} tokens, beyond the model's {config.positions_told}"
            )
        if start + length > capacity:
            raise ValueError(
                f"row {row} would hold {start + length} tokens, but capacity={capacity}; make the state larger"
            )


@functools.partial(jax.jit, static_argnames=("config", "impl", "mesh"), donate_argnames=("hidden", "cache", "kept"))
def _prefill_chunk(
    params: dict,
    tokens: Array,
    num_new: Array,
    hidden: Array,
    cache: KVCache,
    kept: PromptQueries | None,
    *,
    config: ModelConfig,
    impl: str,
    mesh: Mesh | None,
) -> tuple[Array, KVCache, PromptQueries | None]:
    """Appends the first `num_new` [B] of these tokens [B, T] to each row.

    `hidden` [B, D] becomes the hidden state after a row's last new token. A row without a new token keeps it.
    """
    args, carried = (params, tokens, num_new, hidden, cache, kept), ("B D", cache, kept)
    if mesh is None:
        return _prefill_part(*args, config=config, impl=impl)
    part = functools.partial(_prefill_part, config=config.part(num_parts(mesh)), impl=impl)
    return by_parts(part, mesh, args, (parameter_layouts(params, mesh), "B T", "B", *carried), carried)


def _prefill_part(
    params: dict,
    tokens: Array,
    num_new: Array,
    hidden: Array,
    cache: KVCache,
    kept: PromptQueries | None,
    *,
    config: ModelConfig,
    impl: str,
) -> tuple[Array, KVCache, PromptQueries | None]:
    """`_prefill_chunk` on one device."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    starts = cache.lengths
    positions = starts[:, None] + index
    slots = jnp.where(index < num_new[:, None], positions, cache.capacity)
    attend = prefill_attend(config, slots, starts, impl=impl)
    how = {"config": config, "project": functools.partial(project, impl=impl)}
    out, (cache, kept) = run_decoder(params, tokens, positions, attend, (cache, kept), **how)
    last = jnp.take_along_axis(out, jnp.maximum(num_new - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where((num_new > 0)[:, None], last, hidden)
    return hidden, dataclasses.replace(cache, lengths=starts + num_new), kept


@functools.partial(jax.jit, static_argnames=("config", "impl", "mesh"))
def _unembed(params: dict, hidden: Array, *, config: ModelConfig, impl: str, mesh: Mesh | None) -> Array:
    how = {"config": config, "project": functools.partial(project, impl=impl)}
    if mesh is None:
        return unembed(params, hidden, **how)
    part = functools.partial(unembed, **how | {"config": config.part(num_parts(mesh))})
    return by_parts(part, mesh, (params, hidden), (parameter_layouts(params, mesh), "B D"), "B V")
