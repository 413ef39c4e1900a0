"""Weights in few bits: random ones, and what they stand for, computed one by one."""

import numpy as np

from hshare_jax.kernels.block_weights import BlockWeights


def random_nibbles(rng, out, D, dtype="float32"):
    codes = rng.integers(0, 256, (out, D // 2), np.uint8)
    scale, minimum = (rng.standard_normal((out, D // 32)).astype(np.float16) for _ in range(2))
    return BlockWeights(codes, scale, minimum, np.dtype(dtype))


def definition(blocks):
    """Each weight by itself, in float64."""
    out, D = blocks.shape
    weights = np.zeros((out, D))
    for row, column in np.ndindex(out, D):
        block, place = divmod(column, 32)
        if blocks.qvalue.dtype == np.uint8:
            byte = int(blocks.qvalue[row, 16 * block + place % 16])
            code = byte & 15 if place < 16 else byte >> 4
        else:
            code = int(blocks.qvalue[row, column])
        minimum = 0.0 if blocks.minimum is None else float(blocks.minimum[row, block])
        weights[row, column] = code * float(blocks.scale[row, block]) + minimum
    return weights
