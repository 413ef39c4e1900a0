"""The notation: one letter a dimension, used alike in names, comments, einsum strings and type annotations.

    B  batch rows             L  layers                     V  vocabulary
    T  new tokens             D  model width                F  mlp width
    S  cache slots            N  query heads                H  head size
    P  probe queries          K  key/value heads            G  query heads per key/value head, N // K
    U  lists of all layers, L * J
    J  lists per layer        C  critical tokens per list   R  label channels of a head

J is K where a list serves a key/value head and N where it serves a query head.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

EMPTY = -1  # a place in a list of slots that holds no slot
CACHE_BLOCK = 256  # slots that a prefill attends to at once; capacities are multiples of it
DATA, MODEL = "data", "model"  # the axes of a mesh of devices: rows lie along the first, heads along the second

Tokens = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
NewKeysValues = Float[Array, "B T K H"]
Logits = Float[Array, "B V"]
PerRow = Int[Array, "B"]
RowMask = Bool[Array, "B"]
Source = Int[Array, "B L J"]
Lists = Int[Array, "L B J C"]
Similarity = Float[Array, "B U U"] | tuple[Float[Array, "B L L"], Float[Array, "B L J J"]]  # units; or layers, lists


def check_rows(name: str, array: Array, shape: tuple[int, ...], kind: type) -> None:
    """Raises ValueError unless `array` has this shape and a dtype of this kind, such as jnp.integer."""
    if getattr(array, "shape", None) != shape or not jnp.issubdtype(array.dtype, kind):
        given = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else type(array).__name__
        raise ValueError(f"{name} is {given}; for this state it must be {list(shape)} of dtype {kind.__name__}")


def round_up_coarsely(count: int, least: int) -> int:
    """Rounds `count` up to one of four sizes per doubling, so that few programs serve all counts.

    The result exceeds `count` by less than a quarter or by less than `least`, whichever is more.

    Args:
        count: at least 1.
        least: the smallest step between two sizes, a power of two.
    """
    step = max(least, 1 << max(count.bit_length() - 3, 0))
    return -(-count // step) * step
