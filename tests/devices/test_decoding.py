"""Decoding on a mesh gives the logits of one device, whatever is divided; devices add up only what they must."""

import dataclasses
import functools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import Compilations
from meshes import mesh_of, on_mesh, random_model
from tiny_tokenizer import LETTERS, byte_tokenizer

import hshare_jax
from hshare_jax import (
    HShare,
    HShareSettings,
    PlanSearch,
    SettingError,
    SharedLists,
    SharePlan,
    decode_step,
    init_state,
    prefill,
)
from hshare_jax.decode_state import count_reads
from hshare_jax.evaluation.recall import Measured, measure_recall, recall_of
from hshare_jax.evaluation.teacher_forcing import token_agreement
from hshare_jax.evaluation.text_windows import Scorer, Window
from hshare_jax.kernels.int8_rows import KVCacheDType
from hshare_jax.mesh import put
from hshare_jax.methods.registry import method_named
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.weights import quantise

GROUPED = ModelConfig(
    vocab_size=64, width=32, mlp_width=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, max_positions=512,
    windows=(None,) * 2,
)  # fmt: skip
# A vocabulary that no mesh divides, biases, sliding windows, no groups, embeddings that are tied.
OTHER = dataclasses.replace(
    GROUPED, vocab_size=61, num_kv_heads=8, qkv_bias=True, out_bias=True, mlp_bias=True, windows=(24, None),
    tie_embeddings=True,
)  # fmt: skip
# Layer 1 looks up, in passes until nothing changes on any device.
SHARED_KV = dataclasses.replace(GROUPED, num_layers=3, windows=(None,) * 3, kv_layer_map=(0, 2, 2), forward_passes=None)
SETTINGS = HShareSettings(num_sinks=2, num_critical=16, num_recent=6, label_channels=4, min_length=0, dense_layers=0)
SEARCH = PlanSearch(num_probes=4)
TOKENS = np.random.default_rng(0).integers(0, 60, (8, 90)).astype(np.int32)
LENGTHS = np.array([90, 85, 33, 90, 71, 64, 65, 89], np.int32)
MESHES = [(1, 8), (2, 4), (8, 1), (4, 2)]


def head_for_head(config, num_lists):
    """The plan in which the last layer copies from the first, head for head."""
    source = np.arange(config.num_layers * num_lists).reshape(config.num_layers, num_lists)
    source[-1] = source[0]
    return SharePlan(tuple(map(tuple, source.tolist())))


def given_plan(config, **changes):
    """HShare with a plan that every mesh can follow."""
    settings = dataclasses.replace(SETTINGS, **changes)
    return HShare(settings, SEARCH, plan=head_for_head(config, settings.num_lists(config)))


def decode(model, method, *, steps=2, parts=((0, 60), (60, 90)), kv_cache_dtype: KVCacheDType = "auto"):
    """Logits after a prefill in parts and after each of some steps, what the last step read, and the last state."""
    config, mesh, found = model.config, model.mesh, []
    state = init_state(config, 8, 128, method=method, mesh=mesh, kv_cache_dtype=kv_cache_dtype)
    for start, end in parts:
        lengths = np.clip(LENGTHS, start + 1, end) - start
        args = put(TOKENS[:, start:end], "B T", mesh), put(lengths.astype(np.int32), "B", mesh)
        logits, state = prefill(model.params, *args, state, config=config, method=method)
        found.append(logits)
    state = measure_recall(state)
    for step in range(steps):
        token = put(np.arange(step, step + 8, dtype=np.int32), "B", mesh)
        logits, state = decode_step(model.params, token, state, config=config)
        found.append(logits)
    return np.array(found), np.array(count_reads(state, config)), np.array(recall_of(state, config)), state


def assert_equal(ours, theirs):
    for found, wanted in zip(ours[:3], theirs[:3], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@functools.cache
def on_one_device(config, method, parts=1):
    return decode(random_model(config, parts), method)


@pytest.mark.parametrize(
    ("shape", "method"), [*((shape, "dense") for shape in MESHES), ((1, 8), "hshare"), ((2, 4), "hshare")], ids=str
)
def test_a_mesh_of_any_shape_decodes_as_one_device_does(shape, method):
    # A mesh with more devices than kv heads repeats these, and so decodes as one device does with repeated heads.
    model = random_model(GROUPED, shape[1])
    chosen = None if method == "dense" else given_plan(model.config)
    theirs = on_one_device(GROUPED, chosen, 1 if method == "dense" else shape[1])
    ours = decode(on_mesh(model, mesh_of(*shape)), chosen)
    assert_equal(ours, theirs)
    keys = ours[-1].cache.keys[0]
    assert keys.sharding.shard_shape(keys.shape)[:2] == (8 // shape[0], max(4, shape[1]) // shape[1])


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (OTHER, given_plan(OTHER, label_bits=8, lists_per="query_head", tail_rank=1)),
        (SHARED_KV, given_plan(SHARED_KV, scoring="exact")),
        (GROUPED, given_plan(GROUPED, pool=2, refresh_interval=3, label_bits=None)),
    ],
    ids=["windows, biases, odd vocabulary", "keys and values shared", "pools"],
)
def test_models_and_settings_of_all_kinds_decode_as_on_one_device(config, method):
    assert_equal(decode(on_mesh(random_model(config), mesh_of(2, 4)), method), on_one_device(config, method))


@pytest.mark.parametrize("name", ["double_sparsity", "quest", "h2o", "snapkv"])
def test_other_methods_with_memories_of_their_own_decode_as_on_one_device(name):
    method = method_named(name, HShare(SETTINGS, SEARCH), max_new_tokens=8)
    assert_equal(decode(on_mesh(random_model(GROUPED), mesh_of(2, 4)), method), on_one_device(GROUPED, method))


@pytest.mark.parametrize("quantize", ["int8", "int8-channel"])
def test_weights_in_few_bits_are_divided_too(quantize):
    config = dataclasses.replace(GROUPED, head_dim=16, mlp_width=128)
    model = random_model(config)
    params = jax.tree.map(
        lambda leaf: jax.tree.map(jnp.asarray, quantise(np.asarray(leaf), leaf.dtype, quantize)), model.params
    )
    model = dataclasses.replace(model, params=params)
    assert_equal(decode(on_mesh(model, mesh_of(2, 4)), None), decode(model, None))


def test_caches_in_8_bits_are_divided_too():
    method, mesh = given_plan(GROUPED, tail="fitted"), mesh_of(2, 4)
    model = random_model(GROUPED)
    ours, theirs = (decode(each, method, kv_cache_dtype="int8") for each in (on_mesh(model, mesh), model))
    for found, wanted in zip(ours[:3], theirs[:3], strict=True):  # a key that is rounded the other way changes 1e-3
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01)
    keys = ours[-1].cache.keys[0]
    assert keys.qvalue.sharding.shard_shape(keys.qvalue.shape) == (4, 1, 256, 8)
    assert keys.scale.sharding.shard_shape(keys.scale.shape) == (4, 1, 256)


def plans_of(model, method):
    """The plan of each row after a prefill and some steps."""
    measured = decode(model, method)[-1].method_state
    assert isinstance(measured, Measured)
    assert isinstance(measured.measured, SharedLists)
    return np.array(measured.measured.source)


def test_plans_that_are_found_keep_to_the_lists_of_a_device():
    model = random_model(GROUPED, 4)
    method = HShare(SETTINGS, dataclasses.replace(SEARCH, layer_ratio=Fraction(1), head_ratio=Fraction(1, 2)))
    found = plans_of(on_mesh(model, mesh_of(2, 4)), method)
    assert (found % 4 == np.arange(4)).all()  # each of 4 devices has one of 4 lists
    assert (found != np.arange(8).reshape(2, 4)).any()
    for row in found:
        SharePlan(tuple(map(tuple, row.tolist()))).check_parts(4)


def test_generation_and_agreement_are_those_of_one_device():
    prompts = [list(map(int, row[:length])) for row, length in zip(TOKENS, LENGTHS, strict=True)]
    method, model = given_plan(GROUPED), random_model(GROUPED)
    spread = on_mesh(model, mesh_of(2, 4))
    call = {"method": method, "max_new_tokens": 6}
    ours, theirs = (hshare_jax.generate(of, prompts, **call) for of in (spread, model))
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.usage.reads, theirs.usage.reads, rtol=1e-6)
    assert ours.usage.selections == theirs.usage.selections
    assert token_agreement(spread, prompts, ours.tokens, method=method) == token_agreement(
        model, prompts, ours.tokens, method=method
    )
    with Compilations() as compilations:
        hshare_jax.generate(spread, prompts, **call)
    assert compilations.count == 0


def test_the_harness_scores_and_answers_on_a_mesh_as_on_one_device():
    from lm_eval.api.instance import Instance

    from hshare_jax.evaluation.lm_eval_model import HShareLM

    tokenizer = byte_tokenizer(LETTERS)
    model = dataclasses.replace(random_model(GROUPED), tokenizer=tokenizer, eos_token_ids=(len(tokenizer) - 1,))
    arguments = {"num_sinks": 2, "num_critical": 16, "num_recent": 6, "sharing_ratio": "1-1-1", "batch_size": 2}
    asked = [Instance("generate_until", {}, (text, {"max_gen_toks": 4}), 0) for text in ("the rain " * 9, "in spain")]
    scored = [(None, tokenizer.encode("the rain " * 9), tokenizer.encode(text)) for text in ("in spain", "again")]
    ours, theirs = (HShareLM(on_mesh(model, mesh), **arguments) for mesh in (mesh_of(2, 4), None))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    scores = zip(ours._loglikelihood_tokens(scored), theirs._loglikelihood_tokens(scored), strict=True)
    for (found, is_best), (expected, is_best_too) in scores:
        assert is_best == is_best_too
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_windows_are_scored_on_a_mesh_as_on_one_device():
    model, method = random_model(GROUPED), given_plan(GROUPED)
    windows = [Window(str(row), tuple(TOKENS[row, :81].tolist())) for row in range(2)]
    scorers = (Scorer(on_mesh(model, mesh), windows, 6, [None, method]) for mesh in (mesh_of(2, 4), None))
    ours, theirs = (scorer.score(method, recall_every=2) for scorer in scorers)
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-5)


def test_a_calibration_on_a_mesh_finds_the_channels_of_one_device_and_a_plan_for_the_mesh():
    method = HShare(SETTINGS, dataclasses.replace(SEARCH, layer_ratio=Fraction(1, 2)))
    model, text = random_model(GROUPED), [TOKENS.reshape(-1)[:200].tolist()]
    ours = hshare_jax.calibrate(on_mesh(model, mesh_of(1, 4)), text, method=method)
    theirs = hshare_jax.calibrate(model, text, method=method)
    np.testing.assert_array_equal(ours.channels[..., :2], theirs.channels[..., :2])  # later ones may tie
    ours.plan.check_parts(4)
    assert not ours.plan.is_computed.all()


def _collectives(text):
    return re.findall(r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)


@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("method", [None, given_plan(GROUPED)], ids=["dense", "hshare"])
def test_a_layer_adds_up_twice_and_sparsity_asks_for_nothing(method, refresh):
    model = on_mesh(random_model(GROUPED), mesh_of(2, 4))
    state = init_state(GROUPED, 8, 128, method=method, mesh=model.mesh)
    token = put(np.zeros(8, np.int32), "B", model.mesh)
    step = decode_step.lower(model.params, token, state, config=GROUPED, refresh=refresh)
    found = _collectives(step.compile().as_text())
    # Beside two sums in each layer, the embedding is one sum, and the logits are gathered.
    assert sorted(found) == ["all-gather"] + ["all-reduce"] * (2 * GROUPED.num_layers + 1)


def pointers(array):
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def test_a_step_inside_a_callers_jit_updates_the_cache_in_place():
    model = on_mesh(random_model(GROUPED), mesh_of(2, 4))

    @functools.partial(jax.jit, donate_argnums=1)
    def twice(token, state):
        logits, state = decode_step(model.params, token, state, config=GROUPED)
        return decode_step(model.params, logits.argmax(axis=-1).astype(jnp.int32), state, config=GROUPED)

    state = init_state(GROUPED, 8, 128, method=given_plan(GROUPED), mesh=model.mesh)
    token = put(np.zeros(8, np.int32), "B", model.mesh)
    places = pointers(state.cache.keys[0])
    _, new = twice(token, state)
    assert pointers(new.cache.keys[0]) == places
    assert new.mesh == model.mesh
    np.testing.assert_array_equal(new.cache.lengths, 2)


def started(method):
    return init_state(GROUPED, 8, 128, method=method, mesh=mesh_of(2, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GROUPED.for_parts(3), r"model=3 devices cannot divide 4 kv heads, 8 query heads and an mlp of 64 "
         r"evenly; possible are 1, 2, 4, 8"),
        (lambda: init_state(GROUPED, 7, 128, mesh=mesh_of(2, 4)), "batch_size=7 rows cannot be divided evenly over 2"),
        (lambda: init_state(GROUPED, 8, 128, mesh=mesh_of(1, 8)), "model=8 devices need as many kv heads"),
        (lambda: mesh_of(3, 0), "model=0 must be at least 1"),
        (lambda: hshare_jax.make_mesh(3, 2), "data=3 and model=2 make 6 devices, and there are 8"),
        (
            lambda: started(HShare(SETTINGS, PlanSearch(plan_scope="batch"))),
            "plan_scope='batch' would find one plan for rows on 2 devices",
        ),
        (
            lambda: started(HShare(SETTINGS, plan=SharePlan(((0, 0, 2, 3), (4, 5, 6, 7))))),
            "the plan lets list 1 of layer 0 copy list 0 of layer 0, which another of 4 devices keeps",
        ),
    ],
    ids=["division", "rows", "kv heads", "none", "number", "scope", "plan"],
)  # fmt: skip
def test_what_a_mesh_cannot_do_is_refused_with_the_reason(call, message):
    with pytest.raises((SettingError, ValueError), match=message):
        call()
