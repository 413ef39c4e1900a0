"""Files that are written whole: readers, kills and full disks never leave half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a draft to write; then it is flushed and becomes `path`: all of it or, on an error, nothing.

    A draft that is left behind by a kill lies in a directory beside `path`, called `.<name of path>.` and some letters.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because only there is a rename one indivisible step.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        draft = Path(scratch) / path.name
        try:
            yield draft
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            if error.errno is None or error.filename not in (None, str(draft), draft):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from error  # by the name that a user knows
