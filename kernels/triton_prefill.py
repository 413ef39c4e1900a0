"""Prefill attention as Triton kernels for NVIDIA GPUs, called through jax-triton: many queries of a head at once.

The kernels are in `triton_prefill_kernels`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Int8Rows, Rows
from hshare_jax.kernels.tiling import Tiles, prefill_tiles
from hshare_jax.kernels.triton_attention import codes_and_scales, padded
from hshare_jax.kernels.triton_library import call_kernel, load_kernel


@functools.partial(jax.jit, static_argnames=("window", "tiles"))
def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`reference_prefill.prefill_attention` as a kernel.

    Args:
        q, keys, values, starts, window: as `api.prefill_attention` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
    """
    B, T, N, _ = q.shape
    tiles = tiles or _tiles(keys, T, in_registers=isinstance(keys, Int8Rows) and keys.dtype == jnp.float32)
    key_codes, key_scales = codes_and_scales(keys)
    value_codes, value_scales = codes_and_scales(values)
    arrays = {
        "q": q.astype(keys.dtype), "keys": key_codes, "key_scales": key_scales, "values": value_codes,
        "value_scales": value_scales, "starts": starts,
    }  # fmt: skip
    outputs = {
        "out": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "log_total": jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    }
    kernel, sizes = load_kernel("prefill", "attend_prompt"), _sizes(q, keys, window, tiles)
    grid = (-(-T // tiles.queries), N, B)
    out, log_total = call_kernel(kernel, arrays, outputs, grid=grid, tiles=tiles, sizes=sizes)
    return out, log_total


@functools.partial(jax.jit, static_argnames=("window", "tiles"))
def received_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    starts: Int[Array, "B"],
    is_counted: Bool[Array, "B T"],
    log_total: Float[Array, "B N T"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B N S"]:
    """`reference_prefill.received_attention` as a kernel.

    Args:
        q, keys, starts, is_counted, log_total, window: as `reference_prefill.received_attention` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
    """
    (B, T, N, _), S = q.shape, keys.shape[2]
    # Here the keys stay in registers, and in float32 they leave as little room there as codes that become float32.
    tiles = tiles or _tiles(keys, T, in_registers=keys.dtype == jnp.float32)
    key_codes, key_scales = codes_and_scales(keys)
    arrays = {
        "q": q.astype(keys.dtype), "keys": key_codes, "key_scales": key_scales, "starts": starts,
        "is_counted": is_counted.astype(jnp.int8), "log_total": log_total,
    }  # fmt: skip
    outputs = {"out": jax.ShapeDtypeStruct((B, N, S), jnp.float32)}
    kernel, sizes = load_kernel("prefill", "receive"), _sizes(q, keys, window, tiles)
    return call_kernel(kernel, arrays, outputs, grid=(-(-S // tiles.block), N, B), tiles=tiles, sizes=sizes)[0]


def _tiles(keys: Rows, num_queries: int, *, in_registers: bool) -> Tiles:
    return prefill_tiles(padded(keys.shape[3]), keys.dtype.itemsize, num_queries, in_registers=in_registers)


def _sizes(q: Array, keys: Rows, window: int | None, tiles: Tiles) -> dict[str, int]:
    """The static parameters of both kernels."""
    (_, T, N, H), (_, K, S, _) = q.shape, keys.shape
    sizes = {"T": T, "N": N, "K": K, "S": S, "H": H, "WINDOW": window or 0}
    return sizes | {"QUERIES": tiles.queries, "WIDTH": padded(H), "BLOCK": tiles.block}
