"""Our own checkpoints: they load as they were saved, are written completely or not at all, and show any damage."""

import dataclasses
import errno
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from comparing import assert_equal_trees, flipped
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fused, state_of, tiny_model, write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hshare_jax.errors import CheckpointError
from hshare_jax.files import atomic
from hshare_jax.files.checksums import write_checksums
from hshare_jax.kernels.block_weights import floats_of
from hshare_jax.models.config import RopeConfig
from hshare_jax.models.orbax_checkpoint import read_checkpoint_info
from hshare_jax.models.pretrained import Model, load_model, save_model


def a_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<|im_end|>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template="{{ messages[0].content }}<|im_end|>"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    path = write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model(), rope_divisors=[1, 1, 2, 2, 4, 4, 8, 8]
    )
    return dataclasses.replace(load_model(path), tokenizer=a_tokenizer(), eos_token_ids=(5, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("saved") / "tiny"
    save_model(model, path)
    return path


def copy_of(saved, tmp_path_factory):
    target = tmp_path_factory.mktemp("copy") / "tiny"
    shutil.copytree(saved, target)
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_saved_is_loaded(tmp_path, model, dtype):
    written = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(dtype), model.params))
    save_model(written, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", dtype=dtype)
    assert (loaded.config, loaded.eos_token_ids, loaded.name) == (model.config, (5, 1), "tiny")
    assert loaded.dtype == dtype
    assert_equal_trees(loaded.params, written.params)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("a b<|im_end|>").input_ids == [2, 3, 1]
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    if dtype != "float16":
        assert loaded.identity == model.identity


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1])
def test_weights_in_few_bits_are_saved_as_they_are(tmp_path, kind):
    written = load_model(write_gguf(tmp_path / "tiny.gguf", tiny_model(), kind), quantize="stored")
    save_model(written, tmp_path / "saved")
    loaded, floats = (load_model(tmp_path / "saved", quantize=quantize) for quantize in ("stored", "none"))
    assert jax.tree.structure(loaded.params) == jax.tree.structure(written.params)
    for found, wanted in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(written.params), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert_equal_trees(floats.params, floats_of(written.params))
    assert loaded.identity == floats.identity == written.identity
    again = load_model(tmp_path / "saved", quantize="int8")
    assert again.identity == written.identity, "what has few bits keeps them"


@pytest.mark.parametrize("quantize", ["int8", "int8-channel"])
def test_floats_are_quantised_alike_from_a_file_and_from_a_checkpoint(tmp_path, quantize):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    save_model(load_model(path), tmp_path / "floats")
    quantised = load_model(path, quantize=quantize)
    save_model(quantised, tmp_path / "saved")
    assert load_model(tmp_path / "floats", quantize=quantize).identity == quantised.identity
    assert load_model(tmp_path / "saved", quantize="stored").identity == quantised.identity
    assert quantised.identity != load_model(path).identity


def test_every_field_of_the_configuration_survives(tmp_path, model):
    rope = RopeConfig("yarn", 5e5, 4.0, 64, beta_fast=16.0, attention_factor=1.25, mscale=0.5, truncate=False)
    config = dataclasses.replace(
        model.config, rope=rope, windows=(None, 32), norm_eps=3e-6, architecture="mistral", no_rope_layers=(1,)
    )
    save_model(dataclasses.replace(model, config=config, tokenizer=None), tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert loaded.config == config
    assert loaded.tokenizer is None


@pytest.mark.parametrize(("architecture", "changes"), [("qwen3", {"head_dim": 16}), ("phi3", {})])
def test_a_model_with_norms_or_stacked_tensors_survives(tmp_path, architecture, changes):
    tiny_model(architecture, **changes).save_pretrained(tmp_path / "hf")
    read = load_model(tmp_path / "hf")
    save_model(read, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    assert (loaded.config, loaded.identity) == (read.config, read.identity)
    assert_equal_trees(loaded.params, read.params)


def test_another_dtype_is_the_stored_one_cast(saved):
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), fused(state_of(tiny_model())))
    assert_equal_trees(load_model(saved, dtype="bfloat16").params, expected)


def test_an_existing_path_is_refused_unless_a_checkpoint_is_to_be_overwritten(tmp_path, model):
    path = tmp_path / "saved"
    save_model(model, path)
    with pytest.raises(FileExistsError, match="saved exists; choose another path, or ask to overwrite it"):
        save_model(model, path)
    save_model(dataclasses.replace(model, name="another"), path, overwrite=True)
    assert load_model(path).name == "another"
    (tmp_path / "diary").mkdir()
    with pytest.raises(FileExistsError, match="diary exists; it is not a checkpoint of this library"):
        save_model(model, tmp_path / "diary", overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["diary", "saved"]


def test_an_overwrite_that_fails_at_the_end_leaves_what_was_there(tmp_path, model, monkeypatch):
    path = tmp_path / "saved"
    save_model(model, path)
    rename = Path.rename
    monkeypatch.setattr(atomic, "_exchange_at_once", lambda draft, path: False)  # as on systems that cannot

    def fail(self: Path, target: Path) -> Path:
        if self.parent != tmp_path and self.name == "saved":  # the draft; the old checkpoint has been moved away by now
            raise PermissionError(errno.EACCES, "no permission", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        save_model(dataclasses.replace(model, name="another"), path, overwrite=True)
    assert load_model(path).name == model.name
    assert [found.name for found in tmp_path.iterdir()] == ["saved"]


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, model, monkeypatch):
    def interrupted(directory):
        assert not (tmp_path / "saved").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic, "write_checksums", interrupted)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_appears_meanwhile_is_kept(tmp_path, model, monkeypatch):
    def overtaken(directory):
        monkeypatch.undo()
        save_model(dataclasses.replace(model, name="first"), tmp_path / "saved")
        write_checksums(directory)

    monkeypatch.setattr(atomic, "write_checksums", overtaken)
    with pytest.raises(OSError, match="saved"):
        save_model(dataclasses.replace(model, name="second"), tmp_path / "saved")
    assert load_model(tmp_path / "saved").name == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_parameters_that_are_not_the_configurations_are_refused(tmp_path, model):
    broken = dataclasses.replace(model, params={**model.params, "embedding": np.zeros((9, 9), np.float32)})
    with pytest.raises(ValueError, match=r"parameter embedding is float32 \(9, 9\); the model says float32 \(96, 64\)"):
        save_model(broken, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_an_error(tmp_path_factory, saved, data):
    directory = copy_of(saved, tmp_path_factory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    path.write_bytes(flipped(content, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))))
    with pytest.raises(CheckpointError, match=str(directory)):
        load_model(directory)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_lost_is_an_error(tmp_path_factory, saved, data):
    directory = copy_of(saved, tmp_path_factory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    path = data.draw(st.sampled_from([file for file in files if file.name != "model.json"]))
    length = data.draw(st.one_of(st.none(), st.integers(0, path.stat().st_size - 1)))
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=str(directory)):
        load_model(directory)


def test_a_description_that_disagrees_with_the_parameters_is_an_error(saved, tmp_path_factory):
    for old, new, message in (
        (
            '"vocab_size": 96',
            '"vocab_size": 97',
            r"parameter embedding is float32 \(96, 64\); model.json says float32 \(97, 64\)",
        ),
        ('"dtype": "float32"', '"dtype": "float16"', r"parameter \S+ is float32 .*; model.json says float16"),
        ('"width": 64', '"breadth": 64', "model.json does not describe a model"),
        ('"format": 2', '"format": 1', "model.json has another format than 2"),
        ('"kind": "default"', '"kind": "spiral"', "model.json does not describe a model: rope type 'spiral'"),
    ):
        directory = copy_of(saved, tmp_path_factory)
        description = (directory / "model.json").read_text()
        assert old in description
        (directory / "model.json").write_text(description.replace(old, new))
        write_checksums(directory)
        with pytest.raises(CheckpointError, match=message):
            load_model(directory)


def test_a_file_beside_a_converted_model_is_let_alone(saved, model, tmp_path_factory):
    directory = copy_of(saved, tmp_path_factory)
    for name in ("plan.json", ".DS_Store", "params/.DS_Store"):
        (directory / name).write_text("mine")
    assert read_checkpoint_info(directory).name == model.name
    save_model(model, directory / "another")
    save_model(dataclasses.replace(model, tokenizer=None), directory, overwrite=True)
    assert load_model(directory).tokenizer is None
    assert (directory / "plan.json").read_text() == "mine"
    assert load_model(directory / "another").tokenizer is not None


def test_a_file_that_would_be_read_and_is_not_listed_is_an_error(saved, tmp_path_factory):
    directory = copy_of(saved, tmp_path_factory)
    (directory / "tokenizer" / "chat_template.jinja").write_text("another one")
    sums = directory / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if "jinja" not in line))
    with pytest.raises(CheckpointError, match=r"it holds the unlisted tokenizer/chat_template.jinja"):
        read_checkpoint_info(directory)
