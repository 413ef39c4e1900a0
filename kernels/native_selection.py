"""The choice of critical tokens on a CPU by the library of CPU kernels. kernels/native/selection.h is the code."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.native_library import change_in_place
from hshare_jax.shapes import Lists, Source


def select_by_labels(
    lists: Lists,
    layer: int,
    query: Float[Array, "B N R"],
    labels: Labels,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
) -> Lists:
    """`api.select_by_labels`, in place."""
    return _select(lists, layer, query, labels, source, is_due, first, last, num_allowed, dilate=dilate)


def select_by_keys(
    lists: Lists,
    layer: int,
    q: Float[Array, "B N H"],
    keys: Rows,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
) -> Lists:
    """`api.select_by_keys`, in place. Only the keys that compete are read, and only where a list is chosen."""
    return _select(lists, layer, q, keys, source, is_due, first, last, num_allowed, dilate=dilate)


def _select(
    lists: Lists, layer: int, query: Array, scored: Labels | Rows, source: Source, is_due: Bool[Array, "B"],
    first: Int[Array, "B"], last: Int[Array, "B"], num_allowed: Int[Array, "B"] | None, *, dilate: bool,
) -> Lists:  # fmt: skip
    if num_allowed is None:
        num_allowed = jnp.full_like(first, lists.shape[3])
    codes, *scales = jax.tree.leaves(scored)
    (lists,) = change_in_place(
        "select", lists, query, codes, source, is_due, first, last, num_allowed, *scales, changed=(0,),
        layer=np.int64(layer), by_keys=not isinstance(scored, Labels), dilate=dilate,
    )  # fmt: skip
    return lists
