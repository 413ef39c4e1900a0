"""A run: killed and resumed it equals an uninterrupted one, damage is named, and its files are whole."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from comparing import assert_equal_trees, flipped
from orbax.checkpoint import v1 as ocp
from tiny_training import CONFIG, SETTINGS, tiny_data, tiny_model, tiny_run

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import write_checksums
from hshare_jax.files.figures import save
from hshare_jax.models.pretrained import load_model
from hshare_jax.training.checkpoints import checkpoints, load_train_state
from hshare_jax.training.curves import plot_training, read_metrics
from hshare_jax.training.run import train
from hshare_jax.training.start import new_model
from hshare_jax.training.step import state_shapes

PROGRAM = Path(__file__).parent.parent / "support" / "tiny_training.py"
KILLS = int(os.environ.get("HSHARE_JAX_KILLS", "3"))
SHORT = dataclasses.replace(SETTINGS, num_steps=2, warmup_steps=0)
OPERATIONS = 340  # file operations of a whole run; some 48 write one checkpoint


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "whole"
    tiny_run(directory)
    return directory


def copy_of(whole: Path, tmp_path: Path, *, without: tuple[int, ...] = ()) -> Path:
    directory = tmp_path / "copy"
    shutil.copytree(whole, directory)
    for step in without:
        shutil.rmtree(directory / f"step_{step:06d}")
    return directory


def timeless(directory: Path) -> list[dict]:
    """The lines of the metrics without the times."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in line if key not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same_run(found: Path, expected: Path) -> None:
    assert timeless(found) == timeless(expected)
    assert_equal_trees(load_model(found / "model").params, load_model(expected / "model").params)
    study = json.loads((checkpoints(expected)[-1] / "run.json").read_text())["study"]
    shapes = state_shapes(tiny_model().params, SETTINGS)
    states = [jax.tree.leaves(load_train_state(directory, shapes, study)) for directory in (found, expected)]
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in expected.iterdir())


def test_a_run_leaves_its_metrics_its_last_checkpoints_and_its_model(whole):
    assert sorted(path.name for path in whole.iterdir()) == ["metrics.jsonl", "model", "step_000020", "step_000024"]
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(2, 25, 2))
    evaluated = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluated] == [0, 8, 16, 24]
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    np.testing.assert_allclose([np.exp(line["loss"]) for line in evaluated], [line["perplexity"] for line in evaluated])
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["tokens"] == 24 * 4 * 12
    assert 0 < last["seconds"] < 60
    assert load_model(whole / "model").config == CONFIG


@pytest.mark.parametrize("seed", range(KILLS // 3))
def test_a_run_that_is_killed_at_random_moments_equals_one_that_is_not(whole, tmp_path, seed):
    command = [sys.executable, str(PROGRAM), str(tmp_path / "killed")]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    start = functools.partial(subprocess.run, env=os.environ | cache, capture_output=True, text=True)
    moments = random.Random(seed)
    for kill in range(3):  # each restart has fewer operations left
        moment = moments.randint(8, OPERATIONS // (kill + 1))
        killed = start([*command, str(moment)])
        assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
    done = start(command)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "killed", whole)


def test_going_on_from_an_earlier_checkpoint_equals_the_whole_run(whole, tmp_path):
    directory = copy_of(whole, tmp_path, without=(24,))
    result = tiny_run(directory)
    assert result.resumed_from == 20
    assert_same_run(directory, whole)


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    directory = copy_of(whole, tmp_path)
    result = tiny_run(directory)
    assert result.resumed_from == result.steps == 24
    assert result.loss == timeless(whole)[-2]["loss"]
    assert result.eval_loss == timeless(whole)[-1]["loss"]
    assert_same_run(directory, whole)


def test_a_finished_run_without_checkpoints_is_not_trained_again(whole, tmp_path):
    directory = copy_of(whole, tmp_path, without=(20, 24))
    result = tiny_run(directory)
    assert (result.resumed_from, result.eval_loss) == (24, timeless(whole)[-1]["loss"])
    assert timeless(directory) == timeless(whole)
    assert not checkpoints(directory)


def test_time_is_not_lost_where_a_run_goes_on(tmp_path):
    settings = dataclasses.replace(SETTINGS, log_every=24, eval_every=24)
    tiny_run(tmp_path / "run", settings)
    shutil.rmtree(tmp_path / "run" / "step_000024")
    until = json.loads((tmp_path / "run" / "step_000020" / "run.json").read_text())["seconds"]
    result = tiny_run(tmp_path / "run", settings)
    assert result.resumed_from == 20
    assert result.seconds is not None
    assert result.seconds > until > 0  # though the metrics have no line for the earlier steps


@pytest.mark.parametrize("name", ["run.json", "arrays/state/manifest.ocdbt", "arrays/_CHECKPOINT_METADATA"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_one_before_it(whole, tmp_path, name):
    directory = copy_of(whole, tmp_path)
    path = directory / "step_000024" / name
    path.write_bytes(flipped(path.read_bytes(), 40, 2))
    with pytest.raises(CheckpointError) as caught:
        tiny_run(directory)
    assert f"{path} is damaged" in str(caught.value)
    assert str(caught.value).endswith(
        f"delete {path.parents[len(Path(name).parts) - 1]} to go on from {directory}/step_000020"
    )
    shutil.rmtree(directory / "step_000020")
    with pytest.raises(CheckpointError, match="to start from the beginning: there is no earlier one"):
        tiny_run(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1,\n oops', r"it is not JSON \(.* line 2 column 2 "),
        ('{"format": 1}', "it must be an object with format and study"),
        ('{"format": 1, "study": {}, "seconds": "long"}', "seconds='long' must be a number"),
    ],
)
def test_facts_of_a_checkpoint_that_somebody_edited_are_named(whole, tmp_path, text, message):
    directory = copy_of(whole, tmp_path)
    (directory / "step_000024" / "run.json").write_text(text)
    write_checksums(directory / "step_000024")
    with pytest.raises(CheckpointError, match=rf"step_000024/run.json is damaged: {message}.*; delete .*/step_000024 "):
        tiny_run(directory)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "train", "step": 9, "loss": "low"}', ":3: loss='low' must be a number; repair this line"),
        ('{"kind": "eval", "loss": 1.0}', ":3: step=None must be a number"),
        ('{"kind": ', r":3 is not JSON \("),
        ("[" * 10_000, r":3 is not JSON \(it is nested too deeply\)"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(whole, tmp_path, line, message):
    lines = (whole / "metrics.jsonl").read_text().splitlines()[:2]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, line, '{"kind": "of another version"}', ""]))
    with pytest.raises(ValueError, match=f"metrics.jsonl{message}"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_full_disk_is_named_and_leaves_the_last_good_checkpoint(whole, tmp_path, monkeypatch):
    directory = copy_of(whole, tmp_path, without=(24,))

    def full(path: str, arrays: dict) -> None:
        Path(path).mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp, "save", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        tiny_run(directory)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(directory / "step_000024")
    assert str(directory / "step_000020") in str(caught.value)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(directory)] == ["step_000020"]
    assert not list(directory.glob(".*"))
    tiny_run(directory)
    assert_same_run(directory, whole)


def test_another_run_is_refused_in_the_directory_of_one(whole, tmp_path):
    directory = copy_of(whole, tmp_path)
    with pytest.raises(
        ValueError, match=r"step_000024 is a checkpoint for beta1=0.9, and this run has beta1=0.8; give"
    ):
        tiny_run(directory, dataclasses.replace(SETTINGS, beta1=0.8))
    with pytest.raises(ValueError, match="first_weights="):
        train(new_model(CONFIG, None, seed=4), tiny_data(), SETTINGS, directory)
    for path in checkpoints(directory):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl holds results for seed=0, and this run has seed=1"):
        tiny_run(directory, dataclasses.replace(SETTINGS, seed=1))
    assert timeless(directory) == timeless(whole)


def test_how_often_checkpoints_are_written_may_change(whole, tmp_path):
    directory = copy_of(whole, tmp_path, without=(24,))
    tiny_run(directory, dataclasses.replace(SETTINGS, checkpoint_every=2, keep_checkpoints=1))
    assert [path.name for path in checkpoints(directory)] == ["step_000024"]
    assert timeless(directory)[1:] == timeless(whole)[1:]


def test_weights_that_are_no_numbers_stop_the_run_before_a_checkpoint(tmp_path):
    model = tiny_model()
    broken = dataclasses.replace(model, params={**model.params, "embedding": model.params["embedding"] * np.nan})
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        train(broken, tiny_data(), SETTINGS, tmp_path)
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 8}, "sequence_length=8 must be that of the data's windows, 12"),
        ({"batch_size": 3, "accumulation_steps": 1}, None),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, changes, message):
    settings = dataclasses.replace(SETTINGS, **changes)
    if message is None:
        config = dataclasses.replace(CONFIG, vocab_size=40)
        with pytest.raises(ValueError, match="the text holds token 47, beyond the model's vocab_size=40"):
            train(new_model(config, None), tiny_data(), settings, tmp_path / "run")
    else:
        with pytest.raises(ValueError, match=message):
            tiny_run(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


def test_two_devices_train_as_one(whole, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    command = [sys.executable, str(PROGRAM), str(tmp_path / "two")]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(timeless(tmp_path / "two")[1:], timeless(whole)[1:], strict=True):
        # Sums are taken in another order, and 24 steps of AdamW, which divides small by small numbers, amplify this.
        np.testing.assert_allclose(ours.pop("loss"), theirs.pop("loss"), rtol=1e-4)
        assert (ours["kind"], ours["step"], ours["tokens"]) == (theirs["kind"], theirs["step"], theirs["tokens"])


def test_the_plot_shows_every_loss(whole, tmp_path):
    lines = read_metrics(whole / "metrics.jsonl")
    figure = plot_training(lines, subject="tiny")
    trained, evaluated = figure.axes[0].get_lines()
    assert np.asarray(trained.get_ydata()).tolist() == [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.asarray(evaluated.get_xdata()).tolist() == [0, 8, 16, 24]
    save(figure, tmp_path / "metrics.svg")
    assert (tmp_path / "metrics.svg").stat().st_size > 1000
    with pytest.raises(ValueError, match="no step of this run"):
        plot_training([])


def test_files_that_the_run_did_not_write_stay(tmp_path):
    (tmp_path / ".model.backup").mkdir()
    (tmp_path / ".step_notes").write_text("mine")
    for draft in (".model.abcd1234", ".metrics.jsonl.abcd1234"):
        (tmp_path / draft).mkdir()  # as a kill leaves them
    tiny_run(tmp_path, SHORT)
    assert (tmp_path / ".model.backup").is_dir()
    assert (tmp_path / ".step_notes").read_text() == "mine"
    assert not list(tmp_path.glob(".*.abcd1234"))


def test_a_model_that_no_run_made_is_not_replaced(tmp_path):
    tiny_run(tmp_path / "first", SHORT)
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "model").rename(tmp_path / "second" / "model")
    with pytest.raises(ValueError, match="is there already, and no run that made it"):
        tiny_run(tmp_path / "second", SHORT)


def test_two_processes_do_not_train_in_one_directory(tmp_path):
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process trains in"):
            tiny_run(tmp_path, SHORT)
    finally:
        os.close(lock)


def test_training_loads_no_sparse_method_no_attention_kernel_and_no_evaluation():
    program = "import sys, hshare_jax.training.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    strangers = ("hshare_jax.methods", "hshare_jax.evaluation", "jax.experimental.pallas", "hshare_jax.kernels.pallas")
    strangers += ("hshare_jax.kernels.native_attention", "hshare_jax.kernels.reference_attention")
    assert "hshare_jax.training.loss" in done.stdout.split()
    assert not [name for name in done.stdout.split() if name.startswith(strangers)]
