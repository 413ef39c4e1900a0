"""`hshare-jax train`: it trains a model that loads, and names mistakes before weights are read."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from command_line import call
from tiny_tokenizer import byte_tokenizer
from tiny_training import CONFIG

from hshare_jax.models.pretrained import ModelFiles, load_model, save_model
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.start import new_model


@pytest.fixture(autouse=True)
def freed_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keeps the command from changing how the tests' own process treats freed memory; counts the calls."""
    calls: list[str] = []
    monkeypatch.setattr("hshare_jax.cli.train.keep_freed_memory", lambda: calls.append("keep"))
    return calls


@pytest.fixture
def start(tmp_path: Path) -> str:
    """The directory of a tiny model with a tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {"num_layers": 2, "windows": (None,) * 2, "max_positions": 64}
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer), **sizes)
    save_model(new_model(config, tokenizer), tmp_path / "start")
    return str(tmp_path / "start")


def arguments(tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "a.txt").write_text("the man in the inn. " * 60)
    given = ["train", "--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "run"), "--sequence-length", "16"]
    return [*given, "--batch-size", "4", "--num-steps", "6", "--warmup-steps", "1", "--log-every", "2", *more]


def test_a_trained_model_loads_and_shares_as_told(tmp_path, start, capsys, freed_memory):
    sharing = ["--kv-sharing", "0_0s", "--kv-window", "5", "--forward-passes", "3", "--init", "copy"]
    command = arguments(tmp_path, "--model", start, *sharing)
    status, out, err = call(command, capsys)
    assert status == 0
    assert freed_memory == ["keep"]
    assert "M parameters, " in err
    summary = json.loads(out)
    assert summary["steps"] == 6
    assert summary["eval_loss"] < 6
    trained = load_model(tmp_path / "run" / "model")
    assert (trained.config.kv_layer_map, trained.config.windows) == ((0, 0), (None, 5))
    assert trained.config.forward_passes == 3
    assert trained.tokenizer is not None
    assert trained.tokenizer("the").input_ids == byte_tokenizer()("the").input_ids
    assert Path(summary["plot"]).stat().st_size > 1000
    status, _, err = call([*command, "--beta1", "0.5"], capsys)
    assert status == 1
    assert "is a checkpoint for beta1=0.9, and this run has beta1=0.5" in err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "tiny", "--num-steps", "0"], "--num-steps 0 must be at least 1"),
        (
            ["--preset", "tiny", "--batch-size", "6", "--accumulation-steps", "4"],
            "--batch-size 6 must be a multiple of --accumulation-steps 4: micro-batches are equally large",
        ),
        (["--preset", "tiny", "--eval-fraction", "1"], "--eval-fraction 1.0 must lie between 0 and 1"),
        (["--preset", "tiny", "--max-eval-windows", "0"], "--max-eval-windows 0 must be at least 1"),
        (["--model", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--model", "smollm2-135m-instruct", "--tokenizer", "smollm2-135m-instruct"], "--model brings its own"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--preset", "tiny", "--kv-sharing", "cla:4", "--init", "copy"], "--init is for --model"),
        (["--preset", "tiny", "--kv-window", "8"], "--kv-window is for sharing keys and values; add --kv-sharing"),
        (["--config", "absent.json"], "--config absent.json: No such file"),
        (["--config", "a.txt"], "--config a.txt is not JSON: Expecting value"),
        (["--config", "list.json"], "--config list.json must hold a JSON object"),
        (["--config", "gpt2.json"], "--config gpt2.json: model_type='gpt2' is not supported; supported: llama"),
        (["--preset", "tiny", "--eval-text", "-"], "--eval-text must name files, not -"),
        (["--preset", "tiny", "--eval-text", "b.txt"], "--eval-text b.txt: No such file"),
        (["--preset", "tiny", "--batch-size", "3"], "--batch-size 3 in --accumulation-steps 1 makes micro-batches"),
        (["--preset", "tiny", "--eval-text", "run/metrics.jsonl"], "run/metrics.jsonl would replace run/metrics.jsonl"),
        (["--model", "run/model"], "run/model would replace run/model, which this command reads"),
        (["--preset", "tiny", "--output", "a.txt"], "a.txt is not a directory"),
        ([], "one of the arguments --model --preset --config is required"),
    ],
)
def test_mistakes_end_the_command_with_status_2(tmp_path, capsys, monkeypatch, more, message):
    two = jax.devices()[:1] * 2
    monkeypatch.setattr(jax, "devices", lambda: two)
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("words")
    Path("list.json").write_text("[]")
    Path("run/model").mkdir(parents=True)
    Path("run/metrics.jsonl").touch()
    Path("gpt2.json").write_text('{"model_type": "gpt2"}')
    status, out, err = call(["train", "--text", "a.txt", "--output", "run", *more], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("hshare-jax: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ("33", "--sequence-length 33 must be at most the model's 32"),
        ("32", "--sequence-length 32 must be less than the text's 6 tokens"),
        ("4", "--sequence-length 4 makes one window of the text's 6 tokens"),
    ],
)
def test_texts_and_lengths_that_do_not_fit_are_named_before_weights_are_read(
    tmp_path, capsys, monkeypatch, length, message
):
    (tmp_path / "a.txt").write_text("words")
    files = ModelFiles(
        CONFIG, byte_tokenizer(), (), "tiny", "float32", lambda dtype, quantize, mesh: pytest.fail("weights are read")
    )
    monkeypatch.setattr("hshare_jax.models.pretrained.open_model", lambda name: files)
    given = ["train", "--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "run"), "--sequence-length", length]
    status, out, err = call([*given, "--model", "smollm2-135m-instruct"], capsys)
    assert (status, out) == (2, "")
    assert err.startswith("hshare-jax: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (FloatingPointError("loss is nan at step 3"), 1, "error: loss is nan at step 3"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 bytes"), 1, "error: out of memory; lower --batch-size, or raise --acc"),
        (MemoryError("5 bytes"), 1, "error: out of memory; lower --batch-size, or raise --accumulation-steps: 5 bytes"),
        (KeyboardInterrupt(), 130, "interrupted; the same command resumes from the last checkpoint"),
    ],
)
def test_failures_of_a_run_are_told_in_one_line(tmp_path, start, capsys, monkeypatch, error, status, message):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("hshare_jax.training.run.train", fail)
    found, out, err = call(arguments(tmp_path, "--model", start), capsys)
    assert (found, out) == (status, "")
    assert message in err
    assert err.count("\n") == 2  # the first line tells what is trained


def test_every_setting_is_an_option_with_a_help_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no help text is cut into lines
    status, out, _ = call(["train", "--help"], capsys)
    assert status == 0
    words = " ".join(out.split())
    for field in dataclasses.fields(TrainingSettings):
        assert f"--{field.name.replace('_', '-')} " in words
        assert field.metadata["help"] in words


def test_few_steps_have_a_short_warm_up_and_a_model_of_random_weights_has_its_own_name(
    tmp_path, start, capsys, monkeypatch
):
    found = {}

    def keep(model, data, settings, directory):
        found.update(name=model.name, warmup_steps=settings.warmup_steps)
        raise ValueError("far enough")

    monkeypatch.setattr("hshare_jax.training.run.train", keep)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    (tmp_path / "small.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64, **sizes}))
    (tmp_path / "a.txt").write_text("the man in the inn. " * 60)
    given = ["train", "--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "run"), "--sequence-length", "16"]
    given += ["--config", str(tmp_path / "small.json"), "--tokenizer", start, "--num-steps", "40"]
    status, _, err = call([*given, "--kv-sharing", "cla:1"], capsys)
    assert (status, found) == (1, {"name": "small+cla:1", "warmup_steps": 4}), err
