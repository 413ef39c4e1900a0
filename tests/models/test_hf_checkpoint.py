"""Hugging Face directories: the parameters equal those of transformers, and damage is an error."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from comparing import assert_equal_trees, flipped
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import fused, state_of, tiny_model, torch
from tiny_tokenizer import byte_fallback_tokenizer, byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import write_checksums
from hshare_jax.models.config import config_from_hf
from hshare_jax.models.pretrained import load_model, open_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    model = tiny_model()
    model.save_pretrained(directory)
    return directory, model


def read_all(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_all(directory, files):
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 32, "head_dim": 32}),
        ("ministral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("phi3", {}),
    ],
)
def test_parameters_equal_the_state_of_transformers(tmp_path, architecture, changes, max_shard_size):
    model = tiny_model(architecture, **changes)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (max_shard_size == "1GB") == (tmp_path / "model.safetensors").exists()
    loaded = load_model(tmp_path)
    assert loaded.config == config_from_hf(model.config.to_dict())
    assert_equal_trees(loaded.params, fused(state_of(model)))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_values(tmp_path, stored):
    model = tiny_model().to(stored)
    model.save_pretrained(tmp_path)
    assert_equal_trees(load_model(tmp_path).params, fused(state_of(model)))


def test_end_tokens_come_from_the_generation_settings_before_the_configuration(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert load_model(tmp_path).eos_token_ids == (5, 9)
    (tmp_path / "generation_config.json").unlink()
    assert load_model(tmp_path).eos_token_ids == (2,)


def test_defaults_that_config_json_leaves_out_are_transformers_own(tmp_path, llama):
    directory, model = llama
    files = read_all(directory)
    config = json.loads(files["config.json"])
    for name in ("rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "head_dim"):
        config.pop(name)
    files["config.json"] = json.dumps(config).encode()
    assert load_model(write_all(tmp_path, files)).config == config_from_hf(model.config.to_dict())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, ValueError, r"config.json: model_type='gpt2' is not supported; supported: llama, mis"),
        ({"quantization_config": {"bits": 4}}, ValueError, r"config.json: quantised safetensors are not supported"),
        (
            {"num_hidden_layers": 3},
            CheckpointError,
            r"model.safetensors: tensor model.layers.2.\S+ of shape .* missing",
        ),
        ({"num_hidden_layers": 1}, CheckpointError, r"model.safetensors: tensor model.layers.1.\S+ and 8 more is not"),
        ({"num_hidden_layers": 10**25}, CheckpointError, r"config.json: num_hidden_layers=10+ must be at most 10000"),
        ({"intermediate_size": 97}, CheckpointError, r"gate_proj.weight has shape \(96, 64\); .* says \(97, 64\)"),
        ({"num_attention_heads": 0}, CheckpointError, r"config.json: "),
        ({"dtype": "x"}, CheckpointError, r"config.json: "),
        ({"vocab_size": "many"}, CheckpointError, r"config.json: "),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, llama, change, error, message):
    files = read_all(llama[0])
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **change}).encode()
    with pytest.raises(error, match=message):
        load_model(write_all(tmp_path, files))


def test_a_shard_that_is_missing_or_holds_something_else_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, file = "model.norm.weight", index["weight_map"]["model.norm.weight"]
    other = next(other for other in index["weight_map"].values() if other != file)
    for place, message in (
        ("elsewhere.safetensors", r"index.json names the file 'elsewhere.safetensors', which does not lie beside it"),
        ("../" + file, r"which does not lie beside it"),
        (other, r"tensor model.norm.weight is "),
    ):
        changed = {**index, "weight_map": {**index["weight_map"], name: place}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path)


def test_a_shard_that_an_index_lists_but_lacks_its_tensor_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"tensor model.extra is missing, though"):
        load_model(tmp_path)


def test_buffers_of_rotary_angles_in_an_index_are_ignored(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for layer, file in enumerate((index["weight_map"]["model.norm.weight"], "elsewhere.safetensors")):
        index["weight_map"][f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = file
    path.write_text(json.dumps(index))
    assert_equal_trees(load_model(tmp_path).params, fused(state_of(model)))


@pytest.mark.parametrize("form", ["{digest}  {name}", "{capitals} *./{name}", "SHA256 ({name}) = {digest}"])
def test_checksums_are_read_as_the_usual_tools_write_them(tmp_path, llama, form):
    directory = write_all(tmp_path / "model", read_all(llama[0]))
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in read_all(directory).items()}
    lines = [form.format(digest=digest, capitals=digest.upper(), name=name) for name, digest in digests.items()]
    (directory / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    load_model(directory)
    (directory / "config.json").write_bytes(b" " + (directory / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"config.json is damaged: its SHA-256 is"):
        load_model(directory)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_or_grown_is_an_error(tmp_path_factory, llama, data):
    files = read_all(llama[0])
    weights = files["model.safetensors"]
    length = data.draw(st.integers(0, len(weights) + 64).filter(lambda length: length != len(weights)))
    files["model.safetensors"] = (weights + bytes(64))[:length]
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        load_model(write_all(tmp_path_factory.mktemp("cut"), files))


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header_is_an_error_or_changes_nothing(tmp_path_factory, llama, position, bit):
    directory, model = llama
    files = read_all(directory)
    weights = files["model.safetensors"]
    header = 8 + int.from_bytes(weights[:8], "little")
    files["model.safetensors"] = flipped(weights[:header], position, bit) + weights[header:]
    try:
        loaded = load_model(write_all(tmp_path_factory.mktemp("flip"), files))
    except CheckpointError as caught:
        error = caught
    else:  # inside the free text of __metadata__
        assert_equal_trees(loaded.params, fused(state_of(model)))
        return
    assert "model.safetensors" in str(error)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_with_checksums_any_flipped_bit_is_an_error(tmp_path_factory, llama, data):
    directory = write_all(tmp_path_factory.mktemp("sums"), read_all(llama[0]))
    write_checksums(directory)
    load_model(directory)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors", "generation_config.json", "SHA256SUMS"]))
    path = directory / name
    # Only the first checksum is flipped: a flip in a file name, or in the checksum of a file that is not read, is
    # harmless.
    size = len(path.read_bytes()) if name != "SHA256SUMS" else 64
    path.write_bytes(flipped(path.read_bytes(), data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))))
    with pytest.raises(CheckpointError, match=f"{name}|config.json"):
        load_model(directory)


def test_a_flipped_bit_in_a_tensor_passes_without_checksums_and_not_with_them(tmp_path, llama):
    directory = write_all(tmp_path / "model", read_all(llama[0]))
    sound = load_model(directory)
    weights = (directory / "model.safetensors").read_bytes()
    write_checksums(directory)
    (directory / "model.safetensors").write_bytes(flipped(weights, len(weights) - 4, 0))
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its SHA-256 is \w+, .*SHA256SUMS says"):
        load_model(directory)
    (directory / "SHA256SUMS").unlink()
    assert sound.config == load_model(directory).config


def test_loading_works_without_torch(llama):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from hshare_jax.models.pretrained import load_model, open_model\n"
        "print(load_model(sys.argv[1]).identity)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(llama[0])], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == load_model(llama[0]).identity


def test_the_tokenizer_of_the_directory_is_read(tmp_path, llama):
    directory = write_all(tmp_path / "model", read_all(llama[0]))
    assert load_model(directory).tokenizer is None
    backend = Backend(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="b").save_pretrained(directory)
    loaded = load_model(directory)
    assert loaded.tokenizer is not None
    np.testing.assert_array_equal(loaded.tokenizer("a b b").input_ids, [1, 2, 2])
    whole = (directory / "tokenizer.json").read_text()
    for damaged in (whole[:-9], "{}", "[]", whole.replace("WordLevel", "WordLvel")):
        (directory / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read: "):
            load_model(directory)
    (directory / "tokenizer.json").write_text(whole)
    for limit in ([], "256"):
        (directory / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
        with pytest.raises(CheckpointError, match=r"its tokenizer has model_max_length=.*, which must be a number"):
            load_model(directory)


def test_a_tokenizer_json_is_read_as_it_is_whatever_class_is_named_beside_it(tmp_path, llama):
    # The classes LlamaTokenizer and Qwen2Tokenizer bring rules of their own, such as Qwen's single digits.
    for model_type, name in (("llama", "LlamaTokenizerFast"), ("qwen2", "Qwen2Tokenizer")):
        directory = write_all(tmp_path / name, read_all(llama[0]))
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        byte_tokenizer(merges=("12",)).save_pretrained(directory)
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        tokenizer = open_model(directory).tokenizer
        assert tokenizer is not None
        ids = tokenizer("12 caf\u00e9\n").input_ids
        assert ids == [256, *b" caf\xc3\xa9\n"]
        assert tokenizer.decode(ids) == "12 caf\u00e9\n"


def with_rules(**rules) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    for name, rule in rules.items():
        setattr(tokenizer.backend_tokenizer, name, rule)
    return tokenizer


LLAMA_RULES = {
    "pre_tokenizer": pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=False),
    "decoder": decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
}


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [
        (with_rules(**LLAMA_RULES), "onetwothreecaf"),  # what transformers 5.0 to 5.21 makes of DeepSeek's tokenizer
        (with_rules(decoder=LLAMA_RULES["decoder"]), "one\u0120two\u010athree\u0120caf\u00c3\u00a9"),
    ],
)
def test_a_tokenizer_whose_rules_do_not_suit_its_tokens_is_refused(tmp_path, llama, tokenizer, found):
    directory = write_all(tmp_path / "model", read_all(llama[0]))
    tokenizer.save_pretrained(directory)
    message = rf"the tokenizer of model gives 'one two\\nthree caf\u00e9' back as '{found}\S*, so .* before 5.22 spoils"
    with pytest.raises(CheckpointError, match=message):
        open_model(directory)


WORDS = PreTrainedTokenizerFast(tokenizer_object=Backend(models.WordLevel({"?": 0, "a": 1}, unk_token="?")))


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_rules(normalizer=normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])),
        byte_tokenizer(b"onethr", merges=["th"]),  # knows no space
        byte_fallback_tokenizer(["\u2581", "\u2581two"]),
        WORDS,
    ],
)
def test_a_tokenizer_that_does_not_give_every_text_back_is_read(tmp_path, llama, tokenizer):
    directory = write_all(tmp_path / "model", read_all(llama[0]))
    tokenizer.save_pretrained(directory)
    assert open_model(directory).tokenizer is not None
