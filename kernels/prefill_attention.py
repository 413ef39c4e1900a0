"""Prefill attention by one fused kernel: cuDNN's flash attention on an NVIDIA GPU, through jax.nn.

Unlike all else in this folder it cannot be compiled without a GPU, and it has not run on one yet; what is tested is the
function around it, with XLA's implementation of the same call.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

MOST_SLOTS = 16_384  # of a cache: the mask, and the work, are of its capacity, not of what it holds


def can_fuse_prefill(q: Float[Array, "B T N H"], keys: Float[Array, "B K S H"], window: int | None) -> bool:
    """Returns whether cuDNN takes these: on a GPU, in half precision, H in 8s up to 128, no window, not long."""
    H = q.shape[-1]
    return (
        jax.default_backend() == "gpu"
        and jax.sharding.get_abstract_mesh().abstract_device is None  # else the program is for some other machine
        and q.dtype == keys.dtype
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and keys.shape[2] <= MOST_SLOTS
        and H % 8 == 0
        and H <= 128
        and window is None
    )


def fused_prefill(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, "B"],
    *,
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """Returns what `reference_attention.prefill_attention` does without a window, by jax.nn.dot_product_attention."""
    positions = starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
    is_visible = slots[None, None, None, :] <= positions[:, None, :, None]  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q,
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=is_visible,
        implementation=implementation,  # pyright: ignore[reportArgumentType]
    )
