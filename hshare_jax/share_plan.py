"""The share plan: one integer array that says which list every list reads, by the paper's greedy rule.

`source[b, l, j]` is the flat id (layer * J + list) of the list that list j of layer l reads in row b. A list is
computed exactly where it is its own source. Plans are data: one compiled step serves them all.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.shapes import Source


def identity_plan(batch_size: int, num_layers: int, num_lists: int) -> Source:
    """Returns the plan in which nothing is shared."""
    flat = jnp.arange(num_layers * num_lists, dtype=jnp.int32).reshape(1, num_layers, num_lists)
    return jnp.tile(flat, (batch_size, 1, 1))


def greedy_map(similarity: Float[Array, "n n"], num_shared: int) -> Int[Array, "n"]:
    """Returns which unit each unit copies, itself where it does not: `num_shared` units copy a lower one.

    HShare's Algorithm 1: take the most similar pair (i, j), j < i, the first in row-major order on ties; let i, and
    whatever copied i, copy j; take i out. It stops early when nothing is similar at all.

        # R[1,0]=.9 R[2,1]=.8 R[3,2]=.7, others lower, 2 shared:  1 copies 0 and leaves, then 3 copies 2  -> [0, 0, 2,
        # 2]
    """
    n = similarity.shape[0]
    unit = jnp.arange(n, dtype=jnp.int32)
    is_lower = unit[:, None] > unit[None, :]

    def share(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, copies = carry
        best = jnp.argmax(left).astype(jnp.int32)
        i, j = best // n, best % n
        is_similar = left[i, j] > 0
        copies = jnp.where(is_similar & (copies == i), j, copies)
        is_gone = (unit[:, None] == i) | (unit[None, :] == i)
        return jnp.where(is_gone, -1.0, left), copies

    # -1 and not 0: an argmax over what may not be chosen would otherwise map unit 0 to itself as a share.
    left = jnp.where(is_lower, similarity, -1.0)
    return lax.fori_loop(0, num_shared, share, (left, unit))[1]


def compose(layer_map: Int[Array, "L"], list_maps: Int[Array, "L J"]) -> Int[Array, "L J"]:
    """Returns one row's plan: a copying layer reads the lists that its source layer reads; its own map is unused."""
    return layer_map[:, None] * list_maps.shape[1] + list_maps[layer_map]


def find_plan(
    layer_similarity: Float[Array, "B L L"],
    list_similarity: Float[Array, "B L J J"],
    *,
    num_shared_layers: int,
    num_shared_lists: int,
) -> Source:
    """Returns each row's plan. A row without probes, all of whose similarities are 0, gets the identity."""

    def plan_row(layers: Array, lists: Array) -> Array:
        list_maps = jax.vmap(lambda similarity: greedy_map(similarity, num_shared_lists))(lists)
        return compose(greedy_map(layers, num_shared_layers), list_maps)

    return jax.vmap(plan_row)(layer_similarity, list_similarity)
