"""`train`: the loop over steps, with evaluation, metrics and checkpoints; a killed run goes on where it was.

What a step computes follows from the state before it and from its number, so a run that was killed and started again
ends with the same parameters, bit for bit, as one that was not (on the same machine, with the same devices).
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

from hshare_jax.files.records import Records
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.orbax_checkpoint import is_orbax_directory
from hshare_jax.models.pretrained import Model, save_model
from hshare_jax.training.checkpoints import load_train_state, remove_leftovers, save_train_state, seconds_of
from hshare_jax.training.config import TrainingConfig
from hshare_jax.training.data import TrainingData
from hshare_jax.training.loss import perplexity_of
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
# What may change from one start of a run to the next, for it changes no number of it.
_FREE = ("checkpoint_every", "keep_checkpoints")


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """How a run ended; losses are nats per token."""

    steps: int
    tokens: int  # predicted, by all steps together
    loss: float | None  # of the last step; None, as the times, where metrics.jsonl was lost
    eval_loss: float
    perplexity: float
    seconds: float | None  # of training alone: without compiling, evaluation and checkpoints
    tokens_per_second: float | None
    resumed_from: int  # the step of the checkpoint that this start went on from; 0 is the beginning
    model: str  # the directory of the trained model


def train(
    model: Model, data: TrainingData, settings: TrainingConfig, directory: str | os.PathLike[str]
) -> TrainingResult:
    """Returns how training ended; the trained model is in DIR/model, for `load_model`.

    DIR/metrics.jsonl gets a line for steps (kind "train") and evaluations (kind "eval"), DIR/step_000123 is a
    checkpoint. Where DIR has checkpoints of the same run, it goes on from the newest. Progress is drawn on standard
    error where that is a terminal.

    Args:
        model: what to start from, of `load_model` or `new_model`; it stays as it is.
        data: of `split_windows`.
        settings: the run's.
        directory: the run's own; it is made.

    Raises:
        ValueError: settings, model and data do not fit, or are not those that the directory's run began with.
        CheckpointError: the newest checkpoint is damaged; the message says what to delete to go on from the one before.
        OSError: something cannot be written; the last good checkpoint stays.
        FloatingPointError: loss or gradients are no longer finite numbers.
    """
    directory = Path(directory).expanduser().absolute()
    _check(model, data, settings, directory)
    mesh = data_mesh(settings)
    study = _study(model, data, settings)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        return _train(model, data, settings, directory, mesh, study)


def check_length(model: ModelConfig, settings: TrainingConfig) -> None:
    """Raises ValueError for windows longer than the model has positions."""
    length, most = settings.sequence_length, model.max_positions
    if length > most:
        raise ValueError(f"sequence_length={length} must be at most the model's {most} positions")


def _train(
    model: Model, data: TrainingData, settings: TrainingConfig, directory: Path, mesh: Mesh, study: dict[str, Any]
) -> TrainingResult:
    loaded = load_train_state(directory, state_shapes(model.params, settings), study)
    done = -1 if loaded is None else int(loaded.step)
    metrics = Records(directory / METRICS, study, keys=("kind", "step"))
    has_model = (directory / MODEL).exists()
    if loaded is None and has_model and {"kind": "eval", "step": settings.num_steps} in metrics:
        return _result(metrics, settings, settings.num_steps, directory)  # finished; its checkpoints were deleted
    if loaded is None and not metrics.lines and has_model:
        raise ValueError(
            f"{directory / MODEL} is there already, and no run that made it; the trained model would replace it: name "
            "another directory"
        )
    remove_leftovers(directory)
    metrics.keep(lambda line: line["step"] <= done)
    state = init_state(model.params, settings, mesh) if loaded is None else replicate(loaded, mesh)
    del loaded
    params = _run_steps(state, model.config, data, settings, directory, mesh, study, metrics)
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


def _run_steps(
    state: TrainState,
    model: ModelConfig,
    data: TrainingData,
    settings: TrainingConfig,
    directory: Path,
    mesh: Mesh,
    study: dict[str, Any],
    metrics: Records,
) -> dict[str, Any]:
    """Returns the parameters after the last step, on the host; the state is donated."""
    first, last, held_out = int(state.step), settings.num_steps, data.held_out()

    def place(step: int) -> Array:
        windows = data.batch(step, batch_size=settings.batch_size, seed=settings.seed)
        return place_batch(windows, settings, mesh)

    def add_evaluation(step: int) -> None:
        if {"kind": "eval", "step": step} in metrics:
            return
        loss = evaluate(state.params, held_out, model=model, settings=settings, mesh=mesh)
        _check_finite(step, {"loss": loss}, directory)
        found = {"loss": loss, "perplexity": perplexity_of(loss), "tokens": held_out[:, 1:].size}
        metrics.append({"kind": "eval", "step": step, **found, "seconds": round(seconds, 3)})

    seconds = seconds_of(directory)  # of training alone
    if first in (0, last):
        add_evaluation(first)
    if first == last:
        return jax.tree.map(np.asarray, state.params)
    # Compiled beforehand, so that the clock counts training alone.
    compiled = train_step.lower(state, place(first), model=model, settings=settings, mesh=mesh).compile()
    began, logged = time.perf_counter(), (first, seconds)
    # disable=None: a bar only where stderr is a terminal.
    with tqdm(total=last, initial=first, desc="training", unit="step", file=sys.stderr, disable=None) as bar:
        for step in range(first + 1, last + 1):
            state, found = compiled(state, place(step - 1))
            bar.update()
            every = (settings.log_every, settings.eval_every, settings.checkpoint_every)
            is_logged, is_evaluated, is_saved = (step % interval == 0 or step == last for interval in every)
            if not (is_logged or is_evaluated or is_saved):
                continue  # steps follow one another on the device without a pause
            line = {name: float(found[name]) for name in ("loss", "learning_rate", "grad_norm")}
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            _check_finite(step, line, directory)
            if is_logged:
                speed = (step - logged[0]) * settings.tokens_per_step / (seconds - logged[1])
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:,.0f} tokens/s")
                times = {"seconds": round(seconds, 3), "tokens_per_second": round(speed, 1)}
                tokens = step * settings.tokens_per_step
                metrics.append({"kind": "train", "step": step, **line, "tokens": tokens, **times})
                logged = (step, seconds)
            if is_evaluated:
                add_evaluation(step)
            if is_saved:
                save_train_state(directory, state, study, seconds=seconds, keep=settings.keep_checkpoints)
            began = time.perf_counter()
    return jax.tree.map(np.asarray, state.params)


def _check(model: Model, data: TrainingData, settings: TrainingConfig, directory: Path) -> None:
    length = settings.sequence_length
    if data.sequence_length != length:
        raise ValueError(f"sequence_length={length} must be that of the data's windows, {data.sequence_length}")
    check_length(model.config, settings)
    highest = int(max(data.windows.max(), data.eval_windows.max()))
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"the text holds token {highest}, beyond the model's vocab_size={model.config.vocab_size}; "
            "read it with the model's own tokeniser"
        )
    if (directory / MODEL).exists() and not is_orbax_directory(directory / MODEL):
        raise ValueError(f"{directory / MODEL} is no checkpoint of this library; name another directory")


def _check_finite(step: int, line: dict[str, float], directory: Path) -> None:
    for name, value in line.items():
        if not math.isfinite(value):
            way_out = "lower learning_rate, or lengthen warmup_steps" if step else "start from other weights"
            raise FloatingPointError(
                f"{name} is {value} at step {step}; {way_out}, and name another directory than {directory}"
            )


def _study(model: Model, data: TrainingData, settings: TrainingConfig) -> dict[str, Any]:
    """Returns what tells a run from others: all that its numbers follow from."""
    fixed = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _FREE}
    return {
        "training": fixed,
        "model": dataclasses.asdict(model.config),
        "first_weights": model.identity,
        "text": data.fingerprint,
    }


def _result(metrics: Records, settings: TrainingConfig, resumed_from: int, directory: Path) -> TrainingResult:
    lines = {line["kind"]: line for line in metrics.lines}  # the last of each kind
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
