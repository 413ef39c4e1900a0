"""Loading of weights: the parameter tree, the errors for tensors that do not fit, and the memory that it takes."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hshare_jax.errors import CheckpointError, SettingError
from hshare_jax.kernels.block_weights import BlockWeights, floats_of
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.models.layers import qkv_rows
from hshare_jax.models.weights import (
    ALL,
    DType,
    Quantize,
    dtype_of,
    load_parameters,
    resolve_quantize,
    stream_parameters,
    tensor_layout,
)

CONFIG = ModelConfig(
    vocab_size=32, width=16, mlp_width=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
    windows=(None, None),
)  # fmt: skip


class ArraySource:
    """A checkpoint in memory that hands out three rows at a time and counts the bytes it has read."""

    def __init__(self, config: ModelConfig) -> None:
        rng = np.random.default_rng(3)
        names = {name: shape for parts in tensor_layout(config).values() for name, shape in parts.items()}
        self.arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in names.items()}
        self.bytes_read = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: array.shape for name, array in self.arrays.items()}

    def file_of(self, name: str) -> str:
        return "tiny.bin"

    def blocks(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Iterator[np.ndarray]:
        array = self.arrays[name][rows]
        array = array[:, columns] if array.ndim > 1 else array
        for row in range(0, len(array), 3):
            self.bytes_read += array[row : row + 3].nbytes
            yield array[row : row + 3]

    def codes(self, name: str) -> None:
        return None


def load(config, source, dtype: DType = "float32", quantize: Quantize = "none"):
    return load_parameters(config, stream_parameters(config, source, dtype, quantize))


@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("kv_layer_map", [None, (0, 0)])
def test_parameters_are_the_tree_that_the_decoder_declares(biases, tie_embeddings, kv_layer_map):
    config = dataclasses.replace(CONFIG, **biases, tie_embeddings=tie_embeddings, kv_layer_map=kv_layer_map)
    params, _ = load(config, ArraySource(config))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parameter_shapes(config))


def test_the_queries_the_key_and_the_value_of_a_group_of_heads_lie_together():
    source = ArraySource(CONFIG)
    params, _ = load(CONFIG, source)
    q, k, v = (source.arrays[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    K, H = CONFIG.num_kv_heads, CONFIG.head_dim
    groups = zip(np.split(q, K), np.split(k, K), np.split(v, K), strict=True)
    found = params["layers_1"]["qkv"]["weight"]
    np.testing.assert_array_equal(found, np.concatenate([part for group in groups for part in group]))
    for rows, wanted in zip(qkv_rows(CONFIG), (q, k, v), strict=True):
        np.testing.assert_array_equal(found[rows], wanted)
    assert len(found) == (CONFIG.num_heads + 2 * K) * H


def test_the_rows_of_gate_and_up_alternate():
    source = ArraySource(CONFIG)
    gate, up = (source.arrays[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    found = load(CONFIG, source)[0]["layers_1"]["mlp"]["gate_up"]["weight"]
    np.testing.assert_array_equal(found[::2], gate)
    np.testing.assert_array_equal(found[1::2], up)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_has_the_asked_dtype(dtype):
    params, _ = load(CONFIG, ArraySource(CONFIG), dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}


def test_matrices_become_codes_of_8_bits_and_vectors_stay_floats():
    config = dataclasses.replace(CONFIG, width=32, mlp_width=64, head_dim=16, qkv_bias=True)
    source = ArraySource(config)
    params, identity = load(config, source, quantize="int8")
    floats, other = load(config, source)
    qkv = params["layers_0"]["qkv"]
    assert isinstance(qkv["weight"], BlockWeights)
    assert qkv["weight"].qvalue.dtype == jnp.int8
    assert isinstance(qkv["bias"], jax.Array)
    assert identity != other
    for found, wanted in zip(jax.tree.leaves(floats_of(params)), jax.tree.leaves(floats), strict=True):
        np.testing.assert_allclose(found, wanted, atol=4 / 127)
    assert jax.tree.leaves(floats_of(params))[0].dtype == jnp.float32


@pytest.mark.usefixtures("unchecked")
def test_a_way_to_quantise_that_cannot_be_is_refused_with_the_ways_that_can():
    with pytest.raises(SettingError, match="quantize='int4' must be one of auto, stored, none, int8, int8-channel"):
        resolve_quantize("int4", CONFIG)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="takes blocks of 32 neighbouring weights, and this model has rows of 16"):
        resolve_quantize("int8", CONFIG)


def test_devices_that_would_cut_blocks_of_weights_are_refused_or_get_floats():
    part = dataclasses.replace(CONFIG, width=64, mlp_width=64, num_heads=4, num_kv_heads=4, head_dim=32).part(4)
    with pytest.raises(SettingError, match="and a device's part has rows of 16: choose 'none'"):
        resolve_quantize("stored", part)
    assert resolve_quantize("auto", part) == "none"


def test_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="dtype='int8' must be one of float32, bfloat16, float16"):
        dtype_of("int8")


def test_missing_tensor_is_named_before_anything_is_read():
    source = ArraySource(CONFIG)
    del source.arrays["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"tiny.bin: tensor model.layers.1.mlp.up_proj.weight of shape \(24, 16\) is missing"
    ):
        load(CONFIG, source)
    assert source.bytes_read == 0


def test_misshaped_tensor_is_named_with_both_shapes():
    source = ArraySource(CONFIG)
    source.arrays["model.norm.weight"] = np.ones(17, np.float32)
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \(17,\); the configuration says \(16,\)"):
        load(CONFIG, source)
    assert source.bytes_read == 0


def test_unexpected_tensor_is_named():
    source = ArraySource(CONFIG)
    source.arrays["model.layers.2.mlp.up_proj.weight"] = np.ones((24, 16), np.float32)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.mlp.up_proj.weight is not part of"):
        load(CONFIG, source)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    source = ArraySource(CONFIG)
    source.arrays["model.layers.0.self_attn.k_proj.weight"][9, 4] = value
    with pytest.raises(CheckpointError, match=r"tiny.bin: tensor model.layers.0.self_attn.k_proj.weight holds infin"):
        load(CONFIG, source)


def test_a_weight_beyond_float16_is_refused_only_there():
    source = ArraySource(CONFIG)
    source.arrays["model.norm.weight"][3] = -1e6
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight reaches 1e\+06, too large for float16; load it as bf"
    ):
        load(CONFIG, source, "float16")
    load(CONFIG, source, "bfloat16")


def test_rotary_buffers_are_ignored():
    source = ArraySource(CONFIG)
    source.arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    load(CONFIG, source)


def test_a_tied_output_layer_is_accepted_when_it_equals_the_embedding():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    source = ArraySource(config)
    source.arrays["lm_head.weight"] = source.arrays["model.embed_tokens.weight"].copy()
    load(config, source)
    source.arrays["lm_head.weight"][31, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(config, source)
    source.arrays["lm_head.weight"] = np.ones((31, 16), np.float32)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load(config, source)


def test_identity_tells_models_apart_and_not_their_dtypes():
    _, identity = load(CONFIG, ArraySource(CONFIG))
    assert load(CONFIG, ArraySource(CONFIG), "bfloat16")[1] == identity
    assert load(dataclasses.replace(CONFIG, norm_eps=1e-6), ArraySource(CONFIG))[1] != identity
    changed = ArraySource(CONFIG)
    changed.arrays["model.layers.0.mlp.down_proj.weight"] *= 1.01
    assert load(CONFIG, changed)[1] != identity


PEAK_MEMORY = """
import sys
from hshare_jax.models.pretrained import load_model

def peak():  # not ru_maxrss, which begins at what the parent process held
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

load_model(sys.argv[2])  # imports and JAX's start are not the model's
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew, at what is resident now
before = peak()
model = load_model(sys.argv[1], dtype=sys.argv[3])
print((peak() - before) / (model.config.num_parameters * model.params["embedding"].dtype.itemsize))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("form", "dtype"), [("safetensors", "bfloat16"), ("checkpoint", "float32")])
def test_peak_memory_stays_below_one_and_a_half_times_the_model(tmp_path, form, dtype):
    from safetensors.numpy import save_file

    from hshare_jax.models.pretrained import load_model, save_model

    def write(path, layers, width, vocab):
        config = dataclasses.replace(
            CONFIG, vocab_size=vocab, width=width, mlp_width=3 * width, num_layers=layers, head_dim=width // 4,
            windows=(None,) * layers, tie_embeddings=True,
        )  # fmt: skip
        path.mkdir()
        hf = {
            "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 3 * width,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(hf))
        shapes = {name: shape for parts in tensor_layout(config).values() for name, shape in parts.items()}
        save_file({name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}, path / "model.safetensors")
        return path

    large, small = write(tmp_path / "large", 14, 640, 32_000), write(tmp_path / "small", 1, 64, 96)
    if form == "checkpoint":
        for path in (large, small):
            save_model(load_model(path), path.with_suffix(".saved"))
        large, small = large.with_suffix(".saved"), small.with_suffix(".saved")
    command = [sys.executable, "-c", PEAK_MEMORY, str(large), str(small), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout.splitlines()[-1]) < 1.5
