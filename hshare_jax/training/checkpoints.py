"""Checkpoints of a run. The directory DIR/step_000123 holds every array, the run's settings and checksums.

    run.json     format, step, seconds of training, and the study: settings, model and text, which identify the run
    arrays/      parameters, optimiser state and step, written by Orbax
    SHA256SUMS   checksums of all the files above

A checkpoint is written beside its final name, flushed to the disk and renamed. Only then are old checkpoints deleted.
So a kill at any moment, or a full disk, leaves the last good checkpoint.

Orbax's `training.Checkpointer` (0.12.8) does not replace this file, because it loads flipped bits without an error,
still lists a checkpoint whose deletion was interrupted, and does not flush the rename to the disk.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hshare_jax.errors import CheckpointError
from hshare_jax.files.atomic import whole_directory
from hshare_jax.files.checksums import verify_all
from hshare_jax.files.records import difference
from hshare_jax.files.texts import parse_json
from hshare_jax.models.orbax_checkpoint import orbax_context, write_arrays
from hshare_jax.training.step import TrainState

_RUN, _ARRAYS, _FORMAT = "run.json", "arrays", 1
_NAME = re.compile(r"step_(\d{6,})")
# The names of unfinished files and directories: drafts end in random letters, checkpoints being deleted in `.old`.
_LEFTOVER = re.compile(r"\.(step_\d{6,}|model|metrics\.jsonl|metrics\.png)\.([a-z0-9_]{8}|old)")


def checkpoints(directory: Path) -> list[Path]:
    """The directories of a run's checkpoints, the oldest first."""
    found = ((match, path) for path in directory.glob("step_*") if (match := _NAME.fullmatch(path.name)))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def save_train_state(directory: Path, state: TrainState, study: dict[str, Any], *, seconds: float, keep: int) -> Path:
    """Writes a checkpoint, then deletes all checkpoints except the `keep` newest. Returns the new checkpoint's path.

    Args:
        directory: the run's directory.
        state: the state to write.
        study: the facts that identify this run. They are written as JSON.
        seconds: how long the run has trained.
        keep: how many checkpoints to keep.

    Raises:
        OSError: the checkpoint cannot be written. The earlier checkpoints stay.
    """
    directory, step = directory.absolute(), int(state.step)
    path = directory / f"step_{step:06d}"
    try:
        with whole_directory(path) as draft:
            write_arrays(draft / _ARRAYS, {name: np.asarray(leaf) for name, leaf in _named(state).items()})
            run = {"format": _FORMAT, "step": step, "seconds": round(seconds, 3), "study": study}
            (draft / _RUN).write_text(json.dumps(run, indent=1) + "\n")
    except OSError as error:
        last = (checkpoints(directory) or ["none, it is the first"])[-1]
        message = f"the checkpoint could not be written ({error.strerror or error}); the last good one is {last}"
        raise OSError(error.errno, message, str(path)) from error
    for old in checkpoints(directory)[:-keep]:
        doomed = old.with_name(f".{old.name}.old")
        old.rename(doomed)  # so that a kill while files are being deleted leaves no damaged checkpoint under its name
        shutil.rmtree(doomed)
    return path


def load_train_state(directory: Path, shapes: TrainState, study: dict[str, Any]) -> TrainState | None:
    """Reads the state of a run's newest checkpoint, with NumPy arrays at its leaves. None if there is no checkpoint.

    Args:
        directory: the run's directory.
        shapes: the tree of shapes to read, from `state_shapes`.
        study: the facts that identify this run. The checkpoint must hold the same.

    Raises:
        CheckpointError: the checkpoint is damaged. The message names the file, and the checkpoint before this one.
        ValueError: the checkpoint belongs to another run.
    """
    *earlier, path = checkpoints(directory.absolute()) or [None]
    if path is None:
        return None
    try:
        verify_all(path, (_RUN, _ARRAYS))
        run = _read_run(path)
        if run["format"] != _FORMAT:
            raise CheckpointError(f"{path / _RUN} has format {run['format']}; this version reads {_FORMAT}")
    except CheckpointError as error:
        way_out = f"go on from {earlier[-1]}" if earlier else "start from the beginning: there is no earlier one"
        raise CheckpointError(f"{error}; delete {path} to {way_out}") from error
    study = json.loads(json.dumps(study))
    if run["study"] != study:
        raise ValueError(
            f"{path} is a checkpoint {difference(run['study'], study)}; give the same settings, model and text to go "
            "on, or name another directory"
        )
    wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in _named(shapes).items()}
    found = ocp.metadata(str(path / _ARRAYS)).metadata
    stored = {name: (tuple(array.shape), array.dtype) for name, array in found.items()}
    # Checked here, because Orbax would cast another dtype without an error.
    if stored != {name: (array.shape, array.dtype) for name, array in wanted.items()}:
        raise CheckpointError(f"{path / _ARRAYS} holds other arrays than this version trains; train with the old one")
    with orbax_context():
        arrays = ocp.load(str(path / _ARRAYS), wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [np.asarray(arrays[name]) for name in wanted])


def seconds_of(directory: Path) -> float:
    """How long a run had trained when its newest checkpoint was written; 0 without a checkpoint."""
    *_, path = [None, *checkpoints(directory)]
    return 0.0 if path is None else _read_run(path).get("seconds", 0.0)


def _read_run(path: Path) -> dict[str, Any]:
    """What run.json of a checkpoint holds; CheckpointError if it is damaged and SHA256SUMS was made anew."""
    try:
        run = parse_json((path / _RUN).read_bytes())
    except ValueError as error:  # its message names the line
        raise CheckpointError(f"{path / _RUN} is damaged: it is not JSON ({error})") from error
    if not isinstance(run, dict) or "format" not in run or not isinstance(run.get("study"), dict):
        raise CheckpointError(f"{path / _RUN} is damaged: it must be an object with format and study")
    if not isinstance(run.get("seconds", 0.0), int | float):
        raise CheckpointError(f"{path / _RUN} is damaged: seconds={run['seconds']!r} must be a number")
    return run


def remove_leftovers(directory: Path) -> None:
    """Deletes what earlier kills left half written or half deleted in a run's directory. All other files stay."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves of a state, named by their paths in the tree, such as params.layers_0.qkv.weight."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
