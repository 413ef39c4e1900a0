"""The choice of critical tokens in plain jnp: the definition of the selection operations of `api`, on every machine."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.choose_tokens import choose_tokens
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels, score_keys, score_labels
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
    """The definition of `api.select_by_labels`."""
    return _select(
        lists, layer, lambda: score_labels(query, labels), source, is_due, first, last, num_allowed, dilate=dilate
    )


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
    """The definition of `api.select_by_keys`."""
    return _select(lists, layer, lambda: score_keys(q, keys), source, is_due, first, last, num_allowed, dilate=dilate)


def _select(
    lists: Lists, layer: int, score: Callable[[], Float[Array, "B N S"]], source: Source, is_due: Bool[Array, "B"],
    first: Int[Array, "B"], last: Int[Array, "B"], num_allowed: Int[Array, "B"] | None, *, dilate: bool,
) -> Lists:  # fmt: skip
    """Chooses a layer's lists by the scores that `score` computes. A layer that chooses no list computes no score."""
    _, _, J, C = lists.shape
    is_own = source[:, layer] == layer * J + jnp.arange(J, dtype=jnp.int32)[None, :]
    is_chosen = is_own & is_due[:, None]

    def choose() -> Int[Array, "B J C"]:
        new = choose_tokens(score(), first, last, num_allowed, num_lists=J, num_critical=C, dilate=dilate)
        return jnp.where(is_chosen[:, :, None], new, lists[layer])

    return lists.at[layer].set(lax.cond(is_chosen.any(), choose, lambda: lists[layer]))
