"""Appending to the cache in plain jnp: the definition of the appending operations of `api`, on every machine."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from hshare_jax.kernels.implementations import traced_platform
from hshare_jax.kernels.int8_rows import NewRows, Rows
from hshare_jax.kernels.labels import Labels, make_labels


def append_tokens(
    keys: Rows,
    values: Rows,
    k: NewRows,
    v: NewRows,
    slots: Int[Array, "B T"],
) -> tuple[Rows, Rows]:
    """The definition of `api.append_tokens`. New tokens [B, T, K, H] have the form of the cache."""
    return jax.tree.map(lambda old, new: _write(old, new, slots, axis=2), (keys, values), (k, v))


def append_labels(
    labels: Labels,
    layer: int,
    k: Float[Array, "B T K H"],
    channels: Int[Array, "B L K R"],
    slots: Int[Array, "B T"],
    *,
    bits: int | None,
) -> Labels:
    """The definition of `api.append_labels`."""
    new = make_labels(k.swapaxes(1, 2), channels[:, layer], bits)
    return jax.tree.map(lambda old, one: _write(old, jnp.moveaxis(one, 3, 1), slots, axis=3), labels, new)


def _write(
    cache: Shaped[Array, "B *dims"], new: Shaped[Array, "B T *rest"], slots: Int[Array, "B T"], *, axis: int
) -> Shaped[Array, "B *dims"]:
    """The cache, whose slots lie along `axis`, with new[b, t] at slots[b, t]. A slot outside drops the write."""
    if axis == 3 and slots.shape[1] == 1 and traced_platform() == "tpu":
        # A TPU scatters along the first axes alone. It would turn the whole array around for that, and back again.
        is_new = jnp.arange(cache.shape[3])[None, :] == slots
        return jnp.where(is_new[:, None, None, :], jnp.moveaxis(new, 1, 3).astype(cache.dtype), cache)
    rows = jnp.arange(cache.shape[0])[:, None]
    if slots.shape[1] == 1:
        # XLA:CPU turns a scatter of one update into a slice update, and copies the cache for it. Two updates, one of
        # which is dropped, stay a scatter in place.
        slots = jnp.concatenate([slots, jnp.full_like(slots, cache.shape[axis])], axis=1)
        new = jnp.concatenate([new, new], axis=1)
    index = (rows, *[slice(None)] * (axis - 1), slots)
    return cache.at[index].set(new, mode="drop", wrap_negative_indices=False)
