"""Projections on a CPU by the library of CPU kernels. kernels/native/project.h and project_tiles.h are the code."""

import math

import jax
from jax import Array
from jaxtyping import Float

from hshare_jax.kernels import reference_projection
from hshare_jax.kernels.block_weights import BlockWeights, Weights
from hshare_jax.kernels.native_library import call_library, instructions

# With more rows the time goes into arithmetic, in which XLA is faster, except where the library has a matrix unit. But
# weights in few bits must become floats for XLA, which takes time and memory.
FEW_ROWS, FEW_ROWS_OF_BITS = 32, 128


def project(weight: Weights, x: Float[Array, "*rows D"]) -> Float[Array, "*rows out"]:
    """`api.project`. A weight is read once for all rows, in the bits that it has; sums are in float32."""
    rows = math.prod(x.shape[:-1])
    codes, *scales = jax.tree.leaves(weight)
    if isinstance(weight, BlockWeights) and weight.has_channel_scales:
        return reference_projection.project(weight, x)
    if instructions() == "amx" or rows <= (FEW_ROWS_OF_BITS if scales else FEW_ROWS):
        like = jax.ShapeDtypeStruct((rows, weight.shape[0]), x.dtype)
        out = call_library("project", like, x.reshape(rows, x.shape[-1]), codes, *scales)
        return out.reshape(*x.shape[:-1], weight.shape[0])
    if isinstance(weight, BlockWeights):
        floats = call_library("dequantise", jax.ShapeDtypeStruct(weight.shape, "float32"), codes, *scales)
        weight = floats.astype(weight.dtype)
    return reference_projection.project(weight, x)
