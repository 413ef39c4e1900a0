"""Checkpoints of a run: DIR/step_000123 with every array, the run's settings and checksums.

    run.json     format, step, seconds of training, and what tells this run from others: settings, model, text
    arrays/      Orbax: parameters, optimiser state, step
    SHA256SUMS   of all the files above

Each is written beside its final name, flushed and renamed, and old ones go only then: a kill at any moment, or a full
disk, leaves the last good one.
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
from hshare_jax.files.checksums import verify_all
from hshare_jax.files.records import difference
from hshare_jax.models.orbax_checkpoint import orbax_context, whole_directory, write_arrays
from hshare_jax.training.step import TrainState

_RUN, _ARRAYS, _FORMAT = "run.json", "arrays", 1
_NAME = re.compile(r"step_(\d{6,})")
# As drafts of what a run writes are called.
_LEFTOVER = re.compile(r"\.(step_\d{6,}|model|metrics\.jsonl|metrics\.png)\.([a-z0-9_]{8}|old)")


def checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints of a run, the oldest first."""
    found = ((match, path) for path in directory.glob("step_*") if (match := _NAME.fullmatch(path.name)))
    return [path for _, path in sorted((int(match[1]), path) for match, path in found)]


def save_train_state(directory: Path, state: TrainState, study: dict[str, Any], *, seconds: float, keep: int) -> Path:
    """Returns the checkpoint that it wrote of a state; then only the `keep` newest stay.

    Args:
        directory: of the run.
        state: what to write.
        study: what tells this run from others, as JSON.
        seconds: how long it has trained.
        keep: how many checkpoints stay.

    Raises:
        OSError: it cannot be written. The checkpoints that are there stay.
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
        old.rename(doomed)  # at once: what a kill leaves of it is no damaged checkpoint
        shutil.rmtree(doomed)
    return path


def load_train_state(directory: Path, shapes: TrainState, study: dict[str, Any]) -> TrainState | None:
    """Returns the state of a run's newest checkpoint, NumPy arrays at its leaves; None where it has no checkpoint.

    Args:
        directory: of the run.
        shapes: of `state_shapes`.
        study: what tells this run from others; the checkpoint's must be the same.

    Raises:
        CheckpointError: the checkpoint is damaged. The message names the file, and the checkpoint before it.
        ValueError: it is one of another run.
    """
    *earlier, path = checkpoints(directory.absolute()) or [None]
    if path is None:
        return None
    try:
        verify_all(path)
        run = json.loads((path / _RUN).read_bytes())
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
    stored = {
        name: (tuple(array.shape), array.dtype) for name, array in ocp.metadata(str(path / _ARRAYS)).metadata.items()
    }
    if stored != {name: (array.shape, array.dtype) for name, array in wanted.items()}:  # Orbax would cast in silence
        raise CheckpointError(f"{path / _ARRAYS} holds other arrays than this version trains; train with the old one")
    with orbax_context():
        arrays = ocp.load(str(path / _ARRAYS), wanted)
    return jax.tree.unflatten(jax.tree.structure(shapes), [np.asarray(arrays[name]) for name in wanted])


def seconds_of(directory: Path) -> float:
    """Returns how long a run had trained at its newest checkpoint; 0 without one."""
    *_, path = [None, *checkpoints(directory)]
    return 0.0 if path is None else json.loads((path / _RUN).read_bytes()).get("seconds", 0.0)


def remove_leftovers(directory: Path) -> None:
    """Deletes what kills have left half-written or half-deleted in a run's directory, and nothing else."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)


def _named(state: TrainState) -> dict[str, Any]:
    """Returns the leaves by their paths in the tree: params.layers_0.qkv.weight."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
