"""Appending to the cache on a CPU by the library of CPU kernels. kernels/native/handlers.cc is the code."""

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import NewRows, Rows
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.native_library import change_in_place


def append_tokens(
    keys: Rows,
    values: Rows,
    k: NewRows,
    v: NewRows,
    slots: Int[Array, "B T"],
) -> tuple[Rows, Rows]:
    """`api.append_tokens`, in place."""
    (old, tree), new = jax.tree.flatten((keys, values)), jax.tree.leaves((k, v))
    half = len(old) // 2
    # A call writes two arrays that are alike: numbers of keys and values, or their scales.
    pairs = [change_in_place("append_tokens", *old[i::half], *new[i::half], slots, changed=(0, 1)) for i in range(half)]
    return jax.tree.unflatten(tree, [array for pair in zip(*pairs, strict=True) for array in pair])


def append_labels(
    labels: Labels,
    layer: int,
    k: Float[Array, "B T K H"],
    channels: Int[Array, "B L K R"],
    slots: Int[Array, "B T"],
    *,
    bits: int | None,
) -> Labels:
    """`api.append_labels`, in place."""
    (codes, *scales), tree = jax.tree.flatten(labels)
    new = change_in_place(
        "append_labels", codes, k, channels, slots, *scales, changed=(0, 4) if scales else (0,),
        layer=np.int64(layer), bits=np.int64(0 if bits is None else bits),
    )  # fmt: skip
    return jax.tree.unflatten(tree, new)
