"""Pools: a list that copies chooses by its own queries among the tokens of a larger list, which its source chose."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.api import select_by_keys, select_by_labels
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels, label_query
from hshare_jax.kernels.reads import take_rows
from hshare_jax.methods.hshare.critical_tokens import num_critical_in_budget
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.shapes import EMPTY


def choose_in_pools(
    q: Float[Array, "B N H"],
    pools: Int[Array, "B J W"],
    keys: Rows,
    labels: Labels | None,
    channels: Int[Array, "B K R"],
    lengths: Int[Array, "B"],
    *,
    settings: HShareSettings,
    window: int | None,
    impl: str = "auto",
) -> Int[Array, "B J C"]:
    """The best tokens of each pool, ascending, padded with EMPTY.

    The labels of a pool are gathered into one block. Then a list is chosen in it as in a cache of W slots.

    Args:
        q: one rotated query per head.
        pools: slots, ascending, padded with EMPTY.
        keys: the layer's cache, which is read only without labels.
        labels: the labels of that cache; None scores whole keys.
        channels: the layer's label channels.
        lengths: cached tokens of each row, that of the query included.
        settings: how many tokens a list takes.
        window: the layer's sliding window.
        impl: as for `kernels.api`.
    """
    (B, J, W), N, H = pools.shape, q.shape[1], q.shape[2]
    last = (pools != EMPTY).sum(axis=2)
    first = jnp.zeros_like(last)
    if window is not None:
        first = ((pools != EMPTY) & (pools < (lengths - window)[:, None, None])).sum(axis=2)
    allowed = num_critical_in_budget(lengths, settings)
    # Each list is a row of its own, because the lists of one row may have pools of different sizes.
    lists = jnp.full((1, B * J, 1, settings.num_critical), EMPTY, jnp.int32)
    source, is_due = jnp.zeros((B * J, 1, 1), jnp.int32), jnp.ones((B * J,), bool)
    rows = source, is_due, first.reshape(-1), last.reshape(-1), None if allowed is None else jnp.repeat(allowed, J)
    if labels is None:
        picked = take_rows(keys, pools).reshape(B * J, 1, W, H)
        places = select_by_keys(lists, 0, q.reshape(B * J, N // J, H), picked, *rows, impl=impl)
    else:
        query = label_query(q, channels, settings.label_bits).reshape(B * J, N // J, -1)
        places = select_by_labels(lists, 0, query, _take_labels(labels, pools), *rows, impl=impl)
    places = places.reshape(B, J, -1)
    chosen = jnp.take_along_axis(pools, jnp.maximum(places, 0), axis=2)
    return jnp.where(places == EMPTY, EMPTY, chosen)


def _take_labels(labels: Labels, slots: Int[Array, "B J W"]) -> Labels:
    """The labels of these slots, as those of a cache of one kv head and W slots for each list.

    For EMPTY they are the labels of slot 0.
    """
    B, J, W = slots.shape

    def take(array: Array) -> Array:
        K, rows = array.shape[1:3]
        flat = jnp.maximum(slots, 0).reshape(B, K, 1, -1)
        picked = jnp.take_along_axis(array, flat, axis=3, mode="promise_in_bounds").reshape(B, K, rows, J // K, W)
        return jnp.moveaxis(picked, 3, 2).reshape(B * J, 1, rows, W)

    return Labels(take(labels.codes), None if labels.scales is None else take(labels.scales))
