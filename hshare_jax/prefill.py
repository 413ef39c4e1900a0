"""Prefill: prompts into the cache, exactly and in chunks; then, for sharing, channels, labels and the plan."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Int

from hshare_jax.attend import PromptQueries, prefill_attend
from hshare_jax.decode_state import DecodeState, SharedLists
from hshare_jax.kv_cache import KVCache
from hshare_jax.labels import Labels, choose_channels, make_labels
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.shapes import Logits, PerRow, Tokens, check_rows
from hshare_jax.share_plan import find_plan
from hshare_jax.similarity import measure_similarity, probe_positions

CHUNKS = (64, 512)  # widths of a prefill program: two programs serve prompts of every length


def prefill(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    progress: Callable[[int], object] | None = None,
) -> tuple[Logits, DecodeState]:
    """Returns (float32 logits after each row's last token [B, V], the state with the prompts in it).

    Runs onto an empty state or one that already holds tokens (the next turn of a chat). Attention is dense and exact.
    With shared lists the plan is found anew from this prefill's tokens, and the next decode step refreshes. The state
    is donated: use the returned one.

    Args:
        params: the decoder's parameters.
        tokens: the new tokens of each row, right-padded with any id [B, T].
        lengths: how many of them are real, at least 1 [B].
        state: from `init_state`, or a previous call.
        config: the model.
        progress: called with the tokens per row of each chunk, once it is computed; it makes the host wait. Not under
            jit.

    Raises:
        ValueError: shapes that disagree, or rows that outgrow the capacity. Where lengths are traced, such a row's
            logits are NaN instead.
    """
    cache, T = state.cache, tokens.shape[-1]
    B = cache.lengths.shape[0]
    check_rows("tokens", tokens, (B, T), jnp.integer)
    check_rows("lengths", lengths, (B,), jnp.integer)
    if not any(isinstance(array, Tracer) for array in (cache.lengths, lengths)):
        _check_lengths(lengths, cache.lengths, T, min(cache.capacity, config.max_positions))
    starts, shared = cache.lengths, state.shared
    fits = (lengths >= 1) & (starts + lengths <= min(cache.capacity, config.max_positions))
    hidden, cache, kept, positions = read_prompt(params, tokens, lengths, state, config=config, progress=progress)
    if shared is not None:
        assert kept is not None
        assert positions is not None
        shared = share_after_prefill(kept, positions, cache, shared, config=config)
    logits = _unembed(params, hidden, config=config)
    return jnp.where(fits[:, None], logits, jnp.nan), DecodeState(cache, shared)


def read_prompt(
    params: dict,
    tokens: Tokens,
    lengths: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    progress: Callable[[int], object] | None = None,
) -> tuple[Array, KVCache, PromptQueries | None, Array | None]:
    """Returns (hidden state after each row's last token [B, D], cache, kept queries, where the probes stand [B, P]).

    The last two are None for dense decoding. Arguments are those of `prefill`, which checks them; only the cache of the
    state is donated.
    """
    cache, shared, T = state.cache, state.shared, tokens.shape[1]
    kept = positions = None
    if shared is not None:
        positions, kept = _prepare_queries(shared, cache.lengths, lengths, T, config, cache.keys[0].dtype)
    hidden = jnp.zeros((tokens.shape[0], config.width), params["embedding"].dtype)
    offset = 0
    while offset < T:
        width = next((width for width in CHUNKS if width >= T - offset), CHUNKS[-1])
        chunk = jnp.pad(tokens[:, offset : offset + width], ((0, 0), (0, max(0, offset + width - T))))
        valid = jnp.clip(lengths - offset, 0, width)
        hidden, cache, kept = _prefill_chunk(params, chunk, valid, hidden, cache, kept, positions, config=config)
        offset += width
        if progress is not None:
            hidden.block_until_ready()
            progress(min(width, T - offset + width))
    return hidden, cache, kept, positions


def _prepare_queries(
    shared: SharedLists, starts: Array, lengths: Array, num_tokens: int, config: ModelConfig, dtype: jnp.dtype
) -> tuple[Array, PromptQueries]:
    """Returns where the probes stand (nowhere if the plan is known), and room for the queries that are kept."""
    # Whole chunks, so that a slightly longer prompt does not compile anew.
    P = shared.config.num_probes
    if P == "all":
        P = -(-num_tokens // CHUNKS[0]) * CHUNKS[0]
    P = P if shared.plan is None else 0
    positions, _ = probe_positions(starts, starts + lengths, shared.config, P)
    B, L, N, H = lengths.shape[0], config.num_layers, config.num_heads, config.head_dim
    return positions, PromptQueries(
        probes=tuple(jnp.zeros((B, P, N, H), dtype) for _ in range(L)),
        sizes=tuple(jnp.zeros((B, N, H), jnp.float32) for _ in range(L)),
    )


def _check_lengths(lengths: Array, starts: Array, num_tokens: int, capacity: int) -> None:
    for row, (length, start) in enumerate(zip(lengths.tolist(), starts.tolist(), strict=True)):
        if not 1 <= length <= num_tokens:
            raise ValueError(f"lengths[{row}]={length} must lie between 1 and the {num_tokens} tokens given")
        if start + length > capacity:
            raise ValueError(
                f"row {row} would hold {start + length} tokens, but capacity={capacity}; make the state larger"
            )


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("hidden", "cache", "kept"))
def _prefill_chunk(
    params: dict,
    tokens: Array,
    valid: Array,
    hidden: Array,
    cache: KVCache,
    kept: PromptQueries | None,
    positions: Array | None,
    *,
    config: ModelConfig,
) -> tuple[Array, KVCache, PromptQueries | None]:
    """Appends `valid` of these tokens to each row; hidden [B, D] becomes that of its last token, if among them."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    starts = cache.lengths
    places = starts[:, None] + index
    slots = jnp.where(index < valid[:, None], places, cache.capacity)
    attend = prefill_attend(config, slots, starts, positions)
    decoder = Decoder(config)
    out, (cache, kept) = decoder.apply({"params": params}, tokens, places, attend, (cache, kept))  # pyright: ignore[reportAssignmentType]
    last = jnp.take_along_axis(out, jnp.maximum(valid - 1, 0)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where((valid > 0)[:, None], last, hidden)
    return hidden, dataclasses.replace(cache, lengths=starts + valid), kept


@functools.partial(jax.jit, static_argnames=("config",))
def _unembed(params: dict, hidden: Array, *, config: ModelConfig) -> Array:
    return Decoder(config).apply({"params": params}, hidden, method="unembed")  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("shared",))
def share_after_prefill(
    kept: PromptQueries, positions: Array, cache: KVCache, shared: SharedLists, *, config: ModelConfig
) -> SharedLists:
    """Returns the lists' state with channels, labels and plan, those that are not given, found from the prompt."""
    channels, labels = label_prompt(kept, cache, shared, config)
    source = shared.source
    if shared.plan is None:
        similarity = measure_similarity(
            kept.probes, cache.keys, labels, channels, positions, model=config, config=shared.config
        )
        source = find_plan(similarity, model=config, config=shared.config)
    return dataclasses.replace(shared, source=source, channels=channels, labels=labels, age=jnp.zeros_like(shared.age))


def label_prompt(
    kept: PromptQueries, cache: KVCache, shared: SharedLists, config: ModelConfig
) -> tuple[Int[Array, "B L K R"], tuple[Labels | None, ...]]:
    """Returns (channels, those that are not given found from the prompt; labels of the whole cache on them)."""
    hshare, channels = shared.config, shared.channels
    if not shared.has_fixed_channels:
        R = hshare.num_label_channels(config)
        found = (choose_channels(q, k, cache.lengths, R) for q, k in zip(kept.sizes, cache.keys, strict=True))
        channels = jnp.stack(tuple(found), axis=1)
    labels = tuple(
        None if old is None else make_labels(keys, channels[:, layer], hshare.label_bits)
        for layer, (keys, old) in enumerate(zip(cache.keys, shared.labels, strict=True))
    )
    return channels, labels
