"""The attention that a model is given: prefill over the cache, or a decode step, dense or by a sparse method."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.decode_state import DecodeState
from hshare_jax.kernels.api import dense_decode, prefill_attention, prefill_attention_received
from hshare_jax.kv_cache import KVCache, append
from hshare_jax.methods.base import PromptQueries, Step
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend, KeysValues

# Of training's attention: no smaller blocks, for they cost more than they save, and no more, for each is compiled.
_QUERY_BLOCK, _MOST_QUERY_BLOCKS = 64, 4


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
        layer: int, q: Array, k: Array | None, v: Array | None, state: tuple[KVCache, PromptQueries | None]
    ) -> tuple[Array, tuple[KVCache, PromptQueries | None]]:
        (cache, kept), index = state, config.kv_index(layer)
        cache = _append_layer(cache, index, k, v, slots)
        keys, values = cache.keys[index], cache.values[index]
        seen, window = config.sees(layer, starts)
        sees_any = seen[:, None] + jnp.arange(q.shape[1])[None, :] >= 0  # else it looks up from position 0
        is_token = slots < cache.capacity
        if kept is not None and probe_positions is not None:
            kept = _keep_queries(kept, layer, index, q, is_token, probe_positions - starts[:, None])
        if kept is not None and kept.received is not None:
            out, new = prefill_attention_received(q, keys, values, seen, is_token & sees_any, window=window)
            received = _replace_layer(kept.received, layer, kept.received[layer] + new)
            kept = dataclasses.replace(kept, received=received)
        else:
            out = prefill_attention(q, keys, values, seen, window=window)
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
    is_here = (offsets >= 0) & (offsets < q.shape[1])
    picked = jnp.take_along_axis(q, jnp.maximum(offsets, 0)[:, :, None, None], axis=1, mode="clip")
    probes = jnp.where(is_here[:, :, None, None], picked, kept.probes[layer])
    size = jnp.where(is_token[:, :, None, None], jnp.abs(q.astype(jnp.float32)), 0).sum(axis=1)
    sizes = _replace_layer(kept.sizes, index, kept.sizes[index] + size)
    return dataclasses.replace(kept, probes=_replace_layer(kept.probes, layer, probes), sizes=sizes)


def decode_attend(step: Step) -> Attend[DecodeState]:
    """Returns the attention of one decode step: dense where the state selects nothing, else as its method has it."""

    def attend(layer: int, q: Array, k: Array | None, v: Array | None, state: DecodeState) -> tuple[Array, DecodeState]:
        index = step.model.kv_index(layer)
        cache = _append_layer(state.cache, index, k, v, step.slots)
        query, keys, values, selection = q[:, 0], cache.keys[index], cache.values[index], state.method_state
        if selection is None:
            lengths, window = step.sees(layer)
            out = dense_decode(query, keys, values, lengths, window=window, impl=step.impl)
        else:
            out, selection = selection.attend(layer, query, k, keys, values, step)
        return out[:, None], DecodeState(cache, selection)

    return attend


def causal_attend(config: ModelConfig) -> Attend[dict[int, KeysValues]]:
    """Returns causal attention over whole sequences from position 0, without a cache; begin with the state {}.

    It can be differentiated: training is this. Queries are taken in a few blocks, each with the keys that one of it
    sees: of a square of scores the corner above the diagonal is never computed.
    """

    def attend(
        layer: int, q: Array, k: Array | None, v: Array | None, state: dict[int, KeysValues]
    ) -> tuple[Array, dict[int, KeysValues]]:
        shared, T = config.kv_layer(layer), q.shape[1]
        if k is not None and v is not None:
            state = {**state, shared: (k, v)}
        elif T == 1 and config.looks_up(layer):
            return jnp.zeros_like(q), state
        keys, values = state[shared]
        size = max(_QUERY_BLOCK, -(-T // _MOST_QUERY_BLOCKS))
        blocks = []
        for start in range(0, T, size):
            end = min(start + size, T)
            ends, window = config.sees(layer, jnp.arange(start, end)[:, None])
            first = 0 if window is None else max(0, start - window)
            slots = jnp.arange(first, end)[None, :]
            is_visible = slots <= ends
            if window is not None:
                is_visible &= slots > ends - window
            its = q[:, start:end], keys[:, first:end], values[:, first:end]
            blocks.append(jax.nn.dot_product_attention(*its, mask=is_visible[None, None]))
        out = jnp.concatenate(blocks, axis=1)
        return out.at[:, 0].set(0) if config.looks_up(layer) else out, state

    return attend


def _append_layer(cache: KVCache, index: int, k: Array | None, v: Array | None, slots: Array) -> KVCache:
    if k is None or v is None:  # of a layer whose own are not used
        return cache
    keys, values = append(cache.keys[index], k, slots), append(cache.values[index], v, slots)
    return dataclasses.replace(
        cache, keys=_replace_layer(cache.keys, index, keys), values=_replace_layer(cache.values, index, values)
    )


def _replace_layer(arrays: tuple, layer: int, new: object) -> tuple:
    return (*arrays[:layer], new, *arrays[layer + 1 :])
