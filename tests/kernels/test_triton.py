"""The Triton kernels equal the definition in every layout.

They run in Triton's interpreter, which is slow, so the sizes are the smallest at which blocks, splits and chunks
matter. scripts/test.sh runs these tests once more, with TRITON_INTERPRET=1. scripts/check_triton.sh runs them too, and
the conformance suite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.errors import SettingError
from hshare_jax.kernels import api, triton_attention, triton_interpreter, triton_library, triton_selection
from hshare_jax.kernels.choose_tokens import choose_tokens
from hshare_jax.kernels.labels import label_query, make_labels, score_labels
from hshare_jax.kernels.tail import HIGH, LOW, Tail
from hshare_jax.kernels.tiling import Tiles
from hshare_jax.shapes import EMPTY

F32 = 1e-5  # absolute, on outputs of about 1
S, BLOCK, C, NUM_SINKS = 128, 16, 20, 3
# Rows with no token, one, about a block, and a full cache. The recent range starts so that sinks, list and range all
# matter.
LENGTHS = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)
STARTS = np.maximum(LENGTHS - 7, 0).astype(np.int32)

interpreted = pytest.mark.skipif(
    triton_interpreter.obstacle() is not None,
    reason=f"Triton's interpreter {triton_interpreter.obstacle()}; scripts/test.sh runs these tests by themselves",
)


def attention_case(seed, N, K, J, H):
    """(q, keys, values, lists, source) in float32. Slots that no row reads are NaN or infinite."""
    rng, B = np.random.default_rng(seed), len(LENGTHS)
    q = rng.standard_normal((B, N, H)).astype(np.float32)
    keys, values = (rng.standard_normal((B, K, S, H)).astype(np.float32) for _ in range(2))
    lists = np.full((2, B, J, C), EMPTY, np.int32)
    for layer, b, j in np.ndindex(2, B, J):
        listed = rng.permutation(np.arange(NUM_SINKS, max(NUM_SINKS, int(STARTS[b]))))[: rng.integers(0, C + 1)]
        lists[layer, b, j, : len(listed)] = np.sort(listed)
    for b, length in enumerate(LENGTHS):
        keys[b, :, length:], values[b, :, length:] = np.nan, np.inf
    return q, keys, values, lists, rng.integers(0, 2 * J, (B, 2, J)).astype(np.int32)


def tail_case(seed, N, H, rank):
    rng, B = np.random.default_rng(seed), len(LENGTHS)
    keys, values = (jnp.asarray(rng.standard_normal((B, N, 1 + rank, H)), jnp.float32) for _ in range(2))
    terms = rng.standard_normal((B, N, 6 + rank)).astype(np.float32)
    terms[..., LOW], terms[..., HIGH] = -1, 1
    return Tail(keys, values, jnp.asarray(terms))


@interpreted
@pytest.mark.parametrize(("N", "K", "J", "H"), [(2, 2, 2, 16), (4, 2, 4, 24), (6, 1, 1, 32)])
@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, None), (2, 20)])
@pytest.mark.parametrize("rank", [None, 2])
def test_sparse_decode_equals_the_oracle_however_lists_are_split(N, K, J, H, splits, window, rank):
    q, keys, values, lists, source = attention_case(1, N, K, J, H)
    tail = None if rank is None else tail_case(2, N, H, rank)
    out = triton_attention.sparse_decode(
        *map(jnp.asarray, (q, keys, values, lists, source)), layer=1, lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=7, window=window, tail=tail,
        tiles=Tiles(BLOCK, 4, 1, splits),
    )  # fmt: skip
    keys, values = (np.nan_to_num(x, posinf=0).astype(np.float64) for x in (keys, values))
    for b, length in enumerate(LENGTHS):
        seen = oracle.dense_reads(int(length), window)
        units = [source[b, 1, n * J // N] for n in range(N)]
        listed = [lists[unit // J, b, unit % J].tolist() for unit in units]
        reads = [oracle.shared_reads(of_head, NUM_SINKS, int(STARTS[b]), seen) for of_head in listed]
        q_row, of_tail = q[b].astype(np.float64), [np.float64(x[b]) for x in jax.tree.leaves(tail)]
        if tail is None:
            expected = oracle.attention(q_row, keys[b], values[b], reads)
        else:
            expected = oracle.attention_with_tail(q_row, keys[b], values[b], reads, seen, *of_tail)
        np.testing.assert_allclose(out[b], expected, atol=F32, rtol=0)


@interpreted
@pytest.mark.parametrize(("N", "K", "H"), [(2, 2, 16), (4, 1, 24)])
@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, 20)])
def test_dense_and_split_decode_equal_the_definition_however_slots_are_split(N, K, H, splits, window):
    q, keys, values, lists, _ = attention_case(3, N, K, K, H)
    tiles, bounds = Tiles(BLOCK, 4, 1, splits), (jnp.asarray(LENGTHS), jnp.asarray(STARTS))
    out = triton_attention.dense_decode(*map(jnp.asarray, (q, keys, values, LENGTHS)), window=window, tiles=tiles)
    q, keys, values = (jnp.asarray(np.nan_to_num(x, posinf=0)) for x in (q, keys, values))
    expected = api.dense_decode(q, keys, values, bounds[0], window=window, impl="reference")
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)
    arrays, how = (q, keys, values, jnp.asarray(lists[0]), *bounds), {"num_sinks": NUM_SINKS, "window": window}
    parts = triton_attention.split_decode(*arrays, **how, tiles=tiles)
    expected = api.split_decode(*arrays, **how, impl="reference")
    for ours, defined in zip(jax.tree.leaves(parts), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, defined, atol=F32, rtol=F32)


@interpreted
def test_lists_and_plans_that_point_outside_read_nothing_outside():
    q, keys, values, lists, source = map(jnp.asarray, attention_case(4, 2, 2, 2, 16))
    decode = functools.partial(
        triton_attention.sparse_decode, q, keys, values, layer=1, lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=7,
    )  # fmt: skip
    for slot in (S - 1, S, 2**31 - 1):  # in the recent range or beyond the row, and beyond the cache
        beyond = jnp.where(lists == EMPTY, jnp.int32(slot), lists)
        np.testing.assert_array_equal(decode(lists=beyond, source=source), decode(lists=lists, source=source))
    far = decode(lists=lists, source=jnp.full_like(source, 2**31 - 1))
    np.testing.assert_array_equal(far, decode(lists=lists, source=jnp.full_like(source, 3)))


def selection_case(seed, N, K, J, R=7, H=16):
    """(q, keys, channels, lists before, plan, which rows are due, first, last)."""
    rng, lengths = np.random.default_rng(seed), np.array([0, 3, 30, S // 2, S])
    B = len(lengths)
    q, keys = rng.standard_normal((B, N, H)), rng.standard_normal((B, K, S, H))
    channels = np.sort(np.argsort(rng.random((B, K, H)), axis=-1)[..., :R], axis=-1)
    lists = rng.integers(0, 99, (2, B, J, C))
    source = np.tile(np.arange(2 * J).reshape(1, 2, J), (B, 1, 1))
    source[::2, 1, -1] = 0  # in every other row the last list is a copy
    arrays = (2 * q, keys, channels, lists, source, np.arange(B) != 3, np.full(B, NUM_SINKS), lengths - 8)
    types = (jnp.float32, jnp.float32, *(jnp.int32,) * 3, bool, *(jnp.int32,) * 2)
    return [jnp.asarray(array, dtype) for array, dtype in zip(arrays, types, strict=True)]


# (N, K, J, bits, dilate, block, block of the merge)
LAYOUTS = {
    "one chunk": (4, 2, 2, 8, False, S, 0),
    "three heads a list, dilated": (6, 2, 2, 4, True, S, 0),
    "per query head, in chunks, dilated": (4, 2, 4, 4, True, 32, 0),
    "grouped, not quantised, in chunks that do not divide": (4, 2, 2, None, True, 32, 0),
    "in chunks shorter than a list, merged in several blocks": (2, 2, 2, 8, False, 16, 64),
}


@interpreted
@pytest.mark.parametrize(("N", "K", "J", "bits", "dilate", "block", "merged"), LAYOUTS.values(), ids=LAYOUTS)
def test_selection_by_labels_equals_the_definition_in_every_layout(N, K, J, bits, dilate, block, merged):
    q, keys, channels, lists, source, is_due, first, last = selection_case(5, N, K, J)
    if bits is None:  # a cache that is no multiple of the block
        keys, last = keys[:, :, :100], jnp.minimum(last, 92)
    labels = make_labels(keys, channels, bits)
    scores = score_labels(label_query(q, channels, bits), labels)
    expected = choose_tokens(scores, first, last, None, num_lists=J, num_critical=C, dilate=dilate)
    got = triton_selection.select_by_labels(
        lists, 1, label_query(q, channels, bits), labels, source, is_due, first, last, None,
        dilate=dilate, tiles=Tiles(block, 4, 1), merging=Tiles(merged, 4, 1) if merged else None,
    )  # fmt: skip
    is_chosen = (source[:, 1] == J + jnp.arange(J)[None, :]) & is_due[:, None]
    np.testing.assert_array_equal(got, lists.at[1].set(jnp.where(is_chosen[:, :, None], expected, lists[1])))


@interpreted
@pytest.mark.parametrize(("block", "merged"), [(S, 0), (32, 0), (32, 32)])
def test_selection_by_weights_breaks_ties_by_slot_and_knows_all_numbers(block, merged):
    rng, B, J = np.random.default_rng(6), 4, 2
    weights = rng.integers(-3, 3, (B, J, S)).astype(np.float32)  # many ties
    weights[1, :, ::3], weights[1, :, 1::3] = 0.0, -0.0
    weights[2] = np.where(rng.random((J, S)) < 0.5, np.inf, -np.inf)
    weights[3, :, 40:] = np.nan  # of slots that do not compete
    first, last = np.array([3, 0, 0, 5]), np.array([S + 9, S, S, 40])  # the first row is full and went on
    allowed = np.array([C, 11, 0, 99])
    got = triton_selection.select_by_weights(
        jnp.zeros((1, B, J, C), jnp.int32), 0, jnp.asarray(weights), jnp.tile(jnp.arange(J), (B, 1, 1)),
        jnp.ones((B,), bool), *(jnp.asarray(x, jnp.int32) for x in (first, last, allowed)),
        tiles=Tiles(block, 4, 1), merging=Tiles(merged, 4, 1) if merged else None,
    )  # fmt: skip
    for b, j in np.ndindex(B, J):
        expected = oracle.select(weights[b, j], set(range(first[b], min(last[b], S))), min(int(allowed[b]), C))
        listed = [slot for slot in got[0, b, j].tolist() if slot != EMPTY]
        assert listed == expected
        assert got[0, b, j, len(listed) :].tolist() == [EMPTY] * (C - len(listed))


# --- refusals, which need no Triton


def test_without_the_variable_the_interpreter_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        SettingError, match=r"impl='triton-interpret' needs Triton's interpreter, which is .*INTERPRET=1"
    ):
        api.check_impl("triton-interpret")


def test_without_packages_triton_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr("hshare_jax.kernels.implementations.traced_platform", lambda: "cuda")
    monkeypatch.setattr(triton_library, "PACKAGES", ("triton", "no_such_package"))
    with pytest.raises(
        SettingError, match=r"needs the Triton kernels, which lack .*no-such-package.*hshare-jax\[cuda,triton\]"
    ):
        api.check_impl("triton")


def test_a_jax_that_jax_triton_does_not_know_is_told(monkeypatch):
    monkeypatch.setattr(triton_library, "PACKAGES", ())
    monkeypatch.setattr("importlib.metadata.version", {"jax-triton": "0.4.1"}.get)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_library.obstacle() == f"jax-triton 0.4.1 cannot lower with jax {jax.__version__}"
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert triton_library.obstacle() is None


def test_triton_is_refused_on_a_cpu_with_a_way_out():
    with pytest.raises(SettingError, match=r"impl='triton' runs on NVIDIA GPUs.*or use 'triton-interpret'"):
        api.check_impl("triton")
