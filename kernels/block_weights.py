"""Weights in few bits: each weight is a code of 4 or 8 bits, and neighbours in a row share a scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_ROWS = 4096  # that are quantised at once; each needs room for its floats
BLOCK = 32  # as in the GGUF types Q4_0, Q4_1 and Q8_0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """A weight matrix [out, D] that stands for floats: weight = qvalue * scale + minimum.

    Each block of neighbours in a row has a scale. A block has 32 weights, or it is the whole row; then XLA multiplies
    the codes on a GPU and scales the sums. The arrays are JAX's or NumPy's. Fields are named as in qwix.
    """

    # [out, D] int8. Or [out, D / 2] uint8 with two codes of 4 bits a byte: byte i of a block holds place i in its low
    # bits and place 16 + i in its high bits, as GGUF stores them.
    qvalue: Any
    scale: Any  # [out, number of blocks] float16; float32 if a block is a row
    minimum: Any  # [out, number of blocks] float16; None stands for zeros
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})  # of the floats

    @property
    def shape(self) -> tuple[int, int]:
        """(out, D)."""
        out, width = self.qvalue.shape
        return out, 2 * width if self.qvalue.dtype == np.uint8 else width

    @property
    def has_channel_scales(self) -> bool:
        """Whether a block is a whole row, the channel of one output."""
        return self.scale.dtype == np.float32

    def __getitem__(self, rows: Any) -> "BlockWeights":
        """The rows of the matrix that an index of its first axis names."""
        return jax.tree.map(lambda array: array[rows], self)

    def to_floats(self) -> Any:
        """The floats [out, D] in `dtype`, computed in float32; of NumPy arrays on the host, of JAX's where they lie."""
        xp = np if isinstance(self.scale, np.ndarray) else jnp
        blocks = self.qvalue.reshape(*self.scale.shape, -1)
        if self.qvalue.dtype == np.uint8:
            blocks = xp.concatenate([blocks & 15, blocks >> 4], axis=-1)
        weights = blocks.astype(np.float32) * self.scale.astype(np.float32)[..., None]
        if self.minimum is not None:
            weights = weights + self.minimum.astype(np.float32)[..., None]
        return weights.reshape(*self.scale.shape[:-1], -1).astype(self.dtype)


def quantise_blocks(weights: np.ndarray, dtype: np.dtype) -> BlockWeights:
    """The 8-bit codes nearest to float weights [out, D], where D is a multiple of 32, as NumPy arrays.

    The largest weight of a block is 127 times its scale, as far as float16 holds that. Zeros stay zeros.

    Raises:
        ValueError: weights beyond 8 million, whose scale float16 cannot hold.
    """
    return _quantise(weights, BLOCK, np.dtype("float16"), dtype)


def quantise_channels(weights: np.ndarray, dtype: np.dtype) -> BlockWeights:
    """The same with one scale for each row, in float32."""
    return _quantise(weights, weights.shape[1], np.dtype("float32"), dtype)


def _quantise(weights: np.ndarray, size: int, scale_dtype: np.dtype, dtype: np.dtype) -> BlockWeights:
    out, D = weights.shape
    codes, scales = np.empty((out, D), np.int8), np.empty((out, D // size), scale_dtype)
    for row in range(0, out, _ROWS):
        blocks = weights[row : row + _ROWS].astype(np.float32).reshape(-1, D // size, size)
        scale = np.abs(blocks).max(axis=-1) / np.float32(127)
        if scale.max(initial=0) > np.finfo(scale_dtype).max:
            raise ValueError(f"a weight of {127 * scale.max():g} is too large for 8 bits with a {scale_dtype} scale")
        scales[row : row + _ROWS] = scale
        wide = scales[row : row + _ROWS].astype(np.float32)[..., None]
        found = np.round(blocks / np.where(wide > 0, wide, 1)).clip(-127, 127)
        codes[row : row + _ROWS] = found.reshape(-1, D)
    return BlockWeights(codes, scales, None, dtype)


def floats_of(params: Any) -> Any:
    """A parameter tree in which all weights are floats. A tree that is so already is returned itself."""

    def is_blocks(leaf: Any) -> bool:
        return isinstance(leaf, BlockWeights)

    if not any(map(is_blocks, jax.tree.leaves(params, is_leaf=is_blocks))):
        return params
    return jax.tree.map(lambda leaf: leaf.to_floats() if is_blocks(leaf) else leaf, params, is_leaf=is_blocks)


Weights = Array | BlockWeights
