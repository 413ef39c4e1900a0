"""Prefill attention on a CPU by the library of CPU kernels, where the CPU has a matrix unit; in plain jnp elsewhere.

kernels/native/prefill_tiles.h is the code.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels import reference_prefill
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.native_attention import cache_arrays, window_number
from hshare_jax.kernels.native_library import call_library, instructions
from hshare_jax.kernels.reference_prefill import received_attention

__all__ = ["prefill_attention", "received_attention"]


def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`reference_prefill.prefill_attention`, with products in float32 for every dtype, and for every capacity."""
    if instructions() != "amx":
        return reference_prefill.prefill_attention(q, keys, values, starts, window=window)
    (B, T, N, _), (cache, scales) = q.shape, cache_arrays(keys, values)
    like = [q, jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
    out, log_total = call_library("prefill_attention", like, q, *cache, starts, *scales, window=window_number(window))
    return out, log_total
