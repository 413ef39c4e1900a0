"""Appending to the cache on a CPU by the library of CPU kernels. kernels/native/handlers.cc is the code."""

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.native_library import change_in_place


def append_tokens(
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    slots: Int[Array, "B T"],
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """`api.append_tokens`, in place."""
    keys, values = change_in_place("append_tokens", keys, values, k, v, slots, changed=(0, 1))
    return keys, values


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
