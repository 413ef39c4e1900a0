"""The notation: one letter a dimension, used alike in names, comments, einsum strings and type annotations.

    B  batch rows             L  layers                     V  vocabulary
    T  new tokens             D  model width                F  mlp width
    S  cache slots            N  query heads                H  head size
    P  probe queries          K  key/value heads            G  query heads per key/value head, N // K
    J  lists per layer        C  critical tokens per list   R  label channels of a head

J is K where a list serves a key/value head and N where it serves a query head.
"""

from jax import Array
from jaxtyping import Bool, Float, Int

Tokens = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
Queries = Float[Array, "B T N H"]
NewKeysValues = Float[Array, "B T K H"]
Logits = Float[Array, "B V"]
PerRow = Int[Array, "B"]
RowMask = Bool[Array, "B"]
Source = Int[Array, "B L J"]
Lists = Int[Array, "L B J C"]

__all__ = ["Hidden", "Lists", "Logits", "NewKeysValues", "PerRow", "Queries", "RowMask", "Source", "Tokens"]
