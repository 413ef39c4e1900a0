"""The program of a decode step is traced once for all prompts and plans, and updates its buffers in place."""

import dataclasses
import importlib
import re
from fractions import Fraction

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from program_text import compile_for_users, count_copies
from tiny_decoder import CAPACITY, MODEL, SHARED_KV, TAILED, params, prefill_rows, random_rows, vary

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import api
from hshare_jax.methods.hshare.share_plan import SharePlan, kv_layer_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists

# For tests that only look at the program: two layers, both sparse. Groups have 4 heads, so that no other array has the
# shape of a buffer.
SHALLOW = dataclasses.replace(MODEL, num_layers=2, num_heads=12, windows=(None,) * 2)
# The same, but layer 1 looks up at the keys and values of layer 2, so it reads a buffer that a later layer writes.
LOOKS_UP = dataclasses.replace(SHALLOW, num_layers=3, windows=(None,) * 3, kv_layer_map=(0, 2, 2))
STEP = vary(TAILED, dense_layers=0)
VARIANTS = {
    "dense": (None, False),
    "refresh": (STEP, True),
    "reuse": (STEP, False),
    "by age": (STEP, None),
    "no tail": (vary(STEP, tail=None), True),
    "8 bits": (vary(STEP, label_bits=8), True),
    "not quantised": (vary(STEP, label_bits=None), True),
    "dense layer, gate": (vary(TAILED, min_length=30), None),
}
variants = pytest.mark.parametrize(("method", "refresh"), VARIANTS.values(), ids=VARIANTS)


def random_state(rng, lengths, method):
    """A state of the shallow model as after some prompts, with random keys, values, labels, lists and plan."""
    state = init_state(SHALLOW, len(lengths), CAPACITY, method=method)

    def fill(arrays):
        def random(array):
            is_code = array.dtype == jnp.uint8
            values = rng.integers(0, 256, array.shape) if is_code else rng.standard_normal(array.shape)
            return jnp.asarray(values, array.dtype)

        return jax.tree.map(random, arrays)

    cache, shared = state.cache, state.method_state
    cache = dataclasses.replace(
        cache, keys=fill(cache.keys), values=fill(cache.values), lengths=jnp.asarray(lengths, jnp.int32)
    )
    if isinstance(shared, SharedLists):
        plan = np.asarray(shared.source).copy()
        plan[rng.integers(len(lengths)), 1] = plan[0, 0, rng.integers(3)]
        lists = np.sort(rng.integers(2, min(lengths), shared.token_indices.shape), axis=-1)
        shared = dataclasses.replace(
            shared, labels=fill(shared.labels), source=jnp.asarray(plan), token_indices=jnp.asarray(lists, jnp.int32)
        )
    return DecodeState(cache, shared)


@variants
def test_one_trace_serves_every_prompt_plan_and_length(monkeypatch, method, refresh):
    traces, compiled = [], []
    module = importlib.import_module("hshare_jax.decode_step")  # the package's attribute of this name is the function
    make = module.decode_attend
    monkeypatch.setattr(module, "decode_attend", lambda *args: traces.append(args) or make(*args))
    rng = np.random.default_rng(13)
    for lengths in ([3, 60], [20, 20], [41, 9]):
        state = random_state(rng, lengths, method)
        tokens = jnp.asarray(rng.integers(0, MODEL.vocab_size, (17, 2)), jnp.int32)
        with Compilations() as compilations:
            for token in list(tokens):
                logits, state = decode_step(params(SHALLOW), token, state, config=SHALLOW, refresh=refresh)
                assert np.isfinite(logits).all()
        compiled.append(compilations.count)
    assert len(traces) == 1
    assert compiled[1:] == [0, 0]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("impl", ["reference", "interpret"])
def test_a_step_does_not_know_how_its_plan_was_found(impl):
    found = {"layer_ratio": Fraction(1, 4), "head_ratio": Fraction(1, 3), "num_probes": "all"}
    other = vary(STEP, **found, plan_kind="published", plan_scope="batch")
    programs, structures = set(), set()
    for method in (STEP, other):
        state, tokens = init_state(SHALLOW, 2, CAPACITY, method=method), jnp.zeros((2,), jnp.int32)
        text = str(decode_step.trace(params(SHALLOW), tokens, state, config=SHALLOW, impl=impl).jaxpr)
        programs.add(re.sub(r"(select_n False:bool\[\]) \d+", r"\1", text))  # checkify numbers its checks
        structures.add(jax.tree.structure(state))
    assert len(programs) == len(structures) == 1


def large_buffers(state: DecodeState) -> list[jax.Array]:
    shared = state.method_state
    lists = [*jax.tree.leaves(shared.labels), shared.token_indices] if isinstance(shared, SharedLists) else []
    return [*jax.tree.leaves((state.cache.keys, state.cache.values)), *lists]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "batch", "kv_cache_dtype"),
    [(SHALLOW, 1, "auto"), (SHALLOW, 3, "auto"), (LOOKS_UP, 3, "auto"), (LOOKS_UP, 3, "int8")],
)
@variants
def test_a_compiled_step_updates_its_buffers_in_place(method, refresh, config, batch, kv_cache_dtype):
    state = init_state(config, batch, CAPACITY, method=method, kv_cache_dtype=kv_cache_dtype)
    tokens = jnp.zeros((batch,), jnp.int32)
    compiled = compile_for_users(decode_step.lower(params(config), tokens, state, config=config, refresh=refresh))
    text = compiled.as_text()
    assert text is not None
    assert count_copies(text, large_buffers(state)) == 0
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in large_buffers(state))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.skipif(not api.describe("auto").startswith("native"), reason="needs the library of CPU kernels")
@pytest.mark.parametrize(("method", "labels"), [(None, 0), (STEP, 2), (vary(STEP, label_bits=None), 2)])
def test_a_native_step_appends_by_one_call_for_keys_and_values_and_one_for_labels(method, labels):
    state, tokens = init_state(SHALLOW, 2, CAPACITY, method=method), jnp.zeros((2,), jnp.int32)
    text = compile_for_users(decode_step.lower(params(SHALLOW), tokens, state, config=SHALLOW)).as_text()
    assert text is not None
    calls = [text.count(f'custom_call_target="hshare_append_{what}"') for what in ("tokens", "labels")]
    assert calls == [2, labels]
    assert " scatter(" not in text


@pytest.mark.usefixtures("unchecked")
def test_copies_are_seen_where_nothing_is_donated():
    state, tokens = init_state(SHALLOW, 1, CAPACITY, method=STEP), jnp.zeros((1,), jnp.int32)
    step = jax.jit(lambda params, tokens, state: decode_step(params, tokens, state, config=SHALLOW, refresh=True))
    text = compile_for_users(step.lower(params(SHALLOW), tokens, state)).as_text()
    assert text is not None
    assert count_copies(text, large_buffers(state)) == len(large_buffers(state))


@pytest.mark.usefixtures("unchecked")
@variants
def test_a_step_lowers_for_cuda_with_its_state_donated(method, refresh):
    state, tokens = init_state(SHALLOW, 2, CAPACITY, method=method), jnp.zeros((2,), jnp.int32)
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 1, "cuda"))
    with use_abstract_mesh(mesh):
        traced = decode_step.trace(params(SHALLOW), tokens, state, config=SHALLOW, refresh=refresh)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    donated = len(re.findall(r"tf\.aliasing_output|jax\.buffer_donor", text))
    assert donated >= len(large_buffers(state))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("config", "plan", "selections"),
    [
        (MODEL, None, 3),
        (MODEL, SharePlan(((0, 1, 2), (3, 4, 3), (4, 3, 3), (3, 4, 4))), 1),
        (MODEL, SharePlan(((0, 1, 2), (3, 4, 5), (3, 4, 8), (3, 4, 5))), 2),
        (MODEL, kv_layer_plan(MODEL, TAILED.settings), 3),
        (SHARED_KV, kv_layer_plan(SHARED_KV, TAILED.settings), 1),
    ],
    ids=["data", "one layer owns", "two layers own", "own keys and values", "one cache, one list"],
)
def test_layers_that_copy_by_a_constant_plan_choose_nothing_in_the_program(config, plan, selections):
    method = dataclasses.replace(TAILED, plan=plan)
    state, tokens = init_state(config, 1, CAPACITY, method=method), jnp.zeros((1,), jnp.int32)
    calls = {"reference": r"call @choose_tokens(_\d+)?\(", "native": r"custom_call @hshare_select\("}
    for impl in {"reference", api.describe("auto").split()[0]}:
        step = decode_step.lower(params(config), tokens, state, config=config, refresh=True, impl=impl)
        assert len(re.findall(calls[impl], step.as_text())) == selections


def test_the_donated_state_is_gone():
    rows = random_rows(17)
    _, state = prefill_rows(rows, method=TAILED)
    decode_step(params(), jnp.zeros((len(rows),), jnp.int32), state, config=MODEL)
    assert all(array.is_deleted() for array in large_buffers(state))
