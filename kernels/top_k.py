"""Exact top-k as a list of slots, in plain jnp.

A sort of all scores would take most of a refresh. Instead the k-th highest score is found by bisection of the bits, the
choice becomes one bit per slot, and the list is read off counts of bits. On a CPU this takes a fifth of the time of
`lax.top_k` (docs/performance.md).
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int, UInt

from hshare_jax.shapes import EMPTY

WORD = 32  # slots whose choice is packed into one word
GROUP = 16  # words that are counted together
LANES = 128  # slots whose counts are kept apart, so that counting needs no sum across a vector


def select_tokens(
    scores: Float[Array, "B J S"],
    is_candidate: Bool[Array, "B S"],
    num_critical: int,
    num_allowed: Int[Array, "B"] | None = None,
) -> Int[Array, "B J C"]:
    """The slots of the `num_critical` highest scores, ascending. Ties go to the lower slot.

    If there are fewer candidates, all candidates are listed and the places that are left hold EMPTY.

    Args:
        scores: one score per list and slot. Scores of candidates must not be NaN; the others may be anything.
        is_candidate: the slots that may be listed.
        num_critical: C, the places of a list.
        num_allowed: how many places the lists of each row may fill; None allows all C.
    """
    B, J, S = scores.shape
    scores, is_candidate = (_pad_to_lanes(x, fill) for x, fill in ((scores, 0.0), (is_candidate, False)))
    order = _once(jnp.where(is_candidate[:, None, :], _sortable(scores), jnp.iinfo(jnp.int32).min))
    count = jnp.full((B,), num_critical) if num_allowed is None else jnp.minimum(num_allowed, num_critical)
    count = jnp.minimum(count, is_candidate.sum(axis=-1))[:, None]
    threshold = _kth_largest(order, count)[..., None]
    is_above, is_tied = _pack(order > threshold), _pack((order == threshold) & is_candidate[:, None, :])
    # Of the slots tied at the threshold, the lowest ones fill the places that are still missing.
    missing = count - lax.population_count(is_above).sum(axis=-1, dtype=jnp.int32)
    num_tied = lax.population_count(is_tied).astype(jnp.int32)
    room = jnp.clip(missing[..., None] - (jnp.cumsum(num_tied, axis=-1) - num_tied), 0, WORD)
    is_chosen = is_above | _lowest_bits(is_tied, room)
    return _list_bits(is_chosen, num_critical)


def _pad_to_lanes(x: Array, fill: float | bool) -> Array:
    """The array with its last axis filled up to a multiple of LANES."""
    rest = -x.shape[-1] % LANES
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, rest)], constant_values=fill) if rest else x


def _sortable(scores: Float[Array, "B J S"]) -> Int[Array, "B J S"]:
    """int32 numbers in the order of the float32 scores. Both zeros are one number; int32's least number stays free."""
    bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, jnp.iinfo(jnp.int32).min - bits, bits)  # sign and magnitude to two's complement


def _once(x: Array) -> Array:
    """The array, computed exactly once.

    Otherwise XLA may compute it again in every loop that reads it, and round it differently there. A threshold found in
    one loop would then be missed in the next, and the list would come out short. A barrier alone does not help: XLA
    drops barriers before fusing loops, but never fuses through a loop carry.
    """
    return lax.fori_loop(0, 2, lambda _, kept: lax.optimization_barrier(kept), x)


def _kth_largest(order: Int[Array, "B J S"], k: Int[Array, "B 1"]) -> Int[Array, "B J"]:
    """The k-th largest number of each list, found bit by bit: the high 16 bits, then the low 16. k = 0: above all."""
    low = jnp.iinfo(jnp.int16).min

    def bisect(values: Array, k: Array) -> Array:
        def raise_bit(index: Array, least: Array) -> Array:
            higher = least + (1 << (15 - index))
            # The counts have 16 bits too, and each covers a part too short to overflow.
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
    """The mask as one bit per slot, the first slot in the lowest bit of the first word."""
    bits = jnp.left_shift(jnp.uint32(1), jnp.arange(WORD, dtype=jnp.uint32))
    grouped = mask.reshape(*mask.shape[:-1], -1, WORD)
    return jnp.where(grouped, bits, jnp.uint32(0)).sum(axis=-1, dtype=jnp.uint32)


def _nth_bit(word: UInt[Array, "..."], n: Int[Array, "..."]) -> UInt[Array, "..."]:
    """The place of the n-th set bit of each word, counted from 0; 31 where the word has fewer set bits."""
    place = jnp.zeros_like(word)
    for step in (16, 8, 4, 2, 1):
        below = lax.population_count(word >> place & jnp.uint32((1 << step) - 1)).astype(jnp.int32)
        is_beyond = n >= below
        n = jnp.where(is_beyond, n - below, n)
        place = jnp.where(is_beyond, place + step, place)
    return place


def _lowest_bits(word: UInt[Array, "B J words"], count: Int[Array, "B J words"]) -> UInt[Array, "B J words"]:
    """Each word with only its `count` lowest set bits."""
    cut = jnp.left_shift(jnp.uint32(1), _nth_bit(word, count)) - 1
    return jnp.where(lax.population_count(word).astype(jnp.int32) <= count, word, word & cut)


def _list_bits(words: UInt[Array, "B J words"], num_places: int) -> Int[Array, "B J C"]:
    """The places of the set bits, ascending, padded with EMPTY."""
    words = jnp.pad(words, ((0, 0), (0, 0), (0, -words.shape[-1] % GROUP)))
    count = lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(count, axis=-1)  # set bits up to and including each word
    place = jnp.arange(num_places, dtype=jnp.int32)[None, None, :]
    # First the group of words, then the word in the group, then the bit in the word. If each place were compared with
    # all words at once, XLA:CPU would write out 5 MB.
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
