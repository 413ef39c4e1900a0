"""Configurations: how a Hugging Face config.json is read, and which values are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hshare_jax.models.config import ARCHITECTURES, ModelConfig, RopeConfig, config_from_hf
from hshare_jax.models.rope import inverse_frequencies

EVERY_SECOND = {"no_rope_layer_interval": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
SIZES = {
    "vocab_size": 32,
    "width": 32,
    "mlp_width": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_positions": 64,
    "windows": (None,) * 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            r"model_type='gpt2' is not supported; supported: llama, mistral, ministral, qwen2, qwen3, "
            "smollm3, phi3$",
        ),
        ({"model_type": None}, r"model_type=None is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported; this decoder computes silu"),
        ({"vocab_size": None}, r"lacks the whole number\(s\) vocab_size$"),
        ({"hidden_size": "32", "intermediate_size": None}, r"number\(s\) hidden_size, intermediate_size$"),
        ({"hidden_size": 30}, r"hidden_size=30 is not a multiple of num_attention_heads=4; set head_dim"),
        ({"num_attention_heads": 0}, r"num_attention_heads=0"),
        ({"num_key_value_heads": 3}, r"num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 7}, r"head_dim=7 must be even"),
        ({"rope_theta": "big"}, r"rope_theta='big' must be a finite number"),
        ({"rope_theta": -1.0}, r"rope theta=-1.0 must be positive"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            r"rope type 'longrope' is not known; known types: default, linear, llama3, yarn$",
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, r"rope factor=0.0 must be positive"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling of type 'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, r"factor='4' must be a finite number"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope type 'dynamic' is not known; known types: default",
        ),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn' must be a mapping of fields, or null"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_slow": -1}}, r"rope beta_slow=-1.0 must be positive"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": "32"}},
            r"original_max_position_embeddings='32' must be a whole number",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            r"low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope type 'linear' is not supported for phi3",
        ),
        (
            {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            r"no_rope_layers=\[1, 0\] must hold 0 or 1 for each of 3",
        ),
        (
            {"model_type": "ministral", "sliding_window": 4, "layer_types": ["chunked_attention"] * 3},
            r"layer_types holds 'chunked_attention'; supported: full_attention, sliding_attention",
        ),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor=0.5 is not",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}},
            r"mrope_section=\[2, 1, 1\] is not supported",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"has fields for 'full_attention' alone"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**LLAMA, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0, "windows": ()}, "num_layers=0 must be at least 1"),
        ({"windows": (None,)}, "windows has 1 entries; it needs one for each of 3 layers"),
        ({"no_rope_layers": (1, 3)}, r"no_rope_layers=\(1, 3\) must name layers in \[0, 3\)"),
        ({"windows": (0, None, None)}, "a sliding window must be at least 1, or None"),
        ({"rope": RopeConfig(divisors=(1.0,))}, "rope has 1 divisors; head_dim=8 needs 4"),
        ({"kv_layer_map": (0, 0)}, "kv_layer_map has 2 entries; it needs one for each of 3 layers"),
        ({"kv_layer_map": (0, 3, 2)}, r"kv_layer_map\[1\]=3 is no layer; it must lie in \[0, 3\)"),
        ({"kv_layer_map": (0, -1, 2)}, r"kv_layer_map\[1\]=-1 is no layer; it must lie in \[0, 3\)"),
        ({"kv_layer_map": (2, 2, 2)}, r"kv_layer_map\[0\]=2 must be 0: layer 0 must use its own keys and values"),
        (
            {"kv_layer_map": (0, 0, 1)},
            r"kv_layer_map\[2\]=1 points to a layer without keys and values of its own, kv_layer_map\[1\]=0; "
            "point to a layer that has its own number there",
        ),
        (
            {"kv_layer_map": (0, 2, 2), "windows": (None, 1, None)},
            r"windows\[1\]=1 leaves nothing: layer 1 looks up, so it does not see its own position",
        ),
        (
            {"forward_passes": -1},
            "forward_passes=-1 must be at least 0; forward_passes=None repeats until nothing changes",
        ),
        ({"backward_passes": 0}, "backward_passes=0 must be at least 1: the last pass has a gradient"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SIZES, **change})


def test_scaled_rope_types_need_the_original_length():
    with pytest.raises(ValueError, match="rope type 'yarn' needs original_max_position_embeddings of at least 1"):
        RopeConfig(kind="yarn", factor=2.0)


def test_absent_fields_mean_what_llama_defaults_to():
    config = config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.max_positions) == (4, 8, 2048)
    assert config.windows == (None, None, None)
    assert config.rope == RopeConfig(theta=10_000.0, original_max_positions=2048)
    assert not any([config.qkv_bias, config.out_bias, config.mlp_bias, config.tie_embeddings])


def test_both_spellings_of_rotary_scaling_mean_the_same():
    fields = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    new = config_from_hf({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **fields}})
    old = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **fields}})
    assert new == old
    assert new.rope == RopeConfig("llama3", 5e5, 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, **BANDS}},
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **BANDS},
            "original_max_position_embeddings": 16,
        },
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **BANDS}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "original_max_position_embeddings": 32,
        },
        {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 32}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 0, "finetuned": True}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": None}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "beta_fast": 4.0}},
    ],
)
def test_angles_are_those_of_transformers(fields):
    torch = pytest.importorskip("torch", reason="the extra 'torch' is not installed")
    # As config.json gives the fields, and as the class of transformers hands them on.
    theirs = transformers.LlamaConfig(**{**LLAMA, "max_position_embeddings": 128, "rope_theta": 100.0, **fields})
    handed_on = theirs.to_dict()  # before the next line, which changes it
    expected, factor = ROPE_INIT_FUNCTIONS[handed_on["rope_parameters"]["rope_type"]](theirs, torch.device("cpu"))
    for hf in ({**LLAMA, "max_position_embeddings": 128, "rope_theta": 100.0, **fields}, handed_on):
        found, ours = inverse_frequencies(config_from_hf(hf).rope, 8)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
        assert ours == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 256),
        ({"type": "linear", "factor": 4.0}, 1024),
        ({"type": "yarn", "factor": 4.0}, 1024),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 256),  # already stated
        ({"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 128, **BANDS}, 256),
    ],
)
def test_scaled_rotary_embedding_lengthens_the_model(scaling, positions):
    config = config_from_hf({**LLAMA, "max_position_embeddings": 256, "rope_scaling": scaling})
    assert config.max_positions == positions


def test_messages_about_positions_name_the_fields_that_say_so():
    assert ModelConfig(**SIZES).positions_told == "64 positions (max_position_embeddings)"
    stretched = ModelConfig(**SIZES, rope=RopeConfig("linear", factor=2.0))
    assert stretched.positions_told == "64 positions (max_position_embeddings and the factor of rope_scaling)"


def test_yarn_without_a_factor_scales_to_the_models_positions():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    assert config_from_hf({**LLAMA, "max_position_embeddings": 2048, "rope_scaling": scaling}).rope.factor == 4.0


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 5}, (None, None, None)),
        ({"model_type": "mistral", "sliding_window": 5}, (5, 5, 5)),
        ({"model_type": "mistral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "mistral", "sliding_window": 5, "layer_types": ["full_attention"] * 3}, (5, 5, 5)),
        ({"model_type": "phi3", "sliding_window": 5}, (5, 5, 5)),
        ({"model_type": "ministral", "sliding_window": 5}, (5, 5, 5)),
        ({"model_type": "ministral", "sliding_window": None}, (None, None, None)),
        ({"model_type": "qwen3", "sliding_window": 5}, (None, None, None)),
        ({"model_type": "smollm3", "sliding_window": 5, "use_sliding_window": True, **EVERY_SECOND}, (None, 5, None)),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": False}, (None, None, None)),
        (
            {"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 5),
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (5, None, None),
        ),
    ],
)
def test_sliding_windows_belong_to_the_layers_that_have_them(fields, windows):
    assert config_from_hf({**LLAMA, **fields}).windows == windows


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [
        ("llama", (True, True, True)),
        ("mistral", (False, False, False)),
        ("ministral", (False, False, False)),
        ("qwen2", (True, False, False)),
        ("qwen3", (True, True, False)),
        ("smollm3", (True, True, True)),
        ("phi3", (False, False, False)),
    ],
)
def test_biases_are_where_the_architecture_has_them_whatever_else_is_written(architecture, biases):
    config = config_from_hf({**LLAMA, "model_type": architecture, "attention_bias": True, "mlp_bias": True})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == biases


def test_layers_without_rotary_embedding_are_listed_or_each_fourth():
    smollm3 = {**LLAMA, "model_type": "smollm3", "num_hidden_layers": 9}
    assert config_from_hf(smollm3).no_rope_layers == (3, 7)
    assert config_from_hf({**smollm3, **EVERY_SECOND}).no_rope_layers == (1, 3, 5, 7)
    assert config_from_hf({**smollm3, "no_rope_layers": [0, 1, 1] * 3}).no_rope_layers == (0, 3, 6)
    assert config_from_hf({**LLAMA, "no_rope_layers": [0, 0, 0]}).no_rope_layers == ()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fields_that_config_json_leaves_out_are_those_of_transformers(architecture):
    sizes = {**LLAMA, "model_type": architecture}
    theirs = transformers.AutoConfig.for_model(**sizes, num_key_value_heads=4, max_position_embeddings=2048)
    assert config_from_hf({**sizes, "sliding_window": theirs.to_dict().get("sliding_window")}) == config_from_hf(
        theirs.to_dict()
    )


def test_parameters_and_cache_bytes_are_counted():
    config = ModelConfig(**SIZES)
    layer = 32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48 + 2 * 32
    assert config.num_parameters == 2 * 32 * 32 + 3 * layer + 32
    assert ModelConfig(**SIZES, tie_embeddings=True).num_parameters == 32 * 32 + 3 * layer + 32
    assert config.cache_bytes_per_token(2) == 3 * 2 * 2 * 8 * 2


def shared(*layers: int, **changes) -> ModelConfig:
    return ModelConfig(
        **{**SIZES, "num_layers": len(layers), "windows": (None,) * len(layers), "kv_layer_map": layers, **changes}
    )


def test_a_map_onto_oneself_is_no_sharing():
    config = shared(0, 1, 2)
    assert config == ModelConfig(**SIZES)
    assert config.kv_layer_map is None
    assert config.kv_layers == (0, 1, 2)
    assert config.blocks == (range(1), range(1, 2), range(2, 3))


def test_a_window_of_one_is_for_layers_that_see_their_own_position():
    assert shared(0, 0, 2, windows=(1, 1, 1)).windows == (1, 1, 1)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ((0, 3, 2, 3, 4), ("0", "1 2 3", "4")),
        ((0, 0, 0, 0), ("0", "1", "2", "3")),  # nothing looks up
        ((0, 3, 3, 3, 5, 5), ("0", "1 2 3", "4 5")),
        ((0, 2, 2, 2, 4), ("0", "1 2", "3", "4")),  # a layer that looks down waits for nothing
        ((0, 3, 4, 3, 4), ("0", "1 2 3 4")),  # runs that overlap are one
        ((0, 4, 3, 3, 4, 0), ("0", "1 2 3 4", "5")),  # one run within another
        ((0, 2, 2, 4, 4), ("0", "1 2", "3 4")),  # runs that only touch are two
        ((0,), ("0",)),
    ],
)
def test_a_block_ends_with_the_last_layer_that_any_of_its_layers_waits_for(layers, blocks):
    assert shared(*layers).blocks == tuple(range(int(block.split()[0]), int(block.split()[-1]) + 1) for block in blocks)


def test_the_cache_has_one_array_for_each_kv_layer():
    config = shared(0, 3, 2, 3, 0)
    assert config.kv_layers == (0, 2, 3)
    assert [config.kv_index(layer) for layer in range(5)] == [0, 2, 1, 2, 0]
    assert [config.looks_up(layer) for layer in range(5)] == [False, True, False, False, False]


def test_a_layer_that_looks_up_sees_one_token_less():
    config = shared(0, 3, 2, 3, windows=(4, 4, None, 4))
    ends = np.array([1, 7])
    for layer, end, window in ((0, 0, 4), (1, -1, 3), (2, 0, None), (3, 0, 4)):
        seen, size = config.sees(layer, jnp.asarray(ends))
        np.testing.assert_array_equal(seen, ends + end)
        assert size == window


def test_layers_without_keys_and_values_have_no_such_parameters():
    plain, config = ModelConfig(**SIZES, qkv_bias=True), shared(0, 2, 2, qkv_bias=True)
    assert plain.num_parameters - config.num_parameters == 2 * 2 * 8 * (32 + 1)
    assert config.cache_bytes_per_token(2) == 2 * 2 * 2 * 8 * 2


def test_divisors_of_a_gguf_file_equal_the_llama3_parameters():
    rope = RopeConfig("llama3", 500.0, 4.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, scaled = inverse_frequencies(RopeConfig(theta=500.0), 16)[0], inverse_frequencies(rope, 16)[0]
    assert len(set(np.round(plain / scaled, 6))) > 2  # kept, interpolated and divided ones
    divided, factor = inverse_frequencies(RopeConfig(theta=500.0, divisors=tuple(plain / scaled)), 16)
    np.testing.assert_allclose(divided, scaled, rtol=1e-15)
    assert factor == 1.0
