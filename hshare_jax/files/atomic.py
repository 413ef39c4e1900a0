"""Files and directories that are written completely or not at all, even if a kill or a full disk interrupts.

Both are written as a draft beside their final name, flushed to the disk and then renamed. The draft lies in a directory
called `.<final name>.` followed by random letters. A kill leaves that directory behind, and nothing else.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hshare_jax.files.checksums import write_checksums


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file: yields the path of a draft to fill, which becomes `path` at the end of the with block.

    On an error `path` stays as it was.
    """
    path = Path(path)
    with _draft(path) as draft:
        yield draft
        _flush_file(draft)
        draft.replace(path)


@contextmanager
def whole_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Writes a directory with checksums: yields an empty draft to fill, which becomes `path` at the end of the block.

    On an error `path` stays as it was.

    Args:
        path: the final name. Its parents are made.
        overwrite: whether to replace what is at `path`. Otherwise a directory there that is not empty is an OSError.
    """
    with _draft(path) as draft:
        draft.mkdir()
        yield draft
        write_checksums(draft)
        _flush_tree(draft)
        replaced = draft.with_name(f"{path.name}.replaced")
        try:
            if overwrite and path.exists():
                path.rename(replaced)
            draft.rename(path)
        except BaseException:  # an interrupt too
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            raise
        _flush_names(path.parent)


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """Yields the path of a draft of `path`. An OSError about the draft names `path` instead, which the user knows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside `path`, because a rename is one indivisible step only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        draft = Path(scratch) / path.name  # the same name, because some writers choose the format by its ending
        try:
            yield draft
        except OSError as error:
            # An error about a full disk names no file at all.
            if error.errno is None or error.filename not in (None, draft, str(draft)):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error


def _flush_file(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _flush_tree(directory: Path) -> None:
    """Writes everything below `directory` from the system's memory to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _flush_file(Path(folder) / name)
        _flush_names(Path(folder))


def _flush_names(folder: Path) -> None:
    """Writes the names of the files in `folder` to the disk. Without this a crash may undo a rename."""
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open directories
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
