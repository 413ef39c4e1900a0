"""The file SHA256SUMS beside a model's files: written in the format of `sha256sum`, and checked before a file is read.

Neither safetensors nor GGUF stores a checksum of the weights. A flipped bit inside a tensor gives another valid tensor,
and no reader can notice it without SHA256SUMS. Our own checkpoints always have this file. For other files, make it with
`sha256sum *.safetensors *.json > SHA256SUMS`. Other tools write digests in capitals, or lines such as
`SHA256 (config.json) = e3b0...` (`sha256sum --tag`, BSD). Both are read.
"""

import hashlib
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hshare_jax.errors import CheckpointError

CHECKSUMS = "SHA256SUMS"
_DIGEST = r"(?P<digest>[0-9a-f]{64}|[0-9A-F]{64})"  # not of both cases, which a flipped bit would give
_LINES = re.compile(rf"{_DIGEST} [ *](?P<name>.+)"), re.compile(rf"SHA256 \((?P<name>.+)\) = {_DIGEST}")


def verify_checksums(directory: Path, names: Iterable[str]) -> None:
    """Raises CheckpointError if a file in `names` does not have the checksum that SHA256SUMS in `directory` lists.

    Files that SHA256SUMS does not list are not checked.
    """
    listed = _read(directory)
    _compare(directory, {name: listed[name] for name in names if name in listed})


def verify_all(directory: Path, parts: Collection[str]) -> None:
    """Raises CheckpointError unless the parts of `directory` are the files that its SHA256SUMS lists, with these sums.

    Files beside the parts are let alone, and so are hidden files within them, such as those of a file manager.

    Args:
        directory: the directory.
        parts: the files and the folders in it that its reader reads.
    """
    listed = {name: digest for name, digest in _read(directory).items() if name.split("/")[0] in parts}
    if not listed:
        raise CheckpointError(f"{directory} is damaged: {CHECKSUMS} is missing or empty")
    present = {name for part in parts for name in _files(directory, part)}
    unlisted = [name for name in present - listed.keys() if "/." not in f"/{name}"]
    for problem, names in (("lacks", listed.keys() - present), ("holds the unlisted", unlisted)):
        if names:
            raise CheckpointError(f"{directory} is damaged: it {problem} {min(names)}")
    _compare(directory, listed)


def write_checksums(directory: Path) -> None:
    """Writes SHA256SUMS for every file below `directory`."""
    names = sorted(_files(directory))
    with ThreadPoolExecutor() as pool:
        sums = pool.map(_sha256, (directory / name for name in names))
    (directory / CHECKSUMS).write_text("".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)))


def _files(directory: Path, part: str = "") -> list[str]:
    """The names of the files in `directory` that are `part` or lie below it, without SHA256SUMS."""
    below = directory / part
    files = (path.relative_to(directory).as_posix() for path in [below, *below.rglob("*")] if path.is_file())
    return [name for name in files if name != CHECKSUMS]


def _read(directory: Path) -> dict[str, str]:
    path = directory / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: it is not text") from error
    listed = {}
    for number, line in enumerate(lines, start=1):
        match = _LINES[0].fullmatch(line) or _LINES[1].fullmatch(line)
        if match is None:
            raise CheckpointError(f"{path} is damaged: line {number} is not a SHA-256 checksum and a file name")
        listed[match["name"].removeprefix("./")] = match["digest"].lower()
    return listed


def _compare(directory: Path, listed: dict[str, str]) -> None:
    paths = [directory / name for name in listed]
    if missing := [path for path in paths if not path.is_file()]:
        raise CheckpointError(f"{missing[0]} is missing, though {directory / CHECKSUMS} lists it")
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for path, found, expected in zip(paths, pool.map(_sha256, paths), listed.values(), strict=True):
            if found != expected:
                raise CheckpointError(
                    f"{path} is damaged: its SHA-256 is {found}, {directory / CHECKSUMS} says {expected}"
                )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
