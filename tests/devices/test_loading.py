"""Models of every form load onto a mesh in parts, and each part is read alone."""

import jax
import numpy as np
import pytest
from meshes import mesh_of, on_mesh, random_model
from tiny_models import tiny_model, write_gguf

from hshare_jax import init_state, load_model, prefill, save_model
from hshare_jax.kernels.block_weights import BlockWeights
from hshare_jax.mesh import put
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.weights import ALL, load_parameters, place, stream_parameters, tensor_layout

TOKENS, LENGTHS = np.arange(40, dtype=np.int32)[None] % 60, np.array([40], np.int32)
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128}


def logits_of(model):
    state = init_state(model.config, 1, 64, mesh=model.mesh)
    args = put(TOKENS, "B T", model.mesh), put(LENGTHS, "B", model.mesh)
    return np.array(prefill(model.params, *args, state, config=model.config)[0])


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        ("hf", 4), ("hf", 8), ("gguf", 4), ("checkpoint", 4), ("checkpoint", 8),
        ("gguf in few bits", 4), ("checkpoint in few bits", 4),
    ],
)  # fmt: skip
def test_a_model_on_a_mesh_is_the_model_on_one_device(form, parts, tmp_path):
    sizes = {**HEADS, "head_dim": 32, "intermediate_size": 256} if "few bits" in form else HEADS
    source, path = tiny_model("llama", **sizes), tmp_path / "model"
    if "gguf" in form:
        import gguf

        path = tmp_path / "model.gguf"
        kind = gguf.GGMLQuantizationType.Q8_0 if "few bits" in form else gguf.GGMLQuantizationType.F32
        write_gguf(path, source, kind)
    else:
        source.save_pretrained(path)
    if "checkpoint" in form:
        save_model(load_model(path, quantize="int8" if "few bits" in form else "none"), tmp_path / "converted")
        path = tmp_path / "converted"
    quantize = "stored" if "few bits" in form else "none"
    spread, whole = load_model(path, quantize=quantize, mesh=mesh_of(1, parts)), load_model(path, quantize=quantize)
    assert isinstance(spread.params["layers_0"]["mlp"]["down"]["weight"], BlockWeights) == ("few bits" in form)
    assert spread.config.num_kv_heads == max(4, parts)
    np.testing.assert_allclose(logits_of(spread), logits_of(whole), rtol=1e-4, atol=1e-4)
    assert (spread.identity == whole.identity) == (parts == 4)  # with repeated kv heads it is another model


class CountedSource:
    """A checkpoint in memory that counts the numbers that are read of each tensor."""

    def __init__(self, config):
        rng = np.random.default_rng(3)
        shapes = {name: shape for parts in tensor_layout(config).values() for name, shape in parts.items()}
        self.arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        self.read = 0

    @property
    def shapes(self):
        return {name: array.shape for name, array in self.arrays.items()}

    def file_of(self, name):
        return "memory"

    def blocks(self, name, rows=ALL, columns=ALL):
        array = self.arrays[name][rows]
        array = array[:, columns] if array.ndim > 1 else array
        self.read += array.size
        yield from np.array_split(array, 3)

    def codes(self, name):
        return None


CONFIG = ModelConfig(
    vocab_size=64, width=32, mlp_width=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, max_positions=64,
    windows=(None,) * 2,
)  # fmt: skip


def test_each_part_of_a_tensor_is_read_once_and_nothing_else():
    source = CountedSource(CONFIG)
    params, _ = load_parameters(CONFIG, stream_parameters(CONFIG, source, "float32", mesh=mesh_of(2, 4)))
    assert source.read == sum(array.size for array in source.arrays.values())  # rows of devices share a reading
    whole, _ = load_parameters(CONFIG, stream_parameters(CONFIG, source, "float32"))
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_device_reads_its_own_rows_and_columns_alone():
    read = []

    def part(rows, columns=slice(None)):
        read.append((rows, columns))
        return np.zeros((len(range(64)[rows]), len(range(32)[columns])), np.float32)

    found = place(part, "layers_0/out/weight", (64, 32), mesh_of(1, 4))
    assert read == [(slice(None), slice(8 * index, 8 * index + 8)) for index in range(4)]
    assert found.sharding.shard_shape(found.shape) == (64, 8)


def test_scales_of_a_mesh_are_not_saved(tmp_path):
    tiny_model("llama", **HEADS).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", quantize="int8-channel", mesh=mesh_of(1, 4))
    assert np.isfinite(logits_of(model)).all()
    with pytest.raises(ValueError, match="a scale for each device's part of a row"):
        save_model(model, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_converted_model_is_the_same_from_any_mesh(tmp_path):
    model = random_model(CONFIG)
    save_model(on_mesh(model, mesh_of(2, 4)), tmp_path / "converted")
    for mesh in (None, mesh_of(1, 2)):
        loaded = load_model(tmp_path / "converted", mesh=mesh)
        for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert loaded.config == model.config
