"""The fit of the tail: what a head's unread tokens weigh and hold, learned from the probes of a prompt."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from hshare_jax.kernels.api import split_decode
from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH, LOW, MAX_FEATURE, NUM_TERMS, Part, Tail
from hshare_jax.mesh import by_parts, layout_of, layouts_alike
from hshare_jax.methods.hshare.pools import choose_in_pools
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import through_plan

WEIGHT_RIDGE = 0.03  # pulls the coefficients of the weight, on features of unit variance, towards a half each
VALUE_RIDGE = 0.1  # pulls the values of the further virtual tokens towards zero
MARGIN = 0.3  # nats beyond what the probes saw that the weight may reach
LEAST_DEVIATION = 0.03  # nats; a feature that varies less tells nothing
LEAST_VARIANCE = 1e-6  # of the queries along a direction; the value does not move along a direction of less
LEAST_RATIO = 1e-5  # of the variance along a direction to the greatest; float32 tells no smaller one from rounding


@functools.partial(jax.jit, static_argnames=("settings", "window", "looks_up", "impl", "mesh"))
def fit_tail(
    queries: Float[Array, "B P N H"],
    listed: Int[Array, "padded L B J C"],
    source: Int[Array, "B J"],
    positions: Int[Array, "B P"],
    cached: Int[Array, "B"],
    keys: Rows,
    values: Rows,
    labels: Labels | None,
    channels: Int[Array, "B K R"],
    *,
    settings: HShareSettings,
    window: int | None,
    looks_up: bool = False,
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> Tail:
    """One layer's tails, fitted on the probes of each row (jitted). A row without probes gets tails that weigh nothing.

    The fit is this package's own; docs/quality.md has what it gains. Weight and value are each fitted by weighted least
    squares, in closed form. A probe counts by the share of its attention that is not read.

    Args:
        queries: the rotated probe queries.
        listed: the lists that the probes choose in all layers, padded past the last probe.
        source: the layer's part of the plan.
        positions: where the probes stand; -1 for no probe.
        cached: tokens of each row.
        keys, values: the layer's cache.
        labels, channels: the layer's, by which lists are chosen in pools; without pools they are not used.
        settings: what else the probes read, and the tails' rank.
        window: the layer's sliding window.
        looks_up: whether the layer reads the keys of a higher layer, and so does not see a probe's own token.
        impl: which implementation computes what the probes read, as `kernels.api` describes it.
        mesh: the devices that hold the arrays in parts; None for one device.
    """
    arrays = queries, listed, source, positions, cached, keys, values, labels, channels
    fit = functools.partial(_fit_part, settings=settings, window=window, looks_up=looks_up, impl=impl)
    if mesh is None:
        return fit(*arrays)
    takes = (
        "B P N H", "P L B J C", layout_of("B J", flat_ids=True), "B P", "B",
        layouts_alike(keys, "B K S"), layouts_alike(values, "B K S"), layouts_alike(labels, "B K"), "B K R",
    )  # fmt: skip
    return Tail(*by_parts(lambda *parts: tuple(jax.tree.leaves(fit(*parts))), mesh, arrays, takes, ("B N",) * 3))


def _fit_part(
    queries: Array, listed: Array, source: Array, positions: Array, cached: Array,
    keys: Rows, values: Rows, labels: Labels | None, channels: Array,
    *, settings: HShareSettings, window: int | None, looks_up: bool, impl: str,
) -> Tail:  # fmt: skip
    """`fit_tail` on one device."""
    rank = settings.tail_rank
    lists = through_plan(listed[: queries.shape[1]], source)  # [P, B, J, C]

    def split(probe: tuple[Array, Array, Array]) -> tuple[Part, Part]:
        q, listed, length = probe
        if settings.pool > 1:
            listed = choose_in_pools(
                q, listed, keys, labels, channels, length, settings=settings, window=window, impl=impl
            )
        # A layer that looks up does not see the probe's own token, but that token is one of the recent tokens.
        recent_start = jnp.maximum(length - settings.num_recent, 0)
        reads = q, keys, values, listed, length - looks_up, recent_start
        seen = None if window is None else window - looks_up
        return split_decode(*reads, num_sinks=settings.num_sinks, window=seen, impl=impl)

    parts = lax.map(split, (jnp.swapaxes(queries, 0, 1), lists, positions.T + 1))
    read, rest = jax.tree.map(lambda array: jnp.moveaxis(array, 0, 2), parts)  # [B, N, P, ...]
    q = jnp.swapaxes(queries, 1, 2).astype(jnp.float32)  # [B, N, P, H]
    # The share of the attention that belongs to the tail.
    is_probe = (positions >= 0)[:, None, :] & (rest.count > 0) & (read.total > MASKED)
    share = jnp.where(is_probe, jax.nn.sigmoid(rest.total - read.total), 0)
    mean_key = _mean_middle_key(keys, cached, settings, window)
    # A tail that is nearly nothing or nearly everything changes little when its weight is a little wrong.
    of_weight = _sum_to_one(jnp.where(is_probe, share * (1 - share) + 1e-4, 0))
    of_value = _sum_to_one(share)
    with jax.default_matmul_precision("highest"):  # TensorFloat-32 would lose what few probes tell
        key, weight_terms = _fit_weight(q, mean_key, read, rest, of_weight, is_probe, keys.dtype)
        follow, value = _fit_value(read, rest, of_value)
        directions, shifts, moved = _fit_directions(q, read, rest, of_value, follow, value, rank, keys.dtype)
    has_tail = share.max(axis=-1) > 0
    terms = jnp.concatenate([weight_terms, follow[..., None], shifts], axis=-1)
    nothing = jnp.zeros((1, 1, NUM_TERMS + rank)).at[..., LOW : HIGH + 1].set(MASKED)
    terms = jnp.where(has_tail[..., None], terms, nothing)
    return Tail(
        keys=jnp.concatenate([key[:, :, None], directions], axis=2),
        values=jnp.concatenate([value[:, :, None], moved], axis=2).astype(values.dtype),
        terms=terms,
    )


def _mean_middle_key(keys: Rows, cached: Array, settings: HShareSettings, window: int | None) -> Float[Array, "B K H"]:
    """The mean key of each row between its sinks, or where its window begins, and its recent tokens."""
    slots = jnp.arange(keys.shape[2])[None, :]
    is_middle = (slots >= settings.num_sinks) & (slots < (cached - settings.num_recent)[:, None])
    if window is not None:
        is_middle &= slots >= (cached - window)[:, None]
    total = jnp.einsum(
        "BS,BKSH->BKH", is_middle.astype(keys.dtype), row_floats(keys), preferred_element_type=jnp.float32
    )
    return total / jnp.maximum(is_middle.sum(axis=1), 1)[:, None, None]


def _fit_weight(
    q: Array, mean_key: Array, read: Part, rest: Part, counts: Array, is_probe: Array, dtype: jnp.dtype
) -> tuple[Array, Array]:
    """The first virtual token's key [B, N, H] in this dtype, and `Tail`'s terms before `follow` [B, N, 5]."""
    N, H = q.shape[1], q.shape[3]
    mean_key = jnp.repeat(mean_key, N // mean_key.shape[1], axis=1)  # [B, N, H]
    found = rest.total - jnp.log(jnp.maximum(rest.count, 1).astype(jnp.float32))  # [B, N, P]
    of_key = jnp.einsum("BNPH,BNH->BNP", q, mean_key) * H**-0.5
    features = jnp.stack([of_key, read.total, read.mean], axis=-1)
    features, found = (jnp.where(_like(is_probe, array), array, 0) for array in (features, found))
    error = found - (features[..., 0] + features[..., 1]) / 2
    centre = jnp.einsum("BNP,BNPF->BNF", counts, features)
    error_mean = jnp.einsum("BNP,BNP->BN", counts, error)
    centred = features - centre[:, :, None]
    deviation = jnp.sqrt(jnp.einsum("BNP,BNPF->BNF", counts, centred**2))
    centred = centred / jnp.maximum(deviation, LEAST_DEVIATION)[:, :, None]
    slopes = _ridge(centred, (error - error_mean[..., None])[..., None], counts, WEIGHT_RIDGE)[..., 0]
    slopes = slopes / jnp.maximum(deviation, LEAST_DEVIATION)
    constant = error_mean - (slopes * centre).sum(axis=-1)
    low = jnp.where(is_probe, found, jnp.inf).min(axis=-1) - MARGIN
    high = jnp.where(is_probe, found, -jnp.inf).max(axis=-1) + MARGIN
    exact = (0.5 + slopes[..., :1]) * mean_key
    key = exact.astype(dtype)
    # The mean error stays zero with the key as it is stored.
    constant += jnp.einsum("BNP,BNPH,BNH->BN", counts, q, exact - key.astype(jnp.float32)) * H**-0.5
    return key, jnp.stack([constant, 0.5 + slopes[..., 1], slopes[..., 2], low, high], axis=-1)


def _fit_value(read: Part, rest: Part, counts: Array) -> tuple[Array, Array]:
    """`follow` [B, N], and the first virtual token's value [B, N, H]."""
    mean, rest_mean = (jnp.einsum("BNP,BNPH->BNH", counts, array) for array in (read.out, rest.out))
    out, rest_out = read.out - mean[:, :, None], rest.out - rest_mean[:, :, None]
    together = jnp.einsum("BNP,BNPH,BNPH->BN", counts, out, rest_out)
    alone = jnp.einsum("BNP,BNPH,BNPH->BN", counts, out, out)
    follow = jnp.clip(together / jnp.maximum(alone, 1e-9), 0, 1)
    return follow, rest_mean - follow[..., None] * mean


def _fit_directions(
    q: Array, read: Part, rest: Part, counts: Array, follow: Array, value: Array, rank: int, dtype: jnp.dtype
) -> tuple[Array, Array, Array]:
    """The keys [B, N, r, H] in this dtype, shifts [B, N, r] and values [B, N, r, H] of the further virtual tokens."""
    H = q.shape[-1]
    centre = jnp.einsum("BNP,BNPH->BNH", counts, q)
    centred = q - centre[:, :, None]
    spread = jnp.einsum("BNP,BNPH,BNPI->BNHI", counts, centred, centred)
    if rank == 0:
        nothing = jnp.zeros((*value.shape[:2], 0, H), jnp.float32)
        return nothing.astype(dtype), nothing[..., 0], nothing
    variances, axes = _of_each(jnp.linalg.eigh, spread)  # ascending
    variances, axes = variances[..., -rank:], jnp.swapaxes(axes[..., -rank:], 2, 3)  # [B, N, r, H]
    # What is left beside the greatest variance is rounding: of few probes, or of probes of which few count.
    is_found = variances > jnp.maximum(LEAST_VARIANCE, LEAST_RATIO * variances[..., -1:])
    scales = jnp.where(is_found, lax.rsqrt(jnp.where(is_found, variances, 1)), 0)
    keys = (axes * scales[..., None] * H**0.5).astype(dtype)
    directions = keys.astype(jnp.float32) * H**-0.5  # as they are stored
    shifts = jnp.einsum("BNIH,BNH->BNI", directions, centre)
    features = jnp.clip(jnp.einsum("BNPH,BNIH->BNPI", centred, directions), -MAX_FEATURE, MAX_FEATURE)
    error = rest.out - value[:, :, None] - follow[..., None, None] * read.out
    moved = _ridge(features, error, counts, VALUE_RIDGE)
    return keys, shifts, moved


def _sum_to_one(counts: Array) -> Array:
    """The counts of the probes of each head, scaled so that they add up to 1; zeros stay zeros."""
    counts = counts / jnp.maximum(counts.max(axis=-1, keepdims=True), 1e-30)
    return counts / jnp.maximum(counts.sum(axis=-1, keepdims=True), 1e-30)


def _ridge(features: Array, target: Array, counts: Array, ridge: float) -> Array:
    """The coefficients [B, N, F, M] of features [B, N, P, F] that give the target [B, N, P, M]; counts sum to 1."""
    weighted = counts[..., None] * features
    square = jnp.einsum("BNPF,BNPI->BNFI", weighted, features) + ridge * jnp.eye(features.shape[-1])[None, None]
    return _of_each(jnp.linalg.solve, square, jnp.einsum("BNPF,BNPM->BNFM", weighted, target))


def _of_each(function: Callable[..., Any], *matrices: Float[Array, "B N _ _"]) -> Any:
    """A function of linear algebra, of the matrices of each row and head.

    With a batch of matrices jaxlib's CPU code waits for threads of XLA's pool. Where a CPU counts as several devices,
    these may all wait at once, and then for ever. There each matrix is a call of its own, which waits for nothing.
    """
    if jax.default_backend() != "cpu" or jax.local_device_count() == 1:
        return function(*matrices)
    (B, N), flat = matrices[0].shape[:2], [matrix.reshape(-1, *matrix.shape[2:]) for matrix in matrices]
    found = lax.map(lambda of_head: function(*of_head), tuple(flat))
    return jax.tree.map(lambda array: array.reshape(B, N, *array.shape[1:]), found)


def _like(mask: Array, array: Array) -> Array:
    return mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim))
