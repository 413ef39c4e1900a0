"""Prefill attention in plain jnp: causal attention of many new tokens over the cache, and what each slot receives."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.shapes import CACHE_BLOCK


def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """The definition of `api.prefill_attention`, and the log of the sum that each query's softmax divides by.

    Scores exist for one block of slots at a time (online softmax, arXiv 1805.02867). Blocks beyond the longest row are
    never visited, so the work grows with the length and not with the capacity.

    Raises:
        ValueError: the capacity S is not a multiple of the block.
    """
    B, T, N, H = q.shape
    K, S = keys.shape[1:3]
    G = N // K
    block = min(CACHE_BLOCK, S)
    if S % block:
        raise ValueError(f"the cache holds S={S} slots; it must be a multiple of {block} (init_state rounds up)")
    grouped = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H) * H**-0.5
    positions = starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    positions = jnp.tile(positions, (1, G))[:, None, :, None]  # [B, 1, G * T, 1]

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        slots = (index * block + jnp.arange(block, dtype=jnp.int32))[None, None, None, :]
        block_keys, block_values = (_slots_of(rows, index * block, block) for rows in (keys, values))
        scores = jnp.einsum("BKQH,BKSH->BKQS", grouped, block_keys, preferred_element_type=jnp.float32)
        scores = jnp.where(sees(positions, slots, window), scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        # Under a window all slots of a query's first blocks may be masked. Their weights of 1 vanish as soon as a real
        # peak arrives, because `shrink` is then 0.
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        read = jnp.einsum(
            "BKQS,BKSH->BKQH", weights.astype(values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return out * shrink[..., None] + read, new_peak, total * shrink + weights.sum(axis=-1)

    carry = (
        jnp.zeros((B, K, G * T, H), jnp.float32),
        jnp.full((B, K, G * T), MASKED, jnp.float32),
        jnp.zeros((B, K, G * T), jnp.float32),
    )
    out, peak, total = lax.fori_loop(*_visible_blocks(starts, T, S, block, window), visit, carry)
    out = (out / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(q.dtype), (peak + jnp.log(total)).reshape(B, N, T)


def received_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    starts: Int[Array, "B"],
    is_counted: Bool[Array, "B T"],
    log_total: Float[Array, "B N T"],
    *,
    window: int | None = None,
) -> Float[Array, "B N S"]:
    """The attention probabilities that each slot receives, summed over the queries that are counted, in float32.

    As in `prefill_attention`, scores exist for one block of slots at a time.

    Args:
        q, keys, starts, window: as `api.prefill_attention` takes them.
        is_counted: the queries whose attention counts; padding is left out.
        log_total: the second result of `prefill_attention`.
    """
    (B, T, N, H), (K, S) = q.shape, keys.shape[1:3]
    block = min(CACHE_BLOCK, S)
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5  # [B, K, G, T, H]
    positions = (starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :])[:, None, None, :, None]
    log_total = log_total.reshape(B, K, N // K, T, 1)

    def add_weights(index: Array, received: Array) -> Array:
        slots = (index * block + jnp.arange(block, dtype=jnp.int32))[None, None, None, None, :]
        block_keys = _slots_of(keys, index * block, block)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, block_keys, preferred_element_type=jnp.float32)
        is_added = sees(positions, slots, window) & is_counted[:, None, None, :, None]
        weights = jnp.where(is_added, jnp.exp(scores - log_total), 0).sum(axis=3)
        return lax.dynamic_update_slice_in_dim(received, weights.reshape(B, N, block), index * block, axis=2)

    first, last = _visible_blocks(starts, T, S, block, window)
    return lax.fori_loop(first, last, add_weights, jnp.zeros((B, N, S), jnp.float32))


def sees(positions: Array, slots: Array, window: int | None) -> Array:
    """Which slots a query at each position sees: those up to the position, or only the last `window` slots."""
    is_seen = slots <= positions
    return is_seen if window is None else is_seen & (slots > positions - window)


def _slots_of(rows: Rows, first: Array, count: int) -> Float[Array, "B K count H"]:
    return row_floats(jax.tree.map(lambda array: lax.dynamic_slice_in_dim(array, first, count, axis=2), rows))


def _visible_blocks(starts: Array, T: int, S: int, block: int, window: int | None) -> tuple[int | Array, Array]:
    """The blocks [first, last) that hold all slots that some query sees."""
    first = 0 if window is None else jnp.maximum(starts.min() - window + 1, 0) // block
    return first, jnp.minimum((starts.max() + T + block - 1) // block, S // block)
