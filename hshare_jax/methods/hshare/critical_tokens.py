"""Critical tokens: from scores to the list of cached tokens that a head reads."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt

from hshare_jax.kernels.reference_attention import EMPTY, MASKED
from hshare_jax.methods.hshare.settings import HShareSettings

WORD = 32  # slots whose choice is packed into one word
GROUP = 16  # words that are counted together
LANES = 128  # slots whose counts are kept apart, so that counting needs no sum across a vector


@functools.partial(jax.jit, static_argnames=("num_lists", "config"))  # traced once for the layers of a step
def find_critical_tokens(
    scores: Float[Array, "B N S"],
    lengths: Int[Array, "B"],
    *,
    num_lists: int,
    config: HShareSettings,
    window: int | Int[Array, ""] | None = None,
) -> Int[Array, "B J C"]:
    """Returns the lists that these scores choose: the best between the sinks and the recent tokens, ascending.

        # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7  -> only 1 to 5 compete

    Args:
        scores: of one query per head, at position length - 1 of its row, with every slot.
        lengths: tokens of each row up to and including the query's own.
        num_lists: J, either K (a list serves a group) or N.
        window: the layer's sliding window; tokens before it do not compete.
    """
    is_candidate = find_candidates(lengths, scores.shape[-1], config, window)
    weights = weigh_tokens(scores, lengths, num_lists=num_lists, config=config, window=window)
    return select_tokens(weights, is_candidate, config.num_critical, num_critical_in_budget(lengths, config))


def weigh_tokens(
    scores: Float[Array, "B N S"],
    lengths: Int[Array, "B"],
    *,
    num_lists: int,
    config: HShareSettings,
    window: int | Int[Array, ""] | None = None,
) -> Float[Array, "B J S"]:
    """Returns what the tokens of each list are chosen by; arguments are those of `find_critical_tokens`."""
    is_candidate = find_candidates(lengths, scores.shape[-1], config, window)
    pooled = pool_scores(scores, is_candidate, num_lists)
    return dilate(jnp.where(is_candidate[:, None, :], pooled, -jnp.inf)) if config.dilates else pooled


def candidate_range(
    lengths: Int[Array, "B"], config: HShareSettings, window: int | Int[Array, ""] | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns (first, last): the slots [first, last) compete, those between sinks and recent tokens in the window."""
    first = jnp.full_like(lengths, config.num_sinks)
    if window is not None:
        first = jnp.maximum(first, lengths - window)
    return first, lengths - config.num_recent


def find_candidates(
    lengths: Int[Array, "B"], num_slots: int, config: HShareSettings, window: int | Int[Array, ""] | None
) -> Bool[Array, "B S"]:
    """Returns which slots compete for a list."""
    slots, (first, last) = jnp.arange(num_slots)[None, :], candidate_range(lengths, config, window)
    return (slots >= first[:, None]) & (slots < last[:, None])


def num_critical_in_budget(lengths: Int[Array, "B"], config: HShareSettings) -> Int[Array, "B"] | None:
    """Returns how many critical tokens each row may list under `budget_ratio`; None where there is no such bound."""
    if config.budget_ratio is None:
        return None
    allowed = lengths * config.budget_ratio.numerator // config.budget_ratio.denominator
    return jnp.clip(allowed - config.num_sinks - config.num_recent, 0, config.num_critical)


def pool_scores(
    scores: Float[Array, "B N S"], is_candidate: Bool[Array, "B S"], num_lists: int
) -> Float[Array, "B J S"]:
    """Returns one score per list: heads of a group add up softmaxed scores, so that none outvotes by its norm."""
    B, N, S = scores.shape
    if num_lists == N:
        return scores
    weights = softmax_over(is_candidate, scores)
    return weights.reshape(B, num_lists, N // num_lists, S).sum(axis=2)


def softmax_over(mask: Bool[Array, "B S"], scores: Float[Array, "B N S"]) -> Float[Array, "B N S"]:
    """Returns the softmax over the slots of the mask; the others hold zero where the mask holds any."""
    return jax.nn.softmax(jnp.where(mask[:, None, :], scores, MASKED), axis=-1)


def dilate(scores: Float[Array, "B J S"]) -> Float[Array, "B J S"]:
    """Returns scores in which each token is worth at least what the one before it is.

    A later step of the block that goes on copying a passage wants the token after the one that this step wants.
    """
    before = jnp.pad(scores[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)
    return jnp.maximum(scores, before)


def select_tokens(
    scores: Float[Array, "B J S"],
    is_candidate: Bool[Array, "B S"],
    num_critical: int,
    num_allowed: Int[Array, "B"] | None = None,
) -> Int[Array, "B J C"]:
    """Returns the slots of the `num_critical` highest scores, ascending; ties go to the lower slot.

    With fewer candidates all of them are listed and the rest is EMPTY.

    Args:
        scores: anything but NaN where is_candidate.
        is_candidate: the slots that may be listed.
        num_critical: C.
        num_allowed: at most so many in each row, of the C places; None allows all.
    """
    B, J, S = scores.shape
    scores, is_candidate = (_pad_to_lanes(x, fill) for x, fill in ((scores, 0.0), (is_candidate, False)))
    order = _once(jnp.where(is_candidate[:, None, :], _sortable(scores), jnp.iinfo(jnp.int32).min))
    count = jnp.full((B,), num_critical) if num_allowed is None else num_allowed
    count = jnp.minimum(count, is_candidate.sum(axis=-1))[:, None]
    threshold = _kth_largest(order, count)[..., None]
    is_above, is_tied = _pack(order > threshold), _pack((order == threshold) & is_candidate[:, None, :])
    # Of the tied ones as many as are missing, the lowest first.
    missing = count - lax.population_count(is_above).sum(axis=-1, dtype=jnp.int32)
    num_tied = lax.population_count(is_tied).astype(jnp.int32)
    room = jnp.clip(missing[..., None] - (jnp.cumsum(num_tied, axis=-1) - num_tied), 0, WORD)
    is_chosen = is_above | _lowest_bits(is_tied, room)
    return _list_bits(is_chosen, num_critical)


# A sort of all scores would take most of a refresh. Instead: the k-th largest by bisection, the choice as one bit per
# slot, and the list from counts of bits (on CPU a fifth of lax.top_k's time: docs/performance.md).


def _pad_to_lanes(x: Array, fill: float | bool) -> Array:
    rest = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)], constant_values=fill) if rest else x


def _sortable(scores: Float[Array, "B J S"]) -> Int[Array, "B J S"]:
    """Returns int32 in the order of the float32 scores; the zeros are one value. int32's least stays free."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)  # sign and magnitude to two's complement


def _once(x: Array) -> Array:
    """Returns x, computed once: XLA computes it anew in every loop that reads it, and may round it otherwise there.

    A threshold found in one loop would then be missed in the next, and the list be short. XLA takes a barrier away
    before it fuses loops; what a loop carries it does not look behind.
    """
    return lax.fori_loop(0, 2, lambda _, kept: lax.optimization_barrier(kept), x)


def _kth_largest(order: Int[Array, "B J S"], k: Int[Array, "B 1"]) -> Int[Array, "B J"]:
    """Returns the k-th largest; for k = 0 a value above all. Found by bits: first the high 16, then the low 16."""
    low = jnp.iinfo(jnp.int16).min

    def bisect(values: Array, k: Array) -> Array:
        def raise_bit(index: Array, least: Array) -> Array:
            higher = least + (1 << (15 - index))
            # Counts in 16 bits as well, in parts too short to overflow.
            is_reached = (values >= higher[..., None].astype(jnp.int16)).astype(jnp.int16)
            parts = is_reached.reshape(*is_reached.shape[:-1], -1, LANES).sum(axis=-2, dtype=jnp.int16)
            return jnp.where(parts.astype(jnp.int32).sum(axis=-1) >= k, higher, least)

        return lax.fori_loop(0, 16, raise_bit, jnp.full(values.shape[:-1], low, jnp.int32))

    high = (order >> 16).astype(jnp.int16)
    best = bisect(high, k)
    is_best = high == best[..., None].astype(jnp.int16)
    num_above = (high > best[..., None].astype(jnp.int16)).sum(axis=-1, dtype=jnp.int32)
    rest = jnp.where(is_best, ((order & 0xFFFF) + low).astype(jnp.int16), jnp.int16(low))
    return best << 16 | (bisect(rest, k - num_above) - low)


def _pack(mask: Bool[Array, "B J S"]) -> UInt[Array, "B J words"]:
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    grouped = mask.reshape(*mask.shape[:-1], -1, WORD)
    return jnp.where(grouped, bits, jnp.uint32(0)).sum(axis=-1, dtype=jnp.uint32)


def _nth_bit(word: UInt[Array, "..."], n: Int[Array, "..."]) -> UInt[Array, "..."]:
    """Returns the place of the n-th set bit, counted from 0; 31 where there are fewer."""
    place = jnp.zeros_like(word)
    for step in (16, 8, 4, 2, 1):
        below = lax.population_count(word >> place & jnp.uint32((1 << step) - 1)).astype(jnp.int32)
        is_beyond = n >= below
        n = jnp.where(is_beyond, n - below, n)
        place = jnp.where(is_beyond, place + step, place)
    return place


def _lowest_bits(word: UInt[Array, "B J words"], count: Int[Array, "B J words"]) -> UInt[Array, "B J words"]:
    """Returns each word with its `count` lowest set bits left."""
    cut = jnp.left_shift(jnp.uint32(1), _nth_bit(word, count)) - 1
    return jnp.where(lax.population_count(word).astype(jnp.int32) <= count, word, word & cut)


def _list_bits(words: UInt[Array, "B J words"], num_places: int) -> Int[Array, "B J C"]:
    """Returns the places of the set bits, ascending, padded with EMPTY."""
    words = jnp.pad(words, ((0, 0), (0, 0), (0, -words.shape[-1] % GROUP)))
    count = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(count, axis=-1)  # set bits up to and including each word
    place = jnp.arange(num_places, dtype=jnp.int32)[None, None, :]
    # Which group of words, which of its words, which bit: comparing with all words at once, XLA:CPU writes out 5 MB.
    ends_of_groups = ends[..., GROUP - 1 :: GROUP]
    group = (ends_of_groups[:, :, None, :] <= place[..., None]).sum(axis=-1, dtype=jnp.int32)
    is_listed = group < ends_of_groups.shape[-1]
    group = jnp.minimum(group, ends_of_groups.shape[-1] - 1)
    ends_in_group = jnp.take_along_axis(ends.reshape(*ends.shape[:2], -1, GROUP), group[..., None], axis=2)
    at = group * GROUP + (ends_in_group <= place[..., None]).sum(axis=-1, dtype=jnp.int32)
    at = jnp.minimum(at, words.shape[-1] - 1)
    n = place - jnp.take_along_axis(ends - count, at, axis=-1)
    slots = at * WORD + _nth_bit(jnp.take_along_axis(words, at, axis=-1), n).astype(jnp.int32)
    return jnp.where(is_listed, slots, EMPTY)
