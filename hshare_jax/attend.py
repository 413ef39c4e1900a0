"""The attention that a model is given: prefill over the cache, or a decode step, dense or by a sparse method."""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.decode_state import DecodeState
from hshare_jax.kernels.api import append_tokens, dense_decode, prefill_attention, prefill_attention_received
from hshare_jax.kernels.int8_rows import as_cached, row_floats
from hshare_jax.kv_cache import KVCache, replace_layer
from hshare_jax.methods.base import PromptQueries, Step
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend


def prefill_attend(
    config: ModelConfig, slots: Int[Array, "B T"], starts: Int[Array, "B"], *, impl: str = "auto"
) -> Attend[tuple[KVCache, PromptQueries | None]]:
    """Exact causal attention over the cache. It appends the new tokens, and keeps the queries that a method asks for.

    Args:
        config: the model.
        slots: where each new token is written; at or beyond the capacity for padding.
        starts: the position of each row's first new token.
        impl: which implementation appends and attends (`kernels.api`).
    """

    def attend(
        layer: int, q: Array, k: Array | None, v: Array | None, state: tuple[KVCache, PromptQueries | None]
    ) -> tuple[Array, tuple[KVCache, PromptQueries | None]]:
        (cache, kept), index = state, config.kv_index(layer)
        cache = _append_layer(cache, index, k, v, slots, impl)
        keys, values = cache.keys[index], cache.values[index]
        seen, window = config.sees(layer, starts)
        # A query at position 0 of a layer that looks up sees nothing.
        sees_any = seen[:, None] + jnp.arange(q.shape[1])[None, :] >= 0
        is_token = slots < cache.capacity
        if kept is not None:
            kept = _keep_queries(kept, layer, index, q, is_token, kept.positions - starts[:, None])
        if kept is not None and kept.received is not None:
            out, new = prefill_attention_received(q, keys, values, seen, is_token & sees_any, window=window, impl=impl)
            received = replace_layer(kept.received, layer, kept.received[layer] + new)
            kept = dataclasses.replace(kept, received=received)
        else:
            out = prefill_attention(q, keys, values, seen, window=window, impl=impl)
        if config.looks_up(layer):
            out = jnp.where(sees_any[:, :, None, None], out, 0)
        return out, (cache, kept)

    return attend


def _keep_queries(
    kept: PromptQueries,
    layer: int,
    index: int,
    q: Float[Array, "B T N H"],
    is_token: Bool[Array, "B T"],
    offsets: Int[Array, "B P"],
) -> PromptQueries:
    """Keeps the probes among these queries, and adds the queries' sizes; offsets count from the first new token."""
    is_here = (offsets >= 0) & (offsets < q.shape[1])
    picked = jnp.take_along_axis(q, jnp.maximum(offsets, 0)[:, :, None, None], axis=1, mode="clip")
    probes = jnp.where(is_here[:, :, None, None], picked, kept.probes[layer])
    size = jnp.where(is_token[:, :, None, None], jnp.abs(q.astype(jnp.float32)), 0).sum(axis=1)
    sizes = replace_layer(kept.sizes, index, kept.sizes[index] + size)
    return dataclasses.replace(kept, probes=replace_layer(kept.probes, layer, probes), sizes=sizes)


def decode_attend(step: Step) -> Attend[DecodeState]:
    """The attention of one decode step: dense, or as the state's method has it."""

    def attend(layer: int, q: Array, k: Array | None, v: Array | None, state: DecodeState) -> tuple[Array, DecodeState]:
        index = step.config.kv_index(layer)
        cache = _append_layer(state.cache, index, k, v, step.slots, step.impl)
        query, keys, values, method_state = q[:, 0], cache.keys[index], cache.values[index], state.method_state
        if method_state is None:
            lengths, window = step.sees(layer)
            out = dense_decode(query, keys, values, lengths, window=window, impl=step.impl)
        else:
            cached_k = None if k is None else row_floats(as_cached(keys, k))
            out, method_state = method_state.attend(layer, query, cached_k, keys, values, step)
        return out[:, None], dataclasses.replace(state, cache=cache, method_state=method_state)

    return attend


def _append_layer(cache: KVCache, index: int, k: Array | None, v: Array | None, slots: Array, impl: str) -> KVCache:
    if k is None or v is None:  # the layer borrows keys and values
        return cache
    keys, values = append_tokens(cache.keys[index], cache.values[index], k, v, slots, impl=impl)
    return dataclasses.replace(
        cache, keys=replace_layer(cache.keys, index, keys), values=replace_layer(cache.values, index, values)
    )
