"""The attention of training and of perplexity: causal, over whole sequences, without a cache."""

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend, KeysValues

# Blocks of fewer than 64 queries cost more time than they save. Every block is compiled, hence at most 4 blocks.
_QUERY_BLOCK, _MOST_QUERY_BLOCKS = 64, 4


def causal_attend(config: ModelConfig) -> Attend[dict[int, KeysValues]]:
    """Causal attention over sequences that start at position 0, for the decoder to call; it can be differentiated.

    The decoder's state holds the keys and values of each KV layer, and is {} at first. Queries are taken in a few
    blocks. Each block is given only the keys up to its last query, so most of the scores above the diagonal, which no
    query may use, are never computed.
    """

    def attend(
        layer: int, q: Array, k: Array | None, v: Array | None, state: dict[int, KeysValues]
    ) -> tuple[Array, dict[int, KeysValues]]:
        kv_layer, T = config.kv_layer(layer), q.shape[1]
        if k is not None and v is not None:
            state = {**state, kv_layer: (k, v)}
        elif T == 1 and config.looks_up(layer):
            return jnp.zeros_like(q), state
        keys, values = state[kv_layer]
        size = max(_QUERY_BLOCK, -(-T // _MOST_QUERY_BLOCKS))
        blocks = []
        for start in range(0, T, size):
            end = min(start + size, T)
            last, window = config.sees(layer, jnp.arange(start, end)[:, None])
            first = 0 if window is None else max(0, start - window)
            slots = jnp.arange(first, end)[None, :]
            is_visible = slots <= last
            if window is not None:
                is_visible &= slots > last - window
            given = q[:, start:end], keys[:, first:end], values[:, first:end]
            blocks.append(jax.nn.dot_product_attention(*given, mask=is_visible[None, None]))
        out = jnp.concatenate(blocks, axis=1)
        # The query at position 0 of a layer that looks up has no visible slot.
        return out.at[:, 0].set(0) if config.looks_up(layer) else out, state

    return attend
