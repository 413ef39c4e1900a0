"""Results files: lines of JSON, appended item by item, so that a killed run can continue where it stopped."""

import json
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

from hshare_jax.files.atomic import whole_file
from hshare_jax.files.texts import parse_json, to_json

_MARK = {"results": "hshare_jax"}  # the beginning of the first line of every results file


class Records:
    """A results file: the first line says what is measured, and every further line holds one finished item.

    A kill may leave half a line. That line is removed and its item is computed again, so a resumed file equals an
    uninterrupted one byte for byte. Nothing is written before the first item is finished. If two runs write to one
    file, the second one stops with an error, and the results of the first are kept.
    """

    def __init__(
        self, path: str | os.PathLike[str], study: dict[str, Any], *, keys: tuple[str, ...], later: tuple[str, ...] = ()
    ) -> None:
        """Reads the file, if it exists.

        Args:
            path: the file.
            study: the facts that identify this study: settings, model, data.
            keys: the fields of a line that identify an item.
            later: names of facts that `settle` will add to the study. Until then the file's own values are accepted.

        Raises:
            ValueError: the file holds results of another study, or is not a results file.
        """
        self.path, self._keys = Path(path), keys
        self._study: dict[str, Any] = json.loads(json.dumps(_MARK | study))
        text = self.path.read_bytes() if self.path.exists() else b""
        mark = json.dumps(_MARK)[:-1].encode()
        if not text.startswith(mark[: len(text)]):
            raise ValueError(f"{self.path} is no results file; name another one")
        whole = text.rpartition(b"\n")[0]
        lines = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if whole]
        for number, line in enumerate(lines[1:], start=2):
            self._check_keys(number, line)
        self._done = {self._key(line): line for line in lines[1:]}
        # A first line alone holds no results, so it may be replaced.
        self._found: dict[str, Any] | None = lines[0] if self._done else None
        self._compare({} if self._found is None else {name: self._found[name] for name in later if name in self._found})
        self._size = len(text)  # bytes in the file, unless another run writes to it
        self._kept = len(whole) + 1 if self._done else 0  # bytes of whole lines; the next line begins there

    def settle(self, **facts: Any) -> None:
        """Adds facts to the study. Raises ValueError if the file holds results of another study."""
        self._compare(json.loads(json.dumps(facts)))
        self._study |= facts

    def _compare(self, facts: dict[str, Any]) -> None:
        study = self._study | facts
        if self._found is not None and self._found != study:
            raise ValueError(
                f"{self.path} holds results {difference(self._found, study)}; name another file or remove it"
            )

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            parsed = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number} is not JSON ({error}); this is no results file") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"{self.path}:{number} is not a JSON object; this is no results file")
        return parsed

    def _check_keys(self, number: int, line: dict[str, Any]) -> None:
        for key in self._keys:
            if not isinstance(line.get(key), str | int):
                told = f"{key}={line[key]!r} must be a text or a whole number" if key in line else f"it has no {key}"
                raise ValueError(f"{self.path}:{number} names no item: {told}; repair or remove this line")

    def _key(self, line: dict[str, Any]) -> Hashable:
        return tuple(line.get(key) for key in self._keys)

    def __contains__(self, item: dict[str, Any]) -> bool:
        """Whether the item with these key fields is finished."""
        return self._key(item) in self._done

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of all finished items, in the order of the file."""
        return list(self._done.values())

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Removes the items for which `is_kept(line)` is False. The file is replaced as a whole."""
        kept = {key: line for key, line in self._done.items() if is_kept(line)}
        if len(kept) == len(self._done):
            return
        with whole_file(self.path) as draft:
            draft.write_bytes(_encode([self._study, *kept.values()]))
            self._size = draft.stat().st_size
        self._done, self._kept = kept, self._size if kept else 0

    def append(self, line: dict[str, Any]) -> None:
        """Writes the line of an item to the disk. An item that was finished before is not written again.

        Raises:
            ValueError: another run has written to the file since this one read it.
            OSError: the line cannot be written, because the disk is full for instance.
        """
        if line in self:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.path, "ab") as file:
                if file.tell() != self._size:
                    raise ValueError(f"another run has written to {self.path}: let it end, or name another file")
                file.truncate(self._kept)
                file.write(_encode([line] if self._done else [self._study, line]))
                file.flush()
                os.fsync(file.fileno())
                self._size = self._kept = file.tell()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._done[self._key(line)] = json.loads(json.dumps(line))


def _encode(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(to_json(line).encode() + b"\n" for line in lines)


def difference(found: dict[str, Any], study: dict[str, Any]) -> str:
    """The first difference between two studies, as the end of a message. Nested settings are compared one by one."""
    absent = object()
    for key in {**study, **found}:
        old, new = found.get(key, absent), study.get(key, absent)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return difference(old, new)
        if old != new:
            old, new = ("no such setting" if value is absent else f"{key}={value!r}" for value in (old, new))
            return f"for {old}, and this run has {new}"
    raise AssertionError("equal studies have no difference")
