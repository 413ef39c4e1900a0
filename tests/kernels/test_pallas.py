"""The Pallas kernels equal the definition in every layout, and lower for CUDA without a GPU.

Here they run in Pallas' interpreter, which is slow, so the sizes are the smallest at which blocks, splits and chunks
matter.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import pallas_attention, pallas_prefill, pallas_selection
from hshare_jax.kernels.choose_tokens import choose_tokens
from hshare_jax.kernels.labels import Labels, label_query, make_labels, score_labels
from hshare_jax.kernels.tail import HIGH, LOW, Tail, no_tail
from hshare_jax.kernels.tiling import Tiles, attention_tiles, selection_tiles
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.shapes import EMPTY

F32 = 1e-5  # absolute, on outputs of about 1
S, BLOCK, C, NUM_SINKS = 256, 32, 20, 3
# Rows with no token, one, about a block, and a full cache. The recent range starts so that sinks, list and range all
# matter.
LENGTHS = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)
STARTS = np.maximum(LENGTHS - 7, 0).astype(np.int32)


def lower_for_cuda(function, *arrays):
    """The text of a program for an H200, lowered on a machine that has none."""
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text):
    return text.count("__gpu$xla.gpu.triton")


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


def expected_attention(q, keys, values, reads_of):
    """The attention in float64, zeros for a row of length 0; `reads_of(b, n)` are the slots that a head reads."""
    out = np.zeros(q.shape)
    for b in range(len(q)):
        if LENGTHS[b] > 0:
            k, v = (np.nan_to_num(x[b].astype(np.float64), posinf=0) for x in (keys, values))
            out[b] = oracle.attention(q[b].astype(np.float64), k, v, [reads_of(b, n) for n in range(q.shape[1])])
    return out


# (N, K, J, H): multi-head, grouped with a list per kv head and per query head, multi-query; odd sizes
HEADS = [(4, 4, 4, 64), (8, 2, 2, 128), (4, 2, 4, 80), (6, 1, 1, 96), (6, 3, 3, 256)]


@pytest.mark.parametrize(("N", "K", "J", "H"), HEADS)
@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, None), (2, 20)])
def test_sparse_decode_equals_the_oracle(N, K, J, H, splits, window):
    q, keys, values, lists, source = attention_case(1, N, K, J, H)
    arrays = map(jnp.asarray, (q, keys, values, lists, source))
    decode = functools.partial(pallas_attention.sparse_decode, *arrays, layer=1, interpret=True)
    out = decode(
        lengths=jnp.asarray(LENGTHS), recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=7,
        window=window, tiles=Tiles(BLOCK, 4, 1, splits),
    )  # fmt: skip

    def reads_of(b, n):
        unit = source[b, 1, n * J // N]
        listed = lists[unit // J, b, unit % J].tolist()
        return oracle.shared_reads(listed, NUM_SINKS, int(STARTS[b]), oracle.dense_reads(int(LENGTHS[b]), window))

    np.testing.assert_allclose(out, expected_attention(q, keys, values, reads_of), atol=F32, rtol=0)


@pytest.mark.parametrize(("N", "K", "H"), [(4, 4, 64), (8, 2, 80)])
@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, 20)])
def test_dense_decode_equals_the_oracle(N, K, H, splits, window):
    q, keys, values, *_ = attention_case(2, N, K, K, H)
    out = pallas_attention.dense_decode(
        *map(jnp.asarray, (q, keys, values, LENGTHS)), window=window, tiles=Tiles(BLOCK, 4, 1, splits), interpret=True
    )
    expected = expected_attention(q, keys, values, lambda b, n: oracle.dense_reads(int(LENGTHS[b]), window))
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)


def tail_case(seed, num_rows, N, H, rank):
    rng = np.random.default_rng(seed)
    keys, values = (jnp.asarray(rng.standard_normal((num_rows, N, 1 + rank, H)), jnp.float32) for _ in range(2))
    terms = rng.standard_normal((num_rows, N, 6 + rank)).astype(np.float32)
    terms[..., LOW], terms[..., HIGH] = -1, 1
    return Tail(keys, values, jnp.asarray(terms))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("N", "K", "J", "window", "rank"), [(2, 2, 2, None, 1), (6, 2, 2, 20, 2)])
def test_a_tail_is_added_once_however_a_list_is_split(N, K, J, window, rank, splits):
    q, keys, values, lists, source = attention_case(7, N, K, J, 24)
    tail = tail_case(8, len(LENGTHS), N, 24, rank)
    out = pallas_attention.sparse_decode(
        *map(jnp.asarray, (q, keys, values, lists, source)), layer=1, lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=7, window=window, tail=tail,
        tiles=Tiles(16, 4, 1, splits), interpret=True,
    )  # fmt: skip
    keys, values = (np.nan_to_num(x, posinf=0) for x in (keys, values))
    for b, length in enumerate(LENGTHS):
        seen = oracle.dense_reads(int(length), window)
        units = [source[b, 1, n * J // N] for n in range(N)]
        listed = [lists[unit // J, b, unit % J].tolist() for unit in units]
        reads = [oracle.shared_reads(of_head, NUM_SINKS, int(STARTS[b]), seen) for of_head in listed]
        q_row, keys_row, values_row = (x[b].astype(np.float64) for x in (q, keys, values))
        of_tail = (np.asarray(x[b], np.float64) for x in jax.tree.leaves(tail))
        expected = oracle.attention_with_tail(q_row, keys_row, values_row, reads, seen, *of_tail)
        np.testing.assert_allclose(out[b], expected, atol=F32, rtol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_head_that_reads_nothing_has_the_value_of_its_tail(splits):
    q, keys, values, lists, source = attention_case(9, 2, 2, 2, 16)
    lengths, tail = jnp.asarray(LENGTHS), tail_case(10, len(LENGTHS), 2, 16, 0)
    arrays = [jnp.asarray(np.nan_to_num(x, posinf=0)) for x in (q, keys, values)]
    decode = functools.partial(
        pallas_attention.sparse_decode, *arrays, jnp.full_like(lists, EMPTY), jnp.asarray(source), 1, lengths, lengths,
        num_sinks=0, max_recent=0, tiles=Tiles(16, 4, 1, splits), interpret=True,
    )  # fmt: skip
    assert (np.asarray(decode()) == 0).all()
    is_seen = LENGTHS[:, None, None] > 0
    np.testing.assert_allclose(decode(tail=tail), np.where(is_seen, tail.values[:, :, 0], 0), atol=F32, rtol=0)


# --- selection


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


CASES = {
    "multi-head, 4 bits": (4, 4, 4, 4, False, S),
    "grouped, 8 bits": (4, 2, 2, 8, False, S),
    "grouped, not quantised, dilated": (4, 2, 2, None, True, S),
    "per query head, in chunks, dilated": (4, 2, 4, 4, True, 64),
    "grouped, in chunks": (8, 2, 2, 4, False, 64),
    "grouped, not quantised, in chunks that do not divide": (4, 2, 2, None, True, 96),
    "multi-head, in chunks shorter than a list": (4, 4, 4, 8, False, 16),
}


@pytest.mark.parametrize(("N", "K", "J", "bits", "dilate", "block"), CASES.values(), ids=CASES)
def test_selection_by_labels_equals_the_definition_in_every_layout(N, K, J, bits, dilate, block, monkeypatch):
    if block == 16:  # the best slots of all chunks come in several blocks too
        monkeypatch.setattr(pallas_selection, "merge_tiles", lambda num_candidates: Tiles(64, 4, 1))
    q, keys, channels, lists, source, is_due, first, last = selection_case(5, N, K, J)
    if block == 96:  # a cache that is no multiple of the block
        keys, block = keys[:, :, :200], 64
        last = jnp.minimum(last, 192)
    labels = make_labels(keys, channels, bits)
    scores = score_labels(label_query(q, channels, bits), labels)
    expected = choose_tokens(scores, first, last, None, num_lists=J, num_critical=C, dilate=dilate)
    got = pallas_selection.select_by_labels(
        lists, 1, label_query(q, channels, bits), labels, source, is_due, first, last, None,
        dilate=dilate, tiles=Tiles(block, 4, 1), interpret=True,
    )  # fmt: skip
    is_chosen = (source[:, 1] == J + jnp.arange(J)[None, :]) & is_due[:, None]
    np.testing.assert_array_equal(got, lists.at[1].set(jnp.where(is_chosen[:, :, None], expected, lists[1])))


@pytest.mark.parametrize("block", [S, 64])
def test_selection_by_scores_breaks_ties_by_slot_and_knows_all_numbers(block):
    rng, B, J = np.random.default_rng(6), 4, 2
    scores = rng.integers(-3, 3, (B, J, S)).astype(np.float32)  # many ties
    scores[1, :, ::3], scores[1, :, 1::3] = 0.0, -0.0
    scores[2] = np.where(rng.random((J, S)) < 0.5, np.inf, -np.inf)
    scores[3, :, 40:] = np.nan  # of slots that do not compete
    first, last = np.array([3, 0, 0, 5]), np.array([S + 9, S, S, 40])  # the first row is full and went on
    allowed = np.array([C, 11, 0, 99])
    source = jnp.tile(jnp.arange(J), (B, 1, 1))
    got = pallas_selection.select_by_scores(
        jnp.zeros((1, B, J, C), jnp.int32), 0, jnp.asarray(scores), source, jnp.ones((B,), bool),
        *(jnp.asarray(x, jnp.int32) for x in (first, last, allowed)), tiles=Tiles(block, 4, 1), interpret=True,
    )  # fmt: skip
    for b, j in np.ndindex(B, J):
        expected = oracle.select(scores[b, j], set(range(first[b], min(last[b], S))), min(int(allowed[b]), C))
        listed = [slot for slot in got[0, b, j].tolist() if slot != EMPTY]
        assert listed == expected
        assert got[0, b, j, len(listed) :].tolist() == [EMPTY] * (C - len(listed))


# --- without a GPU


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("B", "N", "K", "H", "slots"), [(16, 32, 32, 128, 4096), (1, 32, 8, 64, 131_072)])
def test_attention_lowers_for_cuda(dtype, B, N, K, H, slots):
    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = shape(B, K, slots, H, dtype=dtype)
    arrays = (shape(B, N, H, dtype=dtype), cache, cache)
    plan = (shape(32, B, K, 432), shape(B, 32, K), shape(B), shape(B))
    tail = jax.eval_shape(lambda: no_tail(B, N, H, 2, jnp.dtype(dtype)))

    def sparse(q, keys, values, lists, source, lengths, start, tail):
        return pallas_attention.sparse_decode(
            q, keys, values, lists, source, 3, lengths, start, num_sinks=16, max_recent=64, tail=tail
        )

    # Split lists are merged by a second kernel, and a tail needs no further one.
    splits = attention_tiles(H, jnp.dtype(dtype).itemsize, B * K, 512).splits
    for of_case in (None, tail):
        assert count_kernels(lower_for_cuda(sparse, *arrays, *plan, of_case)) == (1 if splits == 1 else 2)
    assert count_kernels(lower_for_cuda(pallas_attention.dense_decode, *arrays, shape(B))) >= 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("B", "T", "N", "K", "H", "slots"), [(8, 512, 32, 32, 128, 4096), (1, 64, 14, 2, 80, 131_072)])
@pytest.mark.parametrize("window", [None, 1000])
def test_prefill_attention_lowers_for_cuda(dtype, B, T, N, K, H, slots, window):
    def attend(q, keys, values, starts, is_counted):
        out, log_total = pallas_prefill.prefill_attention(q, keys, values, starts, window=window)
        return out, pallas_prefill.received_attention(q, keys, starts, is_counted, log_total, window=window)

    q, cache = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, N, H), (B, K, slots, H)))
    starts, is_counted = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, T), bool)
    assert count_kernels(lower_for_cuda(attend, q, cache, cache, starts, is_counted)) == 2


@pytest.mark.parametrize(
    ("B", "N", "K", "slots", "kernels"),
    [(16, 32, 32, 4096, 1), (8, 32, 8, 4096, 1), (1, 32, 32, 131_072, 2), (1, 32, 8, 131_072, 3)],
)
def test_selection_lowers_for_cuda_in_few_kernels(B, N, K, slots, kernels):
    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def choose(lists, query, codes, scales, *arrays):
        return pallas_selection.select_by_labels(lists, 3, query, Labels(codes, scales), *arrays)

    codes, scales = shape(B, K, 16, slots, dtype=jnp.uint8), shape(B, K, 2, slots, dtype=jnp.bfloat16)
    arrays = (shape(32, B, K, 432), shape(B, N, 32, dtype=jnp.float32), codes, scales, shape(B, 32, K))
    arrays += (shape(B, dtype=bool), shape(B), shape(B), shape(B))
    assert count_kernels(lower_for_cuda(choose, *arrays)) == kernels


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refresh", [True, False, None])
def test_a_step_lowers_for_cuda_with_kernels_and_without_a_conditional(refresh):
    config = ModelConfig(
        vocab_size=64, width=128, mlp_width=128, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=64,
        max_positions=4096, windows=(None,) * 3, rope=RopeConfig(theta=100.0),
    )  # fmt: skip
    state = jax.eval_shape(lambda: init_state(config, 16, 4096, method=HShare().with_settings({"min_length": 300})))
    step = functools.partial(decode_step, config=config, refresh=refresh, impl="pallas")
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = lower_for_cuda(lambda *arrays: step(*arrays), parameter_shapes(config), tokens, state)
    assert not re.search(r"stablehlo\.(case|if|while)", text)
    assert "decode_attention" in text
    assert ("select_tokens" in text) == (refresh is not False)


def test_tiles_fill_the_chip_and_fit_it():
    for head_dim in (64, 128, 256):
        for programs in (1, 8, 128, 2048):
            tiles = attention_tiles(head_dim, 2, programs, 512)
            assert 16 <= tiles.block <= 128
            assert tiles.splits * 2 * tiles.block <= max(512, 2 * tiles.block)
            assert tiles.num_stages * 2 * tiles.block * head_dim * 2 <= 227 * 1024  # shared memory of a Hopper core
    for slots, group in ((512, 1), (4096, 4), (131_072, 1), (131_072, 8), (131_072, 16)):
        tiles = selection_tiles(slots, group)
        assert tiles.block * group <= tiles.num_warps * 32 * 64  # scores in registers
