"""`train`: the loop over steps, with evaluation, metrics and checkpoints. A run that was killed resumes.

The state before a step and the step's number decide everything that the step computes. So a run that was killed and
resumed ends with the same parameters, bit for bit, as a run that was not (on the same machine, with the same devices).
"""

import contextlib
import dataclasses
import fcntl
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from hshare_jax.errors import SettingError
from hshare_jax.files.records import Records
from hshare_jax.files.texts import check_path
from hshare_jax.kernels.block_weights import floats_of
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.orbax_checkpoint import is_orbax_directory
from hshare_jax.models.pretrained import Model, save_model
from hshare_jax.training.checkpoints import load_train_state, remove_leftovers, save_train_state, seconds_of
from hshare_jax.training.data import TrainingData
from hshare_jax.training.loss import perplexity_of
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.step import (
    TrainState,
    data_mesh,
    evaluate,
    init_state,
    place_batch,
    replicate,
    state_shapes,
    train_step,
)

METRICS, MODEL = "metrics.jsonl", "model"
# Settings that may change when a run is resumed, because no number of the run depends on them.
_FREE = ("checkpoint_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a run ended. Losses are in nats per token."""

    steps: int
    tokens: int  # predicted by all steps together
    loss: float | None  # of the last step; the loss and both times are None if metrics.jsonl was lost
    eval_loss: float
    perplexity: float
    seconds: float | None  # spent on training steps alone, without compilation, evaluation and checkpoints
    tokens_per_second: float | None
    resumed_from: int  # the step of the checkpoint from which this call resumed; 0 is the beginning
    model: str  # the directory of the trained model


def train(
    model: Model, data: TrainingData, settings: TrainingSettings, directory: str | os.PathLike[str]
) -> TrainingResult:
    """Trains a model, or resumes its training, and writes the trained model to DIR/model, for `load_model`.

    DIR/metrics.jsonl gets one line for each logged step (kind "train") and each evaluation (kind "eval"). Checkpoints
    are DIR/step_000123. If DIR holds checkpoints of the same run, training resumes from the newest. A progress bar is
    drawn if standard error is a terminal.

    Args:
        model: the model to start from, from `load_model` or `new_model`. It is not changed. Weights in few bits are
            trained as floats.
        data: the windows, from `split_windows`.
        settings: the settings of the run.
        directory: the run's directory, DIR. It is created if necessary. No two runs can share a directory.

    Raises:
        ValueError: settings, model and data do not fit together, the directory holds a run that began with others, or
            its name is not UTF-8.
        CheckpointError: the newest checkpoint is damaged. The message says what to delete to resume from the previous.
        OSError: a file cannot be written. The last good checkpoint stays.
        FloatingPointError: the loss or the gradients are no longer finite numbers.
    """
    check_path(directory)
    directory = Path(os.path.expanduser(directory)).absolute()
    model = dataclasses.replace(model, params=floats_of(model.params))
    _check(model, data, settings, directory)
    mesh = data_mesh(settings)
    study = _study(model, data, settings)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        return _train(model, data, settings, directory, mesh, study)


def check_length(config: ModelConfig, settings: TrainingSettings) -> None:
    """Raises SettingError for windows that are longer than the model has positions."""
    length, most = settings.sequence_length, config.max_positions
    if length > most:
        raise SettingError("sequence_length", length, f"must be at most the model's {most} positions")


def _train(
    model: Model, data: TrainingData, settings: TrainingSettings, directory: Path, mesh: Mesh, study: dict[str, Any]
) -> TrainingResult:
    loaded = load_train_state(directory, state_shapes(model.params, settings), study)
    done = -1 if loaded is None else int(loaded.step)
    metrics = Records(directory / METRICS, study, keys=("kind", "step"))
    has_model = (directory / MODEL).exists()
    if loaded is None and has_model and {"kind": "eval", "step": settings.num_steps} in metrics:
        # The run is finished, and somebody has deleted its checkpoints.
        return _result(metrics, settings, settings.num_steps, directory)
    if loaded is None and not metrics.lines and has_model:
        raise ValueError(
            f"{directory / MODEL} is there already, and no run that made it; the trained model would replace it: name "
            "another directory"
        )
    remove_leftovers(directory)
    metrics.keep(lambda line: line["step"] <= done)
    state = init_state(model.params, settings, mesh) if loaded is None else replicate(loaded, mesh)
    del loaded
    params = _Loop(model.config, data, settings, directory, mesh, study, metrics).run(state)
    save_model(dataclasses.replace(model, params=params), directory / MODEL, overwrite=True)
    return _result(metrics, settings, max(done, 0), directory)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from training in the same directory."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {directory}; wait for it, or name another directory") from None
        yield
    finally:
        os.close(lock)


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """The loop over steps, and everything that the loop reads and writes."""

    config: ModelConfig
    data: TrainingData
    settings: TrainingSettings
    directory: Path
    mesh: Mesh
    study: dict[str, Any]
    metrics: Records

    def run(self, state: TrainState) -> dict[str, Any]:
        """Runs all steps that are left. Returns the parameters after the last step, on the host. Donates the state."""
        settings, first, last = self.settings, int(state.step), self.settings.num_steps
        seconds = seconds_of(self.directory)  # spent on training steps alone
        if first in (0, last):
            self._evaluate(first, state, seconds)
        if first == last:
            return jax.tree.map(np.asarray, state.params)
        # Compiled beforehand, so that the clock counts training alone.
        compiled = train_step.lower(
            state, self._windows(first), config=self.config, settings=settings, mesh=self.mesh
        ).compile()
        began, logged = time.perf_counter(), (first, seconds)
        # disable=None: a bar only if stderr is a terminal.
        with tqdm(total=last, initial=first, desc="training", unit="step", file=sys.stderr, disable=None) as bar:
            for step in range(first + 1, last + 1):
                state, found = compiled(state, self._windows(step - 1))
                bar.update()
                every = (settings.log_every, settings.eval_every, settings.checkpoint_every)
                is_logged, is_evaluated, is_saved = (step % interval == 0 or step == last for interval in every)
                if not (is_logged or is_evaluated or is_saved):
                    continue  # without waiting, so that steps follow one another on the device without a pause
                line = {name: float(found[name]) for name in ("loss", "learning_rate", "grad_norm")}
                jax.block_until_ready(state)
                seconds += time.perf_counter() - began
                _check_finite(step, line, self.directory)
                if is_logged:
                    speed = self._log(step, line, seconds, since=logged)
                    bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s")
                    logged = (step, seconds)
                if is_evaluated:
                    self._evaluate(step, state, seconds)
                if is_saved:
                    keep = settings.keep_checkpoints
                    save_train_state(self.directory, state, self.study, seconds=seconds, keep=keep)
                began = time.perf_counter()
        return jax.tree.map(np.asarray, state.params)

    def _windows(self, step: int) -> Array:
        """The windows that training step `step`, counted from 0, reads, on the devices."""
        windows = self.data.batch(step, batch_size=self.settings.batch_size, seed=self.settings.seed)
        return place_batch(windows, self.settings, self.mesh)

    def _log(self, step: int, line: dict[str, float], seconds: float, *, since: tuple[int, float]) -> float:
        """Writes the metrics of a step. Returns the speed, in tokens per second, since the (step, seconds) `since`."""
        size = self.settings.tokens_per_step
        speed = (step - since[0]) * size / (seconds - since[1])
        times = {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}
        self.metrics.append({"kind": "train", "step": step, **line, "tokens": step * size, **times})
        return speed

    def _evaluate(self, step: int, state: TrainState, seconds: float) -> None:
        """Evaluates the parameters after a step and writes the result, unless the metrics already hold it."""
        if {"kind": "eval", "step": step} in self.metrics:
            return
        held_out = self.data.held_out()
        loss = evaluate(state.params, held_out, config=self.config, settings=self.settings, mesh=self.mesh)
        _check_finite(step, {"loss": loss}, self.directory)
        found = {"loss": loss, "perplexity": perplexity_of(loss), "tokens": held_out[:, 1:].size}
        self.metrics.append({"kind": "eval", "step": step, **found, "seconds": round(seconds, 3)})


def _check(model: Model, data: TrainingData, settings: TrainingSettings, directory: Path) -> None:
    """Raises ValueError unless model, data, settings and directory fit together."""
    length = settings.sequence_length
    if data.sequence_length != length:
        raise SettingError("sequence_length", length, f"must be that of the data's windows, {data.sequence_length}")
    check_length(model.config, settings)
    highest = int(max(data.windows.max(), data.eval_windows.max()))
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"the text holds token {highest}, beyond the model's vocab_size={model.config.vocab_size}; "
            "read it with the model's own tokenizer"
        )
    if (directory / MODEL).exists() and not is_orbax_directory(directory / MODEL):
        raise ValueError(f"{directory / MODEL} is no checkpoint of this library; name another directory")


def _check_finite(step: int, line: dict[str, float], directory: Path) -> None:
    """Raises FloatingPointError if a metric of a step is not a finite number."""
    for name, value in line.items():
        if not math.isfinite(value):
            way_out = "lower learning_rate, or lengthen warmup_steps" if step else "start from other weights"
            raise FloatingPointError(
                f"{name} is {value} at step {step}; {way_out}, and name another directory than {directory}"
            )


def _study(model: Model, data: TrainingData, settings: TrainingSettings) -> dict[str, Any]:
    """The facts that identify a run: everything on which a number of the run depends."""
    fixed = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
    return {
        "training": fixed,
        "model": dataclasses.asdict(model.config),
        "first_weights": model.identity,
        "text": data.fingerprint,
    }


def _result(metrics: Records, settings: TrainingSettings, resumed_from: int, directory: Path) -> TrainingResult:
    """The result of a finished run, read from the run's metrics."""
    lines = {line["kind"]: line for line in metrics.lines}  # the last line of each kind
    last, evaluation, steps = lines.get("train", {}), lines["eval"], settings.num_steps
    tokens, seconds = steps * settings.tokens_per_step, last.get("seconds")
    return TrainingResult(
        steps=steps,
        tokens=tokens,
        loss=last.get("loss"),
        eval_loss=evaluation["loss"],
        perplexity=evaluation["perplexity"],
        seconds=seconds,
        tokens_per_second=round(tokens / seconds, 1) if seconds else None,
        resumed_from=resumed_from,
        model=str(directory / MODEL),
    )
