"""Results as lines of JSON, appended item by item: a run that was killed goes on where it was."""

import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any


class Records:
    """A results file: a first line that says what is measured, then one line for each finished item.

    A line that was only half written when a run was killed is cut off again, and its item done anew; so a resumed file
    equals an uninterrupted one byte for byte.
    """

    def __init__(self, path: str | os.PathLike[str], study: dict[str, Any], *, keys: tuple[str, ...]) -> None:
        """Opens or makes the file.

        Args:
            path: the file.
            study: what tells this study from others: settings, model, data.
            keys: the fields of a line that tell items apart.

        Raises:
            ValueError: the file holds another study, or is no results file.
        """
        self.path, self._keys = Path(path), keys
        self._done: dict[Hashable, dict[str, Any]] = {}
        study = json.loads(json.dumps(study))
        text = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = text.rpartition(b"\n")
        lines = [self._parse(number, line) for number, line in enumerate(whole.split(b"\n"), start=1) if whole]
        if lines and lines[0] != study:
            raise ValueError(f"{self.path} {self._difference(lines[0], study)}; name another file or remove it")
        for line in lines[1:]:
            self._done[self._key(line)] = line
        if torn:
            with open(self.path, "r+b") as file:
                file.truncate(len(text) - len(torn))
        if not lines:
            self._write(study)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}:{number} is not JSON ({error}); this is no results file") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"{self.path}:{number} is not a JSON object; this is no results file")
        return parsed

    @staticmethod
    def _difference(found: dict[str, Any], study: dict[str, Any]) -> str:
        for key in {**study, **found}:
            if found.get(key) != study.get(key):
                return f"holds results for {key}={found.get(key)!r}, and this run has {key}={study.get(key)!r}"
        raise AssertionError("equal studies have no difference")

    def _key(self, line: dict[str, Any]) -> Hashable:
        return tuple(line.get(key) for key in self._keys)

    def __contains__(self, item: dict[str, Any]) -> bool:
        """Returns whether the item with these key fields is finished."""
        return self._key(item) in self._done

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Returns the lines of all finished items, in the file's order."""
        return list(self._done.values())

    def append(self, line: dict[str, Any]) -> None:
        """Writes the line of an item that is finished now; nothing where it was finished before."""
        if line not in self:
            self._write(line)
            self._done[self._key(line)] = json.loads(json.dumps(line))

    def _write(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
