"""Cross-layer KV sharing: the paper's patterns as literal maps, its notation, its costs, and weights against NumPy."""

import dataclasses
import json
import re
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparing import assert_equal_trees
from hypothesis import given
from hypothesis import strategies as st
from random_weights import random_params, random_tensor

from hshare_jax.errors import SettingError
from hshare_jax.files.checksums import write_checksums
from hshare_jax.kv_cache import init_cache
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import parameter_shapes, run_decoder
from hshare_jax.models.kv_sharing import (
    INITS,
    PATTERNS,
    TARGETS,
    SpecError,
    kv_layer_map,
    layer_passes,
    papers_prefill_cost,
    share_kv,
    share_weights,
    write_notation,
)
from hshare_jax.models.layers import qkv_rows
from hshare_jax.models.pretrained import Model, load_model, save_model

TINY = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
    windows=(None,) * 4, rope=RopeConfig(theta=100.0), qkv_bias=True,
)  # fmt: skip
QUERIES, KEYS = 32, 16  # rows


def layers(num_layers: int, **changes) -> ModelConfig:
    return dataclasses.replace(TINY, **{"num_layers": num_layers, "windows": (None,) * num_layers, **changes})


@pytest.mark.parametrize(
    ("pattern", "target", "expected"),
    [
        ("pizza", "bottom", "0_1_2_3_4_5_5_5_5_5_5_5"),
        ("pizza", "middle", "0_1_2_3_4_8_8_8_8_8_8_8"),
        ("pizza", "top", "0_1_2_3_4_11_11_11_11_11_11_11"),
        ("sandwich", "bottom", "0_1_2_3_3_3_3_3_3_3_10_11"),
        ("sandwich", "middle", "0_1_2_6_6_6_6_6_6_6_10_11"),
        ("sandwich", "top", "0_1_2_9_9_9_9_9_9_9_10_11"),
        ("lasagna", "bottom", "0_1_1_1_4_4_6_6_8_8_10_10"),
        ("lasagna", "middle", "0_2_2_2_5_5_7_7_9_9_11_11"),
        ("lasagna", "top", "0_3_3_3_5_5_7_7_9_9_11_11"),
    ],
)
def test_the_nine_patterns_of_12_layers_with_6_kv_layers(pattern, target, expected):
    assert "_".join(map(str, kv_layer_map(pattern, target, 12, 6))) == expected
    assert write_notation(share_kv(layers(12), f"{pattern}-{target}:6")) == expected


@pytest.mark.parametrize(
    ("num_layers", "spec", "expected"),
    [
        (22, "sandwich-middle:3", "_".join(["0", *["10"] * 20, "21"])),  # the paper's own example
        (8, "pizza-middle:3", "0_1_4_4_4_4_4_4"),  # between layers 4 and 5: the lower
        (8, "sandwich-middle:4", "0_1_4_4_4_4_4_7"),  # of three others two are first
        (5, "sandwich-middle:2", "0_2_2_2_2"),  # of one other none is last
        (7, "lasagna-middle:3", "0_2_2_2_5_5_5"),
        (6, "lasagna-middle:2", "0_3_3_3_3_3"),
        (9, "lasagna-middle:3", "0_3_3_3_3_7_7_7_7"),  # between layers 2 and 3: the upper
        (8, "lasagna-top:4", "0_3_3_3_5_5_7_7"),
        (5, "cla:1", "0_0_0_0_0"),
        (5, "pizza-bottom:1", "0_0_0_0_0"),
        (5, "sandwich-bottom:1", "0_0_0_0_0"),
        (5, "cla:3", "0_0_2_2_4"),
        (8, "cla:4", "0_0_2_2_4_4_6_6"),
        (5, "lasagna-bottom:3", "0_1_1_3_3"),
        (6, "lckv:1", "0_5_5_5_5_5"),
        (6, "lckv:2", "0_4_4_4_4_5"),
        (6, "yoco", "0s_1s_2s_3_3_3"),
        (7, "yoco:16", "0s_1s_2s_3_3_3_3"),
        (2, "yoco", "0s_1"),
        (4, "0_0_2_2", "0_0_2_2"),
    ],
)
def test_worked_examples(num_layers, spec, expected):
    assert write_notation(share_kv(layers(num_layers), spec)) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_number_of_kv_layers_is_that_number(pattern, target):
    for L in range(1, 16):
        for size in range(2 if target != "bottom" else 1, L + 1):
            found = kv_layer_map(pattern, target, L, size)
            users = Counter(found)
            assert len(users) == size
            assert all(found[layer] == layer for layer in users)
            assert found == tuple(sorted(found)), "groups are consecutive"
            sizes = [users[layer] for layer in sorted(users)]
            if pattern == "lasagna" and size > 1:
                assert sizes[0] == 1
                assert sizes[1:] == sorted(sizes[1:], reverse=True)
                assert max(sizes[1:]) - min(sizes[1:]) <= 1
            if pattern == "pizza":
                assert sizes[:-1] == [1] * (size - 1)
            if pattern == "sandwich":
                assert sizes[: size // 2] == [1] * (size // 2)
                assert sizes[size // 2 + 1 :] == [1] * ((size - 1) // 2)
            if size == L:
                assert found == tuple(range(L))


@pytest.mark.parametrize(
    ("spec", "window", "windows"),
    [
        ("yoco", None, (1024, 1024, None, None)),
        ("yoco:16", None, (16, 16, None, None)),
        ("yoco", 8, (8, 8, None, None)),
        ("yoco:8", 8, (8, 8, None, None)),
        ("0_1s_1s_0", 8, (None, 8, 8, None)),
        ("0_0_0_0", None, (None,) * 4),
    ],
)
def test_windows_belong_to_the_lower_half_or_to_entries_with_s(spec, window, windows):
    assert share_kv(layers(4), spec, window=window).windows == windows


def test_the_models_own_window_is_that_of_entries_with_s():
    config = layers(4, windows=(4, 8, None, 8))
    assert share_kv(config, "0s_0s_2_2s").windows == (4, 8, None, 8)
    assert share_kv(config, "0s_0s_2_2").windows == (4, 8, None, None)
    assert share_kv(config, "cla:2").windows == config.windows
    assert share_kv(layers(4, windows=(None, None, None, 8)), "0s_0s_2_2s").windows == (8, 8, None, 8)
    with pytest.raises(ValueError, match="2s of layer 2 attends within a window, and the model has the windows 4, 8"):
        share_kv(config, "0_0_2s_2")


@st.composite
def maps_and_windows(draw):
    """Draws (a map, whether each layer has a window). The test builds the ModelConfig: beartype draws numbers too."""
    num_layers = draw(st.integers(1, 12))
    own = sorted({0} | draw(st.sets(st.integers(0, num_layers - 1))))
    found = [layer if layer in own else draw(st.sampled_from(own)) for layer in range(num_layers)]
    return found, [draw(st.booleans()) for _ in found]


@given(case=maps_and_windows(), window=st.integers(2, 5))
def test_what_is_written_is_read_again(case, window):
    found, has_window = case
    plain = layers(len(found))
    windows = tuple(window if has else None for has in has_window)
    config = dataclasses.replace(plain, kv_layer_map=tuple(found), windows=windows)
    assert share_kv(plain, write_notation(config), window=window if any(windows) else None) == config
    assert share_kv(dataclasses.replace(plain, windows=windows), write_notation(config)) == config


@pytest.mark.parametrize(
    ("spec", "window", "message"),
    [
        (
            "burger-top:2",
            None,
            "no way of sharing is called so; known are ",
        ),
        ("sandwich-centre:2", None, "no way of sharing is called so"),
        ("sandwich:2", None, "no way of sharing is called so"),
        ("", None, "spec='': no way of sharing is called so"),
        ("0_0_2_", None, "no way of sharing is called so"),
        ("0_-1_2_2", None, "no way of sharing is called so"),
        ("sandwich-middle", None, "a whole number must follow the name, as in sandwich-middle:2"),
        ("cla:half", None, "a whole number must follow the name, as in cla:2"),
        ("yoco:", None, "a whole number must follow the name, as in yoco:2"),
        ("cla:5", None, "spec='cla:5': num_kv_layers=5 must lie between 1 and the model's 4 layers"),
        ("pizza-top:0", None, "num_kv_layers=0 must lie between 1 and"),
        ("lckv:4", None, "num_kv_layers=5 must lie between 1 and"),
        ("lckv:0", None, "num_kv_layers=1 with top has layer 0 look up at layer 3"),
        (
            "lasagna-middle:1",
            None,
            "num_kv_layers=1 with middle has layer 0 look up at layer 2, and it must use its own",
        ),
        ("yoco:0", None, "the window must be at least 1"),
        ("yoco", 0, "window=0 must be at least 1"),
        ("yoco:8", 9, "window=9 contradicts it; leave either out"),
        ("cla:2", 8, "window=8 has no effect: it is for yoco and for entries with s"),
        ("0_0_2_2", 8, "window=8 has no effect"),
        ("0_0_2", None, "it has 3 entries; it needs one for each of 4 layers"),
        ("0_0s_2_2", None, "0s of layer 1 attends within a window, and the model has no sliding window; give window=N"),
        ("0_0_4_4", None, r"kv_layer_map\[2\]=4 is no layer; it must lie in \[0, 4\)"),
        ("0_0_1_1", None, r"kv_layer_map\[2\]=1 points to a layer without keys and values of its own"),
        ("1_1_1_1", None, r"kv_layer_map\[0\]=1 must be 0: layer 0 must use its own keys and values"),
        ("0_2s_2_2", 1, r"windows\[1\]=1 leaves nothing: layer 1 looks up"),
    ],
)
def test_a_sharing_that_cannot_be_is_refused_with_the_way_out(spec, window, message):
    with pytest.raises(ValueError, match=message) as caught:
        share_kv(layers(4), spec, window=window)
    assert str(caught.value).startswith(f"spec={spec!r}: ")


@pytest.mark.parametrize(
    ("spec", "window", "message"),
    [
        ("burger:2", None, "--spec burger:2: no way of sharing is called so; known are"),
        ("cla:5", None, "--spec cla:5: --num_kv_layers 5 must lie between 1 and the model's 4 layers"),
        ("cla:2", 8, "--spec cla:2: --window 8 has no effect: it is for yoco"),
        ("yoco", 0, "--spec yoco: --window 0 must be at least 1"),
        ("0_0s_2_2", None, "the model has no sliding window; give --window N"),
    ],
)
def test_an_error_spells_every_setting_as_it_is_asked_to(spec, window, message):
    with pytest.raises(SpecError) as caught:
        share_kv(layers(4), spec, window=window)
    assert message in caught.value.told(lambda name, value: f"--{name} {value}")


def test_the_error_about_passes_spells_the_exact_ones_too():
    with pytest.raises(SettingError) as caught:
        layers(4, forward_passes=-1)
    told = caught.value.told(lambda name, value: f"--{name} {'exact' if value is None else value}")
    assert told == "--forward_passes -1 must be at least 0; --forward_passes exact repeats until nothing changes"


def test_a_model_that_shares_can_only_share_more():
    config = share_kv(layers(6), "0_0_2_2_4_4")
    assert write_notation(share_kv(config, "0_0_2_2_2_2")) == "0_0_2_2_2_2"
    assert share_kv(config, "0_0_2_2_4_4") == config
    with pytest.raises(
        ValueError,
        match=r"layer 1 would keep its own keys and values, but this model, 0_0_2_2_4_4, has no weights for them; "
        r"choose KV layers among 0, 2, 4$",
    ):
        share_kv(config, "lasagna-bottom:3")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *((f"{pattern}-bottom:6", Fraction(1)) for pattern in PATTERNS),
        ("pizza-middle:6", Fraction(44, 12)), ("sandwich-middle:6", Fraction(44, 12)),
        ("pizza-top:6", Fraction(68, 12)), ("sandwich-top:6", Fraction(68, 12)),
        ("lasagna-top:6", Fraction(9)), ("lasagna-middle:6", Fraction(9)), ("pizza-bottom:12", Fraction(1)),
    ],
)  # fmt: skip
def test_prefill_costs_what_the_paper_says(spec, expected):
    assert papers_prefill_cost(share_kv(layers(12), spec)) == pytest.approx(float(expected), abs=1e-12)


def test_without_a_number_of_passes_there_is_no_fixed_cost():
    config = share_kv(layers(4, forward_passes=None), "lckv:1")
    with pytest.raises(ValueError, match="forward_passes=None has no fixed cost; set a number"):
        papers_prefill_cost(config)
    assert layer_passes(config, 50) == (1, 50, 50, 1)
    assert papers_prefill_cost(layers(4, forward_passes=None)) == 1.0


@pytest.mark.parametrize("spec", ["0_3_3_3_4_6_6", "0_2_2_2_5_5_5", "0_0_0_0_4_4_4", "0_5_2_5_6_5_6"])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 12])
def test_layer_passes_are_what_the_decoder_does(spec, num_tokens):
    config = share_kv(layers(7, forward_passes=4), spec)
    calls: Counter[int] = Counter()

    def attend(layer, q, k, v, state):
        calls[layer] += 1
        return q, state

    tokens = jnp.arange(num_tokens)[None]
    with jax.disable_jit():  # so that each pass of a loop calls
        jax.eval_shape(
            lambda params: run_decoder(params, tokens, tokens, attend, {}, config=config), random_params(config)
        )
    assert tuple(calls[layer] for layer in range(7)) == layer_passes(config, num_tokens)


def test_no_tokens_have_no_passes():
    with pytest.raises(ValueError, match="num_tokens=0 must be at least 1"):
        layer_passes(TINY, 0)


def tensor(layer: int, part: str, kind: str) -> np.ndarray:
    """Returns the tensor that Hugging Face calls so, as `random_params` has it."""
    rows = QUERIES if part == "q" else KEYS
    return random_tensor(
        f"model.layers.{layer}.self_attn.{part}_proj.{kind}", (rows, 32) if kind == "weight" else (rows,)
    )


@pytest.mark.parametrize("init", ["mean", "copy"])
@pytest.mark.parametrize(
    ("spec", "served"),
    [
        ("0_0_2_2", {0: [0, 1], 2: [2, 3]}),
        ("0_3_3_3", {0: [0], 3: [1, 2, 3]}),
        ("0_2_2_2", {0: [0], 2: [1, 2, 3]}),
        ("0_2_2_0", {0: [0, 3], 2: [1, 2]}),
    ],
)
def test_key_and_value_weights_are_a_mean_or_their_own(spec, served, init):
    params = random_params(TINY)
    found = share_weights(params, TINY, share_kv(TINY, spec), init)
    for layer in range(4):
        for kind in ("weight", "bias"):
            queries = tensor(layer, "q", kind)
            if layer not in served:
                assert found[f"layers_{layer}"].keys() == params[f"layers_{layer}"].keys() - {"qkv"} | {"q"}
                np.testing.assert_array_equal(found[f"layers_{layer}"]["q"][kind], queries)
                continue
            users = served[layer] if init == "mean" else [layer]
            keys, values = (np.mean([tensor(user, part, kind) for user in users], axis=0) for part in "kv")
            for rows, wanted in zip(qkv_rows(TINY), (queries, keys, values), strict=True):
                np.testing.assert_allclose(found[f"layers_{layer}"]["qkv"][kind][rows], wanted, atol=2e-7)


def test_the_norm_of_keys_is_a_mean_or_its_own():
    config = dataclasses.replace(TINY, qk_norm=True)
    shared, names = share_kv(config, "0_0_2_2"), [f"model.layers.{layer}.self_attn.k_norm.weight" for layer in range(4)]
    scales = [random_tensor(name, (8,)) for name in names]
    for init, expected in zip(INITS, ((scales[2] + scales[3]) / 2, scales[2]), strict=True):
        found = share_weights(random_params(config), config, shared, init)
        np.testing.assert_allclose(found["layers_2"]["k_norm"]["scale"], expected, atol=2e-7)
        assert "k_norm" not in found["layers_3"]
        assert "q_norm" in found["layers_3"]


def test_what_does_not_change_is_not_copied():
    params, shared = random_params(TINY), share_kv(TINY, "0_1_2_2")
    found = share_weights(params, TINY, shared, "mean")
    assert found["embedding"] is params["embedding"]
    assert found["layers_1"] is params["layers_1"]
    assert found["layers_2"]["mlp"] is params["layers_2"]["mlp"]
    assert found["layers_3"]["out"] is params["layers_3"]["out"]
    assert share_weights(params, TINY, shared, "copy")["layers_2"] is params["layers_2"]
    assert_equal_trees(params, random_params(TINY))


def test_sharing_in_two_steps_is_sharing_at_once():
    config = layers(6)
    params = random_params(config)
    first, second = share_kv(config, "0_0_2_2_2_5"), share_kv(config, "0_0_2_2_2_2")
    in_two = share_weights(share_weights(params, config, first, "mean"), first, second, "mean")
    at_once = share_weights(params, config, second, "mean")
    assert_equal_trees(in_two, at_once, atol=1e-6)


def test_weights_stay_in_their_dtype():
    found = share_weights(random_params(TINY, jnp.bfloat16), TINY, share_kv(TINY, "cla:2"), "mean")
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_weights_of_another_model_are_refused():
    params, shared = random_params(TINY), share_kv(TINY, "0_0_2_2")
    wider = dataclasses.replace(shared, width=64)
    with pytest.raises(ValueError, match=r"shared_config has width=64, config has 32; make it with share_kv"):
        share_weights(params, TINY, wider, "mean")
    other = share_kv(TINY, "0_1_1_1")
    with pytest.raises(ValueError, match="layer 1 has keys and values in shared_config, but none in config"):
        share_weights(share_weights(params, TINY, shared, "mean"), shared, other, "mean")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("target", TARGETS)
def test_counts_are_the_sizes_of_the_arrays(pattern, target):
    config = layers(12, width=8, mlp_width=8, vocab_size=8, num_heads=2, num_kv_heads=1, head_dim=4, qk_norm=True)
    shared = share_kv(config, f"{pattern}-{target}:4")
    shapes = parameter_shapes(shared)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == shared.num_parameters
    found = share_weights(random_params(config), config, shared, "mean")
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    cache = init_cache(shared, 3, 10, jnp.dtype("bfloat16"))
    num_bytes = sum(array.nbytes for array in (*cache.keys, *cache.values))
    assert num_bytes == 3 * cache.capacity * shared.cache_bytes_per_token(2)
    assert Fraction(shared.cache_bytes_per_token(2), config.cache_bytes_per_token(2)) == 1 - Fraction(12 - 4, 12)
    kv = 2 * 4 * (8 + 1) + 4  # keys and values of a layer, with biases, and the norm of keys
    assert config.num_kv_parameters == 12 * kv
    assert config.num_parameters - shared.num_parameters == (12 - 4) * kv


def test_a_shared_checkpoint_is_loaded_as_it_was_saved(tmp_path):
    shared = dataclasses.replace(share_kv(TINY, "0s_2_2s_3", window=16), forward_passes=None, backward_passes=3)
    params = share_weights(random_params(TINY), TINY, shared, "mean")
    save_model(Model(shared, params, None, (), "tiny", ""), tmp_path / "shared")
    loaded = load_model(tmp_path / "shared")
    assert loaded.config == shared
    assert_equal_trees(loaded.params, params)


def test_a_checkpoint_from_before_the_later_fields_still_loads(tmp_path):
    path = tmp_path / "plain"
    save_model(Model(TINY, random_params(TINY), None, (), "tiny", ""), path)
    description = json.loads((path / "model.json").read_text())
    for name in ("kv_layer_map", "forward_passes", "backward_passes", "qk_norm", "no_rope_layers"):
        del description["config"][name]
    (path / "model.json").write_text(json.dumps(description))
    write_checksums(path)
    loaded = load_model(path)
    assert loaded.config == TINY
    assert_equal_trees(loaded.params, random_params(TINY))


def test_the_named_ways_are_those_of_the_error():
    known = (
        "known are (pizza|sandwich|lasagna)-(bottom|middle|top):KV_LAYERS, cla:KV_LAYERS, lckv:OWN_LAYERS, yoco, "
        "yoco:WINDOW, or an entry for each layer such as 0_0_2_2"
    )
    with pytest.raises(ValueError, match=re.escape(known)):
        share_kv(TINY, "mine:2")
