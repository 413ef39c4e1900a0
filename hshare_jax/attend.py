"""The attention that a model is given: prefill over the cache, or a decode step, dense or by a sparse method."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.decode_state import DecodeState
from hshare_jax.kernels.api import dense_decode, prefill_attention
from hshare_jax.kernels.reference import received_attention
from hshare_jax.kv_cache import KVCache, append
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend
from hshare_jax.selection import PromptQueries, Step


def prefill_attend(
    config: ModelConfig, slots: Int[Array, "B T"], starts: Int[Array, "B"], probe_positions: Int[Array, "B P"] | None
) -> Attend[tuple[KVCache, PromptQueries | None]]:
    """Returns exact causal attention over the cache; it also keeps what is asked of the queries.

    Args:
        config: the model.
        slots: where each new token is written; at or beyond the capacity for padding.
        starts: the position of each row's first new token.
        probe_positions: queries to keep; None keeps nothing.
    """

    def attend(
        layer: int, q: Array, k: Array, v: Array, state: tuple[KVCache, PromptQueries | None]
    ) -> tuple[Array, tuple[KVCache, PromptQueries | None]]:
        cache, kept = state
        cache = _append_layer(cache, layer, k, v, slots)
        if kept is not None and probe_positions is not None:
            is_token = slots < cache.capacity
            kept = _keep_queries(kept, layer, q, is_token, probe_positions - starts[:, None])
            if kept.received is not None:
                new = received_attention(q, cache.keys[layer], starts, is_token, window=config.windows[layer])
                received = _replace_layer(kept.received, layer, kept.received[layer] + new)
                kept = dataclasses.replace(kept, received=received)
        out = prefill_attention(q, cache.keys[layer], cache.values[layer], starts, window=config.windows[layer])
        return out, (cache, kept)

    return attend


def _keep_queries(
    kept: PromptQueries,
    layer: int,
    q: Float[Array, "B T N H"],
    is_token: Bool[Array, "B T"],
    offsets: Int[Array, "B P"],
) -> PromptQueries:
    is_here = (offsets >= 0) & (offsets < q.shape[1])
    picked = jnp.take_along_axis(q, jnp.maximum(offsets, 0)[:, :, None, None], axis=1, mode="clip")
    probes = jnp.where(is_here[:, :, None, None], picked, kept.probes[layer])
    size = jnp.where(is_token[:, :, None, None], jnp.abs(q.astype(jnp.float32)), 0).sum(axis=1)
    sizes = _replace_layer(kept.sizes, layer, kept.sizes[layer] + size)
    return dataclasses.replace(kept, probes=_replace_layer(kept.probes, layer, probes), sizes=sizes)


def decode_attend(step: Step) -> Attend[DecodeState]:
    """Returns the attention of one decode step: dense where the state selects nothing, else as its method has it."""

    def attend(layer: int, q: Array, k: Array, v: Array, state: DecodeState) -> tuple[Array, DecodeState]:
        cache = _append_layer(state.cache, layer, k, v, step.slots)
        query, keys, values, selection = q[:, 0], cache.keys[layer], cache.values[layer], state.selection
        if selection is None:
            window = step.model.windows[layer]
            out = dense_decode(query, keys, values, step.lengths, window=window, impl=step.impl)
        else:
            out, selection = selection.attend(layer, query, k, keys, values, step)
        return out[:, None], DecodeState(cache, selection)

    return attend


def _append_layer(cache: KVCache, layer: int, k: Array, v: Array, slots: Array) -> KVCache:
    keys, values = append(cache.keys[layer], k, slots), append(cache.values[layer], v, slots)
    return dataclasses.replace(
        cache, keys=_replace_layer(cache.keys, layer, keys), values=_replace_layer(cache.values, layer, values)
    )


def _replace_layer(arrays: tuple, layer: int, new: object) -> tuple:
    return (*arrays[:layer], new, *arrays[layer + 1 :])
