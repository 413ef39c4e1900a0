"""The attention that a model is given: prefill over the cache, or a decode step, dense or through the plan."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.critical_tokens import find_critical_tokens
from hshare_jax.decode_state import DecodeState, SharedLists
from hshare_jax.kernels.reference import dense_decode, prefill_attention, shared_decode
from hshare_jax.kv_cache import KVCache, append
from hshare_jax.labels import take_channels
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend

Probes = tuple[Array, ...]  # L x [B, P, N, H]; empty where none are kept


def prefill_attend(
    config: ModelConfig, slots: Int[Array, "B T"], starts: Int[Array, "B"], probe_positions: Int[Array, "B P"] | None
) -> Attend[tuple[KVCache, Probes]]:
    """Returns exact causal attention over the cache; it also keeps the queries at `probe_positions`.

    Args:
        config: the model.
        slots: where each new token is written; at or beyond the capacity for padding.
        starts: the position of each row's first new token.
        probe_positions: queries to keep; None keeps none.
    """

    def attend(
        layer: int, q: Array, k: Array, v: Array, state: tuple[KVCache, Probes]
    ) -> tuple[Array, tuple[KVCache, Probes]]:
        cache, probes = state
        cache = _append_layer(cache, layer, k, v, slots)
        if probe_positions is not None:
            offsets = probe_positions - starts[:, None]
            is_here = (offsets >= 0) & (offsets < q.shape[1])
            picked = jnp.take_along_axis(q, jnp.maximum(offsets, 0)[:, :, None, None], axis=1, mode="clip")
            kept = jnp.where(is_here[:, :, None, None], picked, probes[layer])
            probes = _replace_layer(probes, layer, kept)
        out = prefill_attention(q, cache.keys[layer], cache.values[layer], starts, window=config.windows[layer])
        return out, (cache, probes)

    return attend


def decode_attend(
    config: ModelConfig, slots: Int[Array, "B 1"], lengths: Int[Array, "B"], is_due: Bool[Array, "B"] | bool
) -> Attend[DecodeState]:
    """Returns the attention of one decode step: dense where the state shares no lists, else through its plan.

    Args:
        config: the model.
        slots: where each row's new token is written; at or beyond the capacity for rows that have finished.
        lengths: tokens of each row, the new one included.
        is_due: rows that choose their lists anew on this step; False when none does, known before tracing.
    """

    def attend(layer: int, q: Array, k: Array, v: Array, state: DecodeState) -> tuple[Array, DecodeState]:
        window = config.windows[layer]
        cache = _append_layer(state.cache, layer, k, v, slots)
        query, shared = q[:, 0], state.shared
        if shared is None:
            out = dense_decode(query, cache.keys[layer], cache.values[layer], lengths, window=window)
        else:
            shared = _append_labels(shared, layer, k, slots)
            if is_due is not False:
                shared = _refresh(shared, layer, query, lengths, jnp.asarray(is_due), window)
            out = shared_decode(
                query, cache.keys[layer], cache.values[layer], shared.token_indices, shared.source[:, layer],
                lengths, shared.recent_start,
                num_sinks=shared.config.num_sinks, max_recent=shared.config.max_recent, window=window,
            )  # fmt: skip
        return out[:, None], DecodeState(cache, shared)

    return attend


def _refresh(
    shared: SharedLists, layer: int, query: Float[Array, "B N H"], lengths: Array, is_due: Array, window: int | None
) -> SharedLists:
    """Chooses the lists of this layer that are their own source, in rows that are due; the others stay as they are."""
    J = shared.source.shape[2]
    old = shared.token_indices[layer]
    is_own = shared.source[:, layer] == layer * J + jnp.arange(J, dtype=jnp.int32)[None, :]
    is_chosen = is_own & is_due[:, None]

    def choose() -> Array:
        new = find_critical_tokens(
            query, shared.labels[layer], shared.channels[:, layer], lengths,
            num_lists=J, config=shared.config, window=window,
        )  # fmt: skip
        return jnp.where(is_chosen[:, :, None], new, old)

    lists = lax.cond(is_chosen.any(), choose, lambda: old)
    return dataclasses.replace(shared, token_indices=shared.token_indices.at[layer].set(lists))


def _append_layer(cache: KVCache, layer: int, k: Array, v: Array, slots: Array) -> KVCache:
    keys, values = append(cache.keys[layer], k, slots), append(cache.values[layer], v, slots)
    return dataclasses.replace(
        cache, keys=_replace_layer(cache.keys, layer, keys), values=_replace_layer(cache.values, layer, values)
    )


def _append_labels(shared: SharedLists, layer: int, k: Float[Array, "B T K H"], slots: Array) -> SharedLists:
    new = take_channels(k.swapaxes(1, 2), shared.channels[:, layer]).swapaxes(1, 2)
    labels = append(shared.labels[layer], new, slots)
    return dataclasses.replace(shared, labels=_replace_layer(shared.labels, layer, labels))


def _replace_layer(arrays: tuple[Array, ...], layer: int, new: Array) -> tuple[Array, ...]:
    return (*arrays[:layer], new, *arrays[layer + 1 :])
