"""The choice of critical tokens as Triton kernels for NVIDIA GPUs, called through jax-triton: scores and exact top-k.

The kernels are in `triton_selection_kernels`. If the cache is one chunk, one kernel does it all. Else each program
takes a chunk and keeps the C best slots, and one more kernel takes the C best of all chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.choose_tokens import weigh_tokens
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels, score_keys
from hshare_jax.kernels.tiling import Tiles, merge_tiles, power_of_two, selection_tiles
from hshare_jax.kernels.triton_library import call_kernel, load_kernel
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
    tiles: Tiles | None = None,
    merging: Tiles | None = None,
) -> Lists:
    """`api.select_by_labels` as kernels, which write the lists in place.

    Args:
        lists to dilate: as `api.select_by_labels` takes them.
        tiles: the layout of the kernels that see the cache: one block of slots is one chunk.
        merging: the layout of the kernel that sees the best of all chunks. None takes the choice of `tiling`, twice.
    """
    (_, N, R), (_, K, num_codes, S), J = query.shape, labels.codes.shape, source.shape[2]
    tiles = tiles or selection_tiles(S, power_of_two(N // J, up=True))
    given = {"query": query, "codes": labels.codes, "scales": labels.scales}
    sizes = {"N": N, "K": K, "S": S, "R": R, "CODES": num_codes, "HEADS": power_of_two(N // J, up=True)}
    plan = source, jnp.full((1,), layer, jnp.int32), _bounds(lists, S, is_due, first, last, num_allowed)
    return _select(lists, given, plan, sizes=tuple(sizes.items()), dilate=dilate, tiles=tiles, merging=merging)


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
    tiles: Tiles | None = None,
    merging: Tiles | None = None,
) -> Lists:
    """`api.select_by_keys`: the weights are taken by XLA, the choice is a kernel, which writes the lists in place.

    Args:
        lists to dilate: as `api.select_by_keys` takes them.
        tiles, merging: as for `select_by_labels`.
    """
    weights = weigh_tokens(score_keys(q, keys), first, last, num_lists=source.shape[2], dilate=dilate)
    return select_by_weights(
        lists, layer, weights, source, is_due, first, last, num_allowed, tiles=tiles, merging=merging
    )


def select_by_weights(
    lists: Lists,
    layer: int,
    weights: Float[Array, "B J S"],
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    tiles: Tiles | None = None,
    merging: Tiles | None = None,
) -> Lists:
    """The lists of all layers, after one layer's lists are chosen anew, in place, by weights that exist already.

    Args:
        weights: one weight per list and slot. Weights of slots that compete must not be NaN.
        lists, layer, source, is_due, first, last, num_allowed, tiles, merging: as for `select_by_labels`.
    """
    _, J, S = weights.shape
    sizes = {"N": J, "K": J, "S": S, "R": 0, "CODES": 0, "HEADS": 1}
    plan = source, jnp.full((1,), layer, jnp.int32), _bounds(lists, S, is_due, first, last, num_allowed)
    tiles = tiles or selection_tiles(S, 1)
    given = {"weights": weights}
    return _select(lists, given, plan, sizes=tuple(sizes.items()), dilate=False, tiles=tiles, merging=merging)


def _bounds(
    lists: Array, num_slots: int, is_due: Array, first: Array, last: Array, num_allowed: Array | None
) -> Int[Array, "4 B"]:
    C = lists.shape[3]
    allowed = jnp.full_like(last, C) if num_allowed is None else jnp.minimum(num_allowed, C)
    return jnp.stack([is_due.astype(jnp.int32), first, jnp.minimum(last, num_slots), allowed])


# Jitted, so that all layers of a step share one trace.
@functools.partial(jax.jit, static_argnames=("sizes", "dilate", "tiles", "merging"))
def _select(
    lists: Array, given: dict[str, Array | None], plan: tuple[Array, Array, Array], *,
    sizes: tuple[tuple[str, int], ...], dilate: bool, tiles: Tiles, merging: Tiles | None,
) -> Array:  # fmt: skip
    """The lists after a layer's lists are chosen in one kernel, or by chunks and then among the best of all chunks.

    Args:
        lists: of all layers.
        given: the weights, or the query and the labels.
        plan: source, layer and bounds.
        sizes: static parameters of the kernels, as pairs.
        dilate: as `api.select_by_labels` takes it.
        tiles, merging: as for `select_by_labels`.
    """
    (L, B, J, C), in_order = lists.shape, dict(sizes)
    S, N, HEADS = (in_order[name] for name in ("S", "N", "HEADS"))
    chunks, kept = -(-S // tiles.block), min(C, tiles.block)
    always = dict(zip(("source", "layer", "bounds"), plan, strict=True))
    given = dict.fromkeys(("weights", "query", "codes", "scales", "stats")) | given
    of_plan = {"L": L, "J": J}
    how = {"grid": (chunks, J, B), "tiles": tiles}
    find_stats, choose, choose_of_chunks = (
        load_kernel("selection", name) for name in ("find_stats", "choose", "choose_of_chunks")
    )
    if chunks > 1 and N > J:
        shape = jax.ShapeDtypeStruct((B, J, chunks, 2, HEADS), jnp.float32)
        of_labels = {name: given[name] for name in ("query", "codes", "scales")} | always
        static = in_order | of_plan | {"BLOCK": tiles.block}
        given["stats"] = call_kernel(find_stats, of_labels, {"stats": shape}, sizes=static, **how)[0]
    static = in_order | of_plan | {"DILATE": int(dilate), "BLOCK": tiles.block, "CHUNKS": chunks}
    if chunks == 1:
        nothing = {"best_slots": None, "best_order": None}
        static["KEPT"] = C
        return call_kernel(choose, given | always, nothing, sizes=static, changed=("lists", lists), **how)[0]
    best = jax.ShapeDtypeStruct((B, J, chunks * kept), jnp.int32)
    outputs = {"lists": None, "best_slots": best, "best_order": best}
    best_slots, best_order = call_kernel(choose, given | always, outputs, sizes=static | {"KEPT": kept}, **how)
    merging = merging or merge_tiles(chunks * kept)
    static = of_plan | {"C": C, "CANDIDATES": chunks * kept, "BLOCK": merging.block}
    static["BLOCKS"] = -(-chunks * kept // merging.block)
    found = {"best_slots": best_slots, "best_order": best_order} | always
    how = {"grid": (1, J, B), "tiles": merging}
    return call_kernel(choose_of_chunks, found, {}, sizes=static, changed=("lists", lists), **how)[0]
