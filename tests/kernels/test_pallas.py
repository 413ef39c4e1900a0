"""Every implementation of attention and selection is the definition; the Pallas ones lower for CUDA without a GPU.

Here they run in Pallas' interpreter, which is slow: sizes are the smallest at which blocks, splits and chunks matter.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import checkify
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny_decoder import HSHARE, MODEL, params, prefill_rows, random_rows

from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import api, pallas_attention, pallas_selection, reference_attention
from hshare_jax.kernels.labels import label_query, make_labels, score_labels
from hshare_jax.kernels.prefill_attention import fused_prefill
from hshare_jax.kernels.reference_attention import EMPTY
from hshare_jax.kernels.tiling import Tiles, attention_tiles, selection_tiles
from hshare_jax.methods.hshare.critical_tokens import candidate_range, find_critical_tokens
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import identity_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import parameter_shapes

F32, BF16 = 1e-5, 2e-2  # absolute, on outputs of about 1
S, BLOCK, C, NUM_SINKS = 256, 32, 20, 3
# none, one, around a block, a whole cache; the recent range starts so that sinks, list and range all matter
LENGTHS = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, S], np.int32)
STARTS = np.maximum(LENGTHS - 7, 0).astype(np.int32)


def lower_for_cuda(function, *arrays):
    """Returns the program's text for an H200, lowered on a machine that has none."""
    device = AbstractDevice("NVIDIA H200", 1, "cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(text):
    return text.count("__gpu$xla.gpu.triton")


def attention_case(seed, N, K, J, H):
    """Returns (q, keys, values, lists, source) in float32; what no row reads is NaN or infinite."""
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
    """Returns the float64 attention, zeros for a row of length 0; `reads_of(b, n)` are the slots of a head."""
    out = np.zeros(q.shape)
    for b in range(len(q)):
        if LENGTHS[b] > 0:
            k, v = (np.nan_to_num(x[b].astype(np.float64), posinf=0) for x in (keys, values))
            out[b] = oracle.attention(q[b].astype(np.float64), k, v, [reads_of(b, n) for n in range(q.shape[1])])
    return out


# (N, K, J, H): multi-head, grouped with lists per kv head and per query head, multi-query; odd sizes
HEADS = [(4, 4, 4, 64), (8, 2, 2, 128), (4, 2, 4, 80), (6, 1, 1, 96), (6, 3, 3, 256)]


@pytest.mark.parametrize(("N", "K", "J", "H"), HEADS)
@pytest.mark.parametrize(("splits", "window"), [(1, None), (4, None), (2, 20)])
def test_shared_decode_equals_the_oracle(N, K, J, H, splits, window):
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("min_length", [0, 40])
def test_the_kernel_equals_the_reference_in_low_precision_and_under_the_length_gate(dtype, min_length):
    q, keys, values, lists, source = attention_case(3, 8, 2, 2, 64)
    keys, values = np.nan_to_num(keys), np.nan_to_num(values, posinf=0)
    arrays = [jnp.asarray(x, dtype) for x in (q, keys, values)]
    decode = functools.partial(
        api.sparse_decode, *arrays, *map(jnp.asarray, (lists, source)), layer=1, lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=7, min_length=min_length,
    )  # fmt: skip
    got, expected = (np.asarray(decode(impl=impl), np.float32) for impl in ("interpret", "reference"))
    np.testing.assert_allclose(got[1:], expected[1:], atol=BF16, rtol=0)  # row 0 is empty: any numbers will do
    assert np.isfinite(got).all()


@pytest.mark.parametrize("impl", ["interpret", "reference"])
def test_a_full_row_and_a_cache_of_another_type_are_served_alike(impl):
    q, keys, values, lists, source = attention_case(4, 8, 2, 2, 8)
    keys, values = np.nan_to_num(keys), np.nan_to_num(values, posinf=0)
    cached, lengths = (jnp.asarray(q, jnp.bfloat16), jnp.asarray(keys), jnp.asarray(values)), jnp.asarray(LENGTHS)
    decode = functools.partial(api.dense_decode, *cached, impl=impl)
    out, over = decode(lengths=lengths), decode(lengths=jnp.where(lengths == S, S + 9, lengths))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[1:].astype(jnp.float32), over[1:].astype(jnp.float32))


# --- selection


def selection_case(seed, N, K, J, bits, dilate, ratio=None, R=7, H=16):
    """Returns (config, q, keys, channels, lengths, lists before, plan, which rows are due)."""
    rng, lengths = np.random.default_rng(seed), np.array([0, 3, 30, S // 2, S], np.int32)
    B = len(lengths)
    config = HShareSettings(
        num_sinks=NUM_SINKS, num_critical=C, num_recent=8, refresh_interval=2, dilate=dilate, label_channels=R,
        label_bits=bits, budget_ratio=ratio, lists_per="kv_head" if J == K else "query_head",
    )  # fmt: skip
    q, keys = rng.standard_normal((B, N, H)), rng.standard_normal((B, K, S, H))
    channels = np.sort(np.argsort(rng.random((B, K, H)), axis=-1)[..., :R], axis=-1)
    lists = rng.integers(0, 99, (2, B, J, C))
    source = np.tile(np.arange(2 * J).reshape(1, 2, J), (B, 1, 1))
    source[::2, 1, -1] = 0  # the last list is a copy in every other row
    arrays = (2 * q, keys, channels, lengths, lists, source, np.arange(B) != 3)
    types = (jnp.float32, jnp.float32, *(jnp.int32,) * 4, bool)
    return config, *(jnp.asarray(array, dtype) for array, dtype in zip(arrays, types, strict=True))


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
def test_selection_by_labels_equals_the_definition_where_it_is_asked_for(N, K, J, bits, dilate, block, monkeypatch):
    if block == 16:  # and the best of all chunks in blocks as well
        monkeypatch.setattr(select, "merge_tiles", lambda num_candidates: Tiles(64, 4, 1))
    config, q, keys, channels, lengths, lists, source, is_due = selection_case(5, N, K, J, bits, dilate)
    if block == 96:  # a cache that is no multiple of the block
        keys, block = keys[:, :, :200], 64
        lengths = jnp.minimum(lengths, 200)
    labels = make_labels(keys, channels, bits)
    scores = score_labels(q, labels, channels, bits)
    expected = find_critical_tokens(scores, lengths, num_lists=J, config=config)
    first, last = candidate_range(lengths, config, None)
    got = pallas_selection.select_labels(
        lists, 1, label_query(q, channels, bits), labels.codes, labels.scales, source, is_due, first, last,
        jnp.full_like(lengths, C), dilate=dilate, tiles=Tiles(block, 4, 1), interpret=True,
    )  # fmt: skip
    is_chosen = (source[:, 1] == J + jnp.arange(J)[None, :]) & is_due[:, None]
    np.testing.assert_array_equal(got, lists.at[1].set(jnp.where(is_chosen[:, :, None], expected, lists[1])))


@pytest.mark.parametrize("block", [S, 64])
def test_selection_by_scores_breaks_ties_by_slot_and_knows_all_numbers(block):
    rng, B, J = np.random.default_rng(6), 4, 2
    scores = rng.integers(-3, 3, (B, J, S)).astype(np.float32)  # many ties
    scores[1, :, ::3], scores[1, :, 1::3] = 0.0, -0.0
    scores[2] = np.where(rng.random((J, S)) < 0.5, np.inf, -np.inf)
    scores[3, :, 40:] = np.nan  # where nothing competes
    first, last = np.array([3, 0, 0, 5]), np.array([S + 9, S, S, 40])  # of a row that is full and went on
    allowed = np.array([C, 11, 0, 99])
    got = pallas_selection.select_scores(
        jnp.zeros((1, B, J, C), jnp.int32), 0, jnp.asarray(scores), identity_plan(B, 1, J), jnp.ones((B,), bool),
        *(jnp.asarray(x, jnp.int32) for x in (first, last, allowed)), tiles=Tiles(block, 4, 1), interpret=True,
    )  # fmt: skip
    for b, j in np.ndindex(B, J):
        expected = oracle.select(scores[b, j], set(range(first[b], min(last[b], S))), min(int(allowed[b]), C))
        listed = [slot for slot in got[0, b, j].tolist() if slot != EMPTY]
        assert listed == expected
        assert got[0, b, j, len(listed) :].tolist() == [EMPTY] * (C - len(listed))


# --- dispatch, and whole decodes


@pytest.mark.parametrize(
    "hshare",
    [
        # Dilation makes ties, which rounding may break otherwise here and there.
        dataclasses.replace(HSHARE, dilate=False),
        dataclasses.replace(HSHARE, dilate=False, min_length=30, label_bits=None),
        dataclasses.replace(HSHARE, scoring="exact", dense_layers=0, lists_per="query_head"),
        None,
    ],
    ids=["labels", "gate, not quantised", "exact, per query head", "dense"],
)
def test_a_whole_decode_with_the_kernels_equals_the_reference(hshare):
    config, rows = dataclasses.replace(MODEL, windows=(None, 20, None, None)), random_rows(7, more=5)
    found = []
    for impl in ("interpret", "reference"):
        state = prefill_rows([row[:-5] for row in rows], hshare=hshare, config=config)[1]
        logits = []
        for step in range(5):
            tokens = jnp.asarray([row[step - 5] for row in rows])
            out, state = decode_step(params(config), tokens, state, config=config, impl=impl)
            logits.append(out)
        lists = state.method_state.token_indices if isinstance(state.method_state, SharedLists) else jnp.zeros(0)
        found.append((np.stack(logits), np.asarray(lists)))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_an_implementation_that_cannot_run_is_refused_while_tracing():
    state = init_state(MODEL, 1, 8)
    with pytest.raises(ValueError, match="impl='pallas' runs on NVIDIA GPUs, and this program is for cpu"):
        decode_step(params(), jnp.zeros((1,), jnp.int32), state, config=MODEL, impl="pallas")
    with pytest.raises(ValueError, match="impl='magic' must be one of 'auto', 'pallas'"):
        decode_step(params(), jnp.zeros((1,), jnp.int32), state, config=MODEL, impl="magic")


@pytest.mark.usefixtures("unchecked")
def test_on_a_cpu_auto_adds_nothing_to_the_reference():
    state, tokens = init_state(MODEL, 1, 8, method=HSHARE), jnp.zeros((1,), jnp.int32)
    auto, plain = (
        decode_step.lower(params(), tokens, state, config=MODEL, impl=impl).as_text() for impl in ("auto", "reference")
    )
    # A branch of its own around each layer's attention, as platform_dependent leaves it, costs half of the speed.
    assert auto.count("stablehlo.case") == plain.count("stablehlo.case")
    assert auto.count(" = ") == plain.count(" = ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("lists", S, r"lists must hold slots in \[0, 256\)"), ("source", 4, r"source must lie in \[0, 4\)")],
)
def test_checkify_reports_what_points_outside(name, value, message):
    q, keys, values, lists, source = attention_case(8, 4, 2, 2, 8)
    arrays = dict(zip(("q", "keys", "values", "lists", "source"), (q, keys, values, lists, source), strict=True))
    decode = functools.partial(
        api.sparse_decode,
        layer=1,
        lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS),
        num_sinks=2,
        max_recent=7,
    )
    checked = checkify.checkify(jax.jit(lambda arrays: decode(**arrays)))
    checked(jax.tree.map(jnp.asarray, arrays))[0].throw()
    arrays[name] = np.where(np.arange(arrays[name].size).reshape(arrays[name].shape) == 1, value, arrays[name])
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        checked(jax.tree.map(jnp.asarray, arrays))[0].throw()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_call_around_the_fused_prefill_equals_the_reference(dtype):
    rng, (B, T, N, K, H) = np.random.default_rng(9), (3, 16, 4, 2, 16)
    q, keys, values = (rng.standard_normal(shape) for shape in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    starts = jnp.asarray([0, 7, S - T], jnp.int32)
    arrays = [jnp.asarray(array, dtype) for array in (q, keys, values)]
    got = fused_prefill(*arrays, starts=starts, implementation="xla").astype(jnp.float32)
    expected = reference_attention.prefill_attention(*arrays, starts=starts)[0].astype(jnp.float32)
    np.testing.assert_allclose(got, expected, atol=F32 if dtype == jnp.float32 else BF16, rtol=0)


# --- without a GPU


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("B", "N", "K", "H", "slots"), [(16, 32, 32, 128, 4096), (1, 32, 8, 64, 131_072)])
def test_attention_lowers_for_cuda(dtype, B, N, K, H, slots):
    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache = shape(B, K, slots, H, dtype=dtype)
    arrays = (shape(B, N, H, dtype=dtype), cache, cache)
    plan = (shape(32, B, K, 432), shape(B, 32, K), shape(B), shape(B))

    def shared(q, keys, values, lists, source, lengths, start):
        return pallas_attention.sparse_decode(
            q, keys, values, lists, source, 3, lengths, start, num_sinks=16, max_recent=64
        )

    # Split lists are merged by a second kernel.
    splits = attention_tiles(H, jnp.dtype(dtype).itemsize, B * K, 512).splits
    assert count_kernels(lower_for_cuda(shared, *arrays, *plan)) == (1 if splits == 1 else 2)
    assert count_kernels(lower_for_cuda(pallas_attention.dense_decode, *arrays, shape(B))) >= 1


@pytest.mark.parametrize(
    ("B", "N", "K", "slots", "kernels"),
    [(16, 32, 32, 4096, 1), (8, 32, 8, 4096, 1), (1, 32, 32, 131_072, 2), (1, 32, 8, 131_072, 3)],
)
def test_selection_lowers_for_cuda_in_few_kernels(B, N, K, slots, kernels):
    def shape(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def choose(lists, *arrays):
        return pallas_selection.select_labels(lists, 3, *arrays)

    arrays = (shape(32, B, K, 432), shape(B, N, 32, dtype=jnp.float32), shape(B, K, 16, slots, dtype=jnp.uint8))
    arrays += (
        shape(B, K, 2, slots, dtype=jnp.bfloat16),
        shape(B, 32, K),
        shape(B, dtype=bool),
        shape(B),
        shape(B),
        shape(B),
    )
    assert count_kernels(lower_for_cuda(choose, *arrays)) == kernels


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("refresh", [True, False, None])
def test_a_step_lowers_for_cuda_with_kernels_and_without_a_conditional(refresh):
    model = ModelConfig(
        vocab_size=64, width=128, mlp_width=128, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=64,
        max_positions=4096, windows=(None,) * 3, rope=RopeConfig(theta=100.0),
    )  # fmt: skip
    state = jax.eval_shape(lambda: init_state(model, 16, 4096, method=HShareSettings(min_length=300)))
    step = functools.partial(decode_step, config=model, refresh=refresh, impl="pallas")
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    text = lower_for_cuda(lambda *arrays: step(*arrays), parameter_shapes(model), tokens, state)
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
