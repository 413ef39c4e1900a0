"""Files and directories that are written completely or not at all, even if a kill or a full disk interrupts.

Both are written as a draft beside their final name, flushed to the disk and then renamed. The draft lies in a directory
called `.<final name>.` followed by random letters. A kill leaves that directory behind, and nothing else.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from hshare_jax.files.checksums import CHECKSUMS, write_checksums

_AT_WORKING_DIRECTORY, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file: yields the path of a draft to fill, which becomes `path` at the end of the with block.

    On an error `path` stays as it was. A link stays a link, and what it points to is written.
    """
    path = _target(Path(path))
    with _draft(path) as draft:
        yield draft
        _flush_file(draft)
        draft.replace(path)


@contextmanager
def whole_directory(path: Path, *, parts: Collection[str] = (), overwrite: bool = False) -> Iterator[Path]:
    """Writes a directory with checksums: yields an empty draft to fill, which becomes `path` at the end of the block.

    On an error `path` stays as it was.

    Args:
        path: the final name. Its parents are made.
        parts: the names of all files and folders that may be written into the draft.
        overwrite: whether to replace the parts and the checksums at `path`. All other files there stay. Otherwise a
            directory there that is not empty is an OSError.
    """
    path = _target(path)
    if overwrite and path.exists():
        _check_one_device(path)
    with _draft(path) as draft:
        draft.mkdir()
        yield draft
        write_checksums(draft)
        _flush_tree(draft)
        if overwrite and path.exists():
            _link_all_but((CHECKSUMS, *parts), path, draft)
            _exchange(draft, path)
        else:
            draft.rename(path)
        _flush_names(path.parent)


def _target(path: Path) -> Path:
    """What a link points to, which need not exist; any other path as it is."""
    return path.resolve() if path.is_symlink() else path


def _check_one_device(directory: Path) -> None:
    """Raises OSError if another file system is mounted below a directory, because its files cannot stay in place."""
    for folder, _, _ in os.walk(directory):
        if os.stat(folder).st_dev != directory.stat().st_dev:
            raise OSError(errno.EXDEV, "is another file system; unmount it, or write to another directory", folder)


def _link_all_but(names: Collection[str], directory: Path, other: Path) -> None:
    """Gives the files below `directory` a second name below `other`, except those in `names` and the folders in it."""

    def left_out(folder: str, _: list[str]) -> Collection[str]:
        return names if Path(folder) == directory else ()

    try:
        shutil.copytree(directory, other, symlinks=True, ignore=left_out, copy_function=_link, dirs_exist_ok=True)
    except shutil.Error as error:
        file, _, reason = error.args[0][0]
        raise OSError(errno.EIO, f"cannot be kept beside what is written: {reason}", file) from error
    for folder, _, _ in os.walk(other):
        _flush_names(Path(folder))


def _link(file: str, other: str) -> None:
    """Gives a file a second name, or copies it where the file system knows no second names."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copy2(file, other)
        with open(other, "rb") as copy:
            os.fsync(copy.fileno())


def _exchange(draft: Path, path: Path) -> None:
    """Exchanges two directories. Where the system cannot do it in one step, `path` is missing for a moment."""
    if _exchange_at_once(draft, path):
        return
    replaced = draft.with_name(f"{path.name}.replaced")
    try:
        path.rename(replaced)
        draft.rename(path)
    except BaseException:  # an interrupt too
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        raise


def _exchange_at_once(draft: Path, path: Path) -> bool:
    """Exchanges two directories in one indivisible step. False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):
        return False
    names = _AT_WORKING_DIRECTORY, os.fsencode(draft), _AT_WORKING_DIRECTORY, os.fsencode(path)
    if library.renameat2(*names, _EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(path))


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
            if error.errno is None or not (error.filename is None or str(error.filename).startswith(scratch)):
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
