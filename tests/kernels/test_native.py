"""The library of CPU kernels: where it may read, what it does not depend on, and what happens without it.

That it computes the right numbers is in test_implementations.py, beside the other implementations.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_oracle import definition, random_nibbles
from hypothesis import given, settings
from hypothesis import strategies as st

from hshare_jax.errors import SettingError
from hshare_jax.kernels import api, native_library, native_prefill, reference_prefill
from hshare_jax.kernels.implementations import IMPLEMENTATIONS
from hshare_jax.kernels.int8_rows import quantise_rows
from hshare_jax.kernels.labels import make_labels, score_labels
from hshare_jax.kernels.native_library import call_library, change_in_place
from hshare_jax.kernels.tail import Tail
from hshare_jax.shapes import EMPTY

needs_library = pytest.mark.skipif(
    native_library.obstacle() is not None, reason=f"the library of CPU kernels {native_library.obstacle()}"
)
needs_amx = pytest.mark.skipif(
    native_library.obstacle() is not None or native_library.instructions() != "amx", reason="the CPU has no AMX"
)
FEW = settings(max_examples=10)  # each compiles; HYPOTHESIS_PROFILE does not change it
B, N, K, S, H, C = 2, 6, 2, 96, 24, 11


def case(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    q, keys, values = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, N, H), (B, K, S, H), (B, K, S, H))
    )
    lists = np.sort(rng.permuted(np.tile(np.arange(4, 60), (2, B, K, 1)), axis=-1)[..., :C], axis=-1)
    source = np.tile(np.arange(2 * K).reshape(1, 2, K), (B, 1, 1))
    return q, keys, values, jnp.asarray(lists, jnp.int32), jnp.asarray(source, jnp.int32)


def decode(q, keys, values, lists, source, lengths: Any, starts: Any, impl="native"):
    lengths, starts = jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32)
    return api.sparse_decode(q, keys, values, lists, source, 1, lengths, starts, num_sinks=4, max_recent=9, impl=impl)


# --- memory


@needs_library
def test_lists_plans_and_lengths_that_point_outside_read_nothing():
    q, keys, values, lists, source = case()
    sound = np.asarray(decode(q, keys, values, lists, source, [80, 70], [75, 65]))
    wild = np.array(lists)
    wild[:, :, :, 3], wild[:, :, :, 7] = S + 10**6, -(10**6)
    without = np.array(lists)
    without[:, :, :, 3] = without[:, :, :, 7] = EMPTY
    rows = [80, 70], [75, 65]
    found, expected = (np.asarray(decode(q, keys, values, jnp.asarray(x), source, *rows)) for x in (wild, without))
    np.testing.assert_array_equal(found, expected)
    assert (np.abs(found - sound) > 1e-4).any()
    # A plan that points outside reads no list; sinks and recent tokens are read.
    lost = np.asarray(decode(q, keys, values, lists, jnp.full_like(source, 10**9), [80, 70], [75, 65]))
    none = np.asarray(decode(q, keys, values, jnp.full_like(lists, EMPTY), source, [80, 70], [75, 65]))
    np.testing.assert_array_equal(lost, none)
    split = functools.partial(api.split_decode, q, keys, values, num_sinks=4, impl="native")
    rows = jnp.asarray([80, 70]), jnp.asarray([75, 65])
    for part, same in zip(split(jnp.asarray(wild[1]), *rows), split(jnp.asarray(without[1]), *rows), strict=True):
        np.testing.assert_array_equal(part.out, same.out)
    for lengths, starts in (([10**9, -5], [10**9, -(10**9)]), ([-(2**31), 2**31 - 1], [0, -(2**31)])):
        read, left = split(lists[1], jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32))
        assert np.isfinite(read.out).all()
        assert np.isfinite(left.out).all()
        assert np.isfinite(decode(q, keys, values, lists, source, lengths, starts)).all()
        assert np.isfinite(api.dense_decode(q, keys, values, jnp.asarray(lengths, jnp.int32), impl="native")).all()


@needs_library
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_slots_that_are_not_read_may_hold_anything(junk):
    q, keys, values, lists, source = case(1)
    lengths, starts = [70, 50], [65, 45]
    is_read = np.zeros((B, S), bool)
    for b in range(B):
        is_read[b, :4] = is_read[b, starts[b] : lengths[b]] = True
        is_read[b, np.asarray(lists[1, b]).ravel()] = True
    masked = [jnp.where(is_read[:, None, :, None], x, junk) for x in (keys, values)]
    found = decode(q, masked[0], masked[1], lists, source, lengths, starts)
    expected = decode(q, keys, values, lists, source, lengths, starts)
    np.testing.assert_array_equal(found, expected)
    half = [jnp.where(np.arange(S)[None, None, :, None] < 40, x, junk) for x in (keys, values)]
    got = api.dense_decode(q, half[0], half[1], jnp.asarray([40, 0], jnp.int32), impl="native")
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[1], 0)


@needs_library
def test_a_nan_that_is_read_is_not_hidden():
    q, keys, values, lists, source = case(2)
    broken = keys.at[0, 0, 2, 5].set(jnp.nan)
    found = np.asarray(decode(q, broken, values, lists, source, [80, 70], [75, 65]))
    assert np.isnan(found[0, : N // K]).all()
    assert np.isfinite(found[0, N // K :]).all()
    assert np.isfinite(found[1]).all()


@needs_library
def test_ranges_without_a_slot_and_beyond_the_cache_are_read_as_the_definition_reads_them():
    q, keys, values, lists, source = case(3)
    for num_sinks, max_recent in ((-1000, 9), (4, -7), (2**62, 9)):
        found = api.sparse_decode(
            q, keys, values, lists, source, 1, jnp.asarray([80, 70]), jnp.asarray([75, 65]),
            num_sinks=num_sinks, max_recent=max_recent, impl="native",
        )  # fmt: skip
        assert np.isfinite(found).all()
    np.testing.assert_array_equal(api.project(jnp.ones((5, 64)), jnp.ones((0, 64)), impl="native"), np.zeros((0, 5)))


@needs_library
def test_a_head_that_reads_nothing_has_the_value_of_its_tail():
    q, keys, values, lists, source = case(4)
    terms = jnp.zeros((B, N, 6)).at[..., 3].set(-1).at[..., 4].set(1)
    tail = Tail(jnp.ones((B, N, 1, H)), jnp.full((B, N, 1, H), 7.0), terms)
    found, expected = (
        api.sparse_decode(
            q, keys, values, jnp.full_like(lists, EMPTY), source, 1, jnp.asarray([5, 0]), jnp.asarray([5, 0]),
            num_sinks=0, max_recent=4, tail=tail, impl=impl,
        ) for impl in ("native", "reference")
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found[0], 7, atol=1e-6)


@needs_library
def test_arrays_that_do_not_fit_each_other_are_an_error():
    q, keys, values, *_ = case()
    with pytest.raises(jax.errors.JaxRuntimeError, match="hshare_jax: q must be"):
        jax.block_until_ready(
            call_library("dense_decode", q, q, keys, values[:, :, :5], jnp.zeros((B,), jnp.int32), window=np.int64(-1))
        )
    with pytest.raises(jax.errors.JaxRuntimeError, match="hshare_jax: x must be"):
        jax.block_until_ready(call_library("project", q[0], q[0], jnp.zeros((5, H + 1))))
    new, slots, channels = jnp.zeros((B, 1, K, H)), jnp.zeros((B, 1), jnp.int32), jnp.zeros((B, 1, K, 3), jnp.int32)
    for wrong in (new[:, :, :1], new[..., 1:], new.astype(jnp.bfloat16)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="hshare_jax: new tokens must be"):
            jax.block_until_ready(change_in_place("append_tokens", keys, values, new, wrong, slots, changed=(0, 1)))
    codes, scales = jnp.zeros((B, K, 3, S), jnp.uint8), jnp.zeros((B, K, 2, S))
    for bits, layer, wrong, message in (
        (4, 0, scales, "fit"),
        (8, 1, scales, "fit"),
        (8, 0, scales[..., 1:], "scales"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"hshare_jax: .*{message}"):
            jax.block_until_ready(
                change_in_place(
                    "append_labels", codes, new, channels, slots, wrong, changed=(0, 4),
                    layer=np.int64(layer), bits=np.int64(bits),
                )
            )  # fmt: skip


@needs_library
def test_label_channels_that_point_outside_read_nothing():
    k, slots = jnp.ones((B, 1, K, H)), jnp.full((B, 1), 3, jnp.int32)
    channels = jnp.full((B, 1, K, 4), 10**9).at[1].set(-(10**9))
    labels = make_labels(jnp.ones((B, K, S, H)), jnp.zeros_like(channels[:, 0]), None)
    found = api.append_labels(labels, 0, k, channels, slots, bits=None, impl="native")
    assert np.isnan(found.codes[..., 3]).all()


@needs_library
def test_lists_are_chosen_in_place():
    q, keys, _, lists, source = case()
    ends = jnp.zeros((B,), jnp.int32) + 4, jnp.zeros((B,), jnp.int32) + 60
    select = functools.partial(api.select_by_keys, impl="native")
    how: Any = (q, keys, source, jnp.ones(B, bool), *ends, None)

    def choose(lists):
        for layer in range(2):
            lists = select(lists, layer, *how)
        return lists

    text = jax.jit(choose, donate_argnums=0).lower(lists).compile().as_text()
    assert text is not None
    assert text.count("hshare_select") >= 2
    assert " copy(" not in text


# --- what the result does not depend on

PRINT = """
import json, sys
sys.path[:0] = {folders!r}
import numpy as np, jax.numpy as jnp
from test_native import case, decode
from hshare_jax.kernels import api
from hshare_jax.kernels.block_weights import BlockWeights
from hshare_jax.kernels.int8_rows import quantise_rows
q, keys, values, lists, source = case()
outs = [decode(q, keys, values, lists, source, [80, 70], [75, 65])]
rng = np.random.default_rng(0)
long = [jnp.asarray(rng.standard_normal((1, 1, 3000, 16)), jnp.float32) for _ in range(2)]
outs.append(api.dense_decode(jnp.ones((1, 4, 16)), *long, jnp.asarray([2999]), impl="native"))
outs.append(api.project(jnp.asarray(rng.standard_normal((300, 64)), jnp.float32), jnp.ones((3, 64)), impl="native"))
for kind in "48":
    codes = rng.integers(0, 127, (40, 32 if kind == "4" else 64)).astype("uint8" if kind == "4" else "int8")
    blocks = BlockWeights(jnp.asarray(codes), *(jnp.asarray(rng.random((40, 2)) / 99, jnp.float16) for _ in "ab"))
    outs += [api.project(blocks, jnp.ones((rows, 64)), impl="native") for rows in (1, 8, 200)]
outs.append(api.project(jnp.asarray(rng.standard_normal((50, 70)), jnp.float32), jnp.ones((100, 70)), impl="native"))
queries = jnp.asarray(rng.standard_normal((1, 300, 4, 16)), jnp.float32)
long = [jnp.pad(rows, ((0, 0), (0, 0), (0, 72), (0, 0))) for rows in long]
outs.append(api.prefill_attention(queries, *long, jnp.asarray([2500]), impl="native"))
ends = jnp.full((2,), 4), jnp.full((2,), 77), None
bits = quantise_rows(keys), quantise_rows(values)
outs.append(decode(q, *bits, lists, source, [80, 70], [75, 65]))
for of_keys in (keys, bits[0]):
    outs.append(api.select_by_keys(lists, 1, q, of_keys, source, jnp.ones(2, bool), *ends, impl="native"))
print(json.dumps(np.concatenate([np.asarray(out, float).ravel() for out in outs]).tolist()))
"""


def results(**environment: str) -> list[float]:
    """What the program above prints in a process with these variables."""
    folder = Path(__file__).parent
    program = PRINT.format(folders=[str(folder), str(folder.parent / "support")])
    done = subprocess.run(
        [sys.executable, "-c", program], text=True, capture_output=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone() -> list[float]:
    """The results of one thread."""
    return results(PJRT_NPROC="1", NPROC="1")


@needs_library
@pytest.mark.parametrize("threads", ["2", "7"])
def test_results_do_not_depend_on_the_number_of_threads(alone, threads):
    assert results(PJRT_NPROC=threads, NPROC=threads) == alone


@needs_library
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "any"])
def test_other_instructions_compute_the_same_within_rounding(alone, instructions):
    np.testing.assert_allclose(results(HSHARE_JAX_INSTRUCTIONS=instructions), alone, atol=2e-5, rtol=0)


@needs_amx
def test_a_prefill_of_nan_leaves_nothing_for_the_next_one():
    rng = np.random.default_rng(0)
    q, keys, values = (jnp.asarray(rng.standard_normal((1, size, 256, 8)), jnp.float32) for size in (4, 2, 2))
    read = functools.partial(api.prefill_attention, q.swapaxes(1, 2)[:, :40], impl="native")
    expected = np.asarray(read(keys, values, jnp.asarray([0])))
    assert np.isnan(read(keys * jnp.nan, values * jnp.nan, jnp.asarray([200]))).all()
    np.testing.assert_array_equal(read(keys, values, jnp.asarray([0])), expected)


@needs_library
def test_two_threads_may_decode_at_once():
    cases = [case(seed) for seed in range(4)]
    step = jax.jit(lambda q, keys, values, lists, source: decode(q, keys, values, lists, source, [80, 70], [75, 65]))
    expected = [np.asarray(step(*arrays)) for arrays in cases]
    wrong = []

    def work(index):
        for _ in range(50):
            if not np.array_equal(step(*cases[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- any shape


@needs_library
@FEW
@given(
    heads=st.sampled_from([(1, 1), (3, 1), (5, 1), (7, 7), (6, 2), (9, 3)]), H=st.integers(1, 40),
    S=st.integers(1, 2500), window=st.none() | st.integers(1, 50),  # up to three pieces of a range, five of a list
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]), data=st.data(),
)  # fmt: skip
def test_dense_attention_of_any_shape_equals_the_definition(heads, H, S, window, dtype, data):
    (N, K), rng = heads, np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(rng.standard_normal(shape), "float32" if dtype == "int8" else dtype)
        for shape in ((2, N, H), (2, K, S, H), (2, K, S, H))
    )
    if dtype == "int8":
        keys, values = quantise_rows(keys), quantise_rows(values)
    atol = 1e-5 if q.dtype == "float32" else 3e-2
    lengths = jnp.asarray([data.draw(st.integers(0, S)), S], jnp.int32)
    found, expected = (
        np.asarray(api.dense_decode(q, keys, values, lengths, window=window, impl=impl), np.float32)
        for impl in ("native", "reference")
    )
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
    slots = jnp.arange(S)[None, :]
    lists = jnp.broadcast_to(jnp.where(slots < lengths[:, None], slots, EMPTY)[None, :, None], (1, 2, K, S))
    plan = jnp.broadcast_to(jnp.arange(K), (2, 1, K)), 0
    listed = api.sparse_decode(
        q, keys, values, lists, *plan, lengths, lengths, num_sinks=0, max_recent=0, window=window, impl="native"
    )
    np.testing.assert_allclose(np.asarray(listed, np.float32), found, atol=atol, rtol=0)


@needs_library
@FEW
@given(
    heads=st.sampled_from([(4, 4, 4), (6, 2, 2), (6, 2, 6), (5, 1, 1)]), R=st.integers(1, 19), S=st.integers(1, 300),
    bits=st.sampled_from([None, 4, 8]), dilate=st.booleans(), data=st.data(),
)  # fmt: skip
def test_lists_of_any_shape_weigh_as_much_as_those_of_the_definition(heads, R, S, bits, dilate, data):
    from hshare_jax.kernels.choose_tokens import weigh_tokens

    (N, K, J), rng = heads, np.random.default_rng(0)
    keys = jnp.asarray(rng.standard_normal((1, K, S, R)), jnp.float32)
    labels = make_labels(keys, jnp.tile(jnp.arange(R), (1, K, 1)), bits)
    query = jnp.asarray(rng.standard_normal((1, N, R)), jnp.float32)
    first, last = sorted((data.draw(st.integers(0, S)), data.draw(st.integers(0, S + 5))))
    ends = jnp.asarray([first], jnp.int32), jnp.asarray([last], jnp.int32)
    allowed = data.draw(st.none() | st.integers(-1, 20))
    source = jnp.arange(J, dtype=jnp.int32).reshape(1, 1, J)
    lists = api.select_by_labels(
        jnp.zeros((1, 1, J, 9), jnp.int32), 0, query, labels, source, jnp.ones(1, bool), *ends,
        None if allowed is None else jnp.asarray([allowed], jnp.int32), dilate=dilate, impl="native",
    )  # fmt: skip
    count = min(max(9 if allowed is None else min(allowed, 9), 0), max(min(last, S) - first, 0))
    weights = np.asarray(weigh_tokens(score_labels(query, labels), *ends, num_lists=J, dilate=dilate))[0]
    for j, listed in enumerate(np.asarray(lists)[0, 0]):
        assert (listed[count:] == EMPTY).all()
        chosen = listed[:count]
        assert (np.diff(chosen) > 0).all()
        assert ((chosen >= first) & (chosen < min(last, S))).all()
        best = np.sort(weights[j, first : min(last, S)])[::-1][:count]
        np.testing.assert_allclose(np.sort(weights[j, chosen])[::-1], best, rtol=1e-4, atol=1e-6)


@needs_library
@FEW
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20)), S=st.integers(1, 50),
    bits=st.sampled_from([None, 4, 8]), dtype=st.sampled_from(["float32", "bfloat16", "float16"]), data=st.data(),
)  # fmt: skip
def test_what_is_appended_in_any_shape_equals_the_definition(sizes, S, bits, dtype, data):
    (rows, T, heads, size), rng = sizes, np.random.default_rng(0)
    keys, k = (
        jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((rows, heads, S, size), (rows, T, heads, size))
    )
    channels = rng.permuted(np.tile(np.arange(size), (rows, 2, heads, 1)), axis=-1)
    channels = jnp.asarray(channels[..., : data.draw(st.integers(1, size))])
    row = st.lists(st.integers(-3, S + 3) | st.sampled_from([2**31 - 1, -(2**31)]), min_size=T, max_size=T, unique=True)
    slots = jnp.asarray(data.draw(st.lists(row, min_size=rows, max_size=rows)), jnp.int32)
    labels = make_labels(keys, channels[:, 1], bits)
    found, expected = (
        (
            api.append_tokens(keys, keys + 1, k, 2 * k, slots, impl=impl),
            api.append_labels(labels, 1, k, channels, slots, bits=bits, impl=impl),
        )
        for impl in ("native", "reference")
    )
    for ours, defined in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, defined)


@needs_library
@FEW
@given(
    rows=st.integers(1, 80), out=st.integers(1, 70), blocks=st.integers(1, 20), kind=st.sampled_from(["4", "8", "f"])
)
def test_projections_of_any_shape_equal_the_definition(rows, out, blocks, kind):
    rng = np.random.default_rng(0)
    if kind == "f":
        weight = jnp.asarray(rng.standard_normal((out, 7 * blocks)), jnp.float32)
    else:
        weight = random_nibbles(rng, out, 32 * blocks)
        if kind == "8":
            codes = rng.integers(-128, 128, (out, 32 * blocks), np.int8)
            weight = type(weight)(codes, weight.scale, None)
        weight = jax.tree.map(jnp.asarray, weight)
    x = jnp.asarray(rng.standard_normal((rows, weight.shape[1])), jnp.float32)
    found, expected = (np.asarray(api.project(weight, x, impl=impl)) for impl in ("native", "reference"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@needs_amx
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["floats", "4 bits", "8 bits"])
def test_projections_of_many_rows_in_several_panels_equal_the_definition(kind, dtype):
    rng, out, D = np.random.default_rng(0), 600, 650 if kind == "floats" else 640
    if kind == "floats":
        weight = jnp.asarray(rng.standard_normal((out, D)), dtype)
        floats = np.asarray(weight, np.float64)
    else:
        blocks = random_nibbles(rng, out, D, dtype)
        if kind == "8 bits":
            blocks = dataclasses.replace(blocks, qvalue=rng.integers(-128, 128, (out, D), np.int8))
        weight, floats = jax.tree.map(jnp.asarray, blocks), definition(blocks).astype(np.float64)
    x = jnp.asarray(rng.standard_normal((530, D)), dtype)
    expected = np.asarray(x, np.float64) @ floats.T
    atol = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(api.project(weight, x, impl="native"), np.float64), expected, rtol=0, atol=atol
    )


@needs_amx
def test_projections_of_no_channels_are_zeros():
    found = api.project(jnp.zeros((5, 0)), jnp.zeros((40, 0)), impl="native")
    np.testing.assert_array_equal(found, np.zeros((40, 5)))


@needs_amx
@FEW
@given(
    heads=st.sampled_from([(1, 1), (3, 1), (7, 7), (6, 2), (9, 3)]), H=st.integers(1, 100), T=st.integers(1, 150),
    S=st.sampled_from([128, 512]), window=st.none() | st.integers(1, 300),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8"]), data=st.data(),
)  # fmt: skip
def test_prefill_attention_of_any_shape_equals_the_definition(heads, H, T, S, window, dtype, data):
    (N, K), rng = heads, np.random.default_rng(0)
    starts = np.array([data.draw(st.integers(-1, S)), max(0, S - T)], np.int32)
    q, keys, values = (
        jnp.asarray(rng.standard_normal(shape), "float32" if dtype == "int8" else dtype)
        for shape in ((2, T, N, H), (2, K, S, H), (2, K, S, H))
    )
    if dtype == "int8":
        keys, values = quantise_rows(keys), quantise_rows(values)
    (found, log_total), expected = (
        module.prefill_attention(q, keys, values, jnp.asarray(starts), window=window)
        for module in (native_prefill, reference_prefill)
    )
    positions = starts[:, None] + np.arange(T)
    means = (positions >= 0) & (positions < S)
    atol = 1e-5 if q.dtype == "float32" else 3e-2
    np.testing.assert_allclose(*(np.asarray(out, np.float32)[means] for out in (found, expected[0])), atol=atol, rtol=0)
    sums = (np.asarray(out).swapaxes(1, 2)[means] for out in (log_total, expected[1]))
    np.testing.assert_allclose(*sums, atol=atol, rtol=1e-6)
    assert np.isfinite(np.asarray(found, np.float32)).all()


# --- without the library


@pytest.fixture
def absent(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library, "PATH", tmp_path / "nothing.so")
    native_library.obstacle.cache_clear()
    yield
    native_library.obstacle.cache_clear()


def test_instructions_that_are_none_keep_the_library_from_running(absent, monkeypatch):
    monkeypatch.setenv("HSHARE_JAX_INSTRUCTIONS", "avx-512")
    assert "is told HSHARE_JAX_INSTRUCTIONS=avx-512, which must be one of amx, avx512, avx2, any" in api.describe(
        "auto"
    )


def test_without_the_library_auto_takes_the_definition_and_says_why(absent):
    reason = "was not compiled when the package was installed (by gcc 11 or clang 14, or newer ones)"
    assert api.describe("auto") == f"reference (the library of native kernels {reason})"
    q, keys, values, *_ = case()
    lengths = jnp.asarray([40, 50], jnp.int32)
    found, expected = (api.dense_decode(q, keys, values, lengths, impl=impl) for impl in ("auto", "reference"))
    np.testing.assert_array_equal(found, expected)


def test_without_the_library_native_is_refused_with_the_way_out(absent):
    with pytest.raises(SettingError, match=r"impl='native' needs the library.*not compiled.*install a C\+\+17 comp"):
        api.check_impl("native")


def test_a_library_of_another_machine_is_told(absent, tmp_path):
    (tmp_path / "nothing.so").write_bytes(b"\x7fELF of another machine")
    assert "does not fit this machine" in api.describe("auto")


@needs_library
def test_the_library_is_what_auto_takes_on_a_cpu():
    assert api.describe("auto").startswith("native (")
    assert api.describe("reference") == "reference"
    assert IMPLEMENTATIONS["native"].platforms == ("cpu",)
