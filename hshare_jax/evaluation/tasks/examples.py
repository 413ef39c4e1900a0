"""Examples: what every evaluation task reads from files, with bad data named by file and line."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """Bad data; the message names the file and the line or record."""


class FileError(DataError):
    """Bad data of which no example is left, whatever is skipped."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, and what the text that follows it is scored against."""

    id: str  # the same on every run: "test.jsonl:17", lines count from 1; named where it is bad
    prompt: str
    references: tuple[str, ...]  # right answers, at least one
    max_new_tokens: int
    stop: tuple[str, ...]  # the text ends before the first of these
    wants_chat: bool  # whether an instruct model should get the prompt through its chat template
    task: str  # "gsm8k", "longbench/trec"
    classes: tuple[str, ...] = ()  # of a classification, all labels


def read_json_lines(
    path: str | os.PathLike[str],
    parse: Callable[[str, Any], list[Example]],
    *,
    limit: int | None,
    skip_bad: bool,
) -> tuple[list[Example], int]:
    """Returns the examples in a file of JSON lines, and how many of the lines read were bad.

    Args:
        path: the file; blank lines are ignored.
        parse: makes examples from a line's place, such as "test.jsonl:17", and its value; none if it was not asked for.
        limit: stop reading after so many examples. None reads all.
        skip_bad: skip bad lines and count them; otherwise the first one raises.

    Raises:
        DataError: a bad line; FileError, a file without examples.
        OSError: a file that cannot be read.
    """
    name = Path(path).name
    with open(path, "rb") as file:  # in bytes, because a JSON string may hold what text mode takes for a line's end
        lines = ((f"{name}:{number}", line) for number, line in enumerate(file, 1) if line.strip())
        return gather(
            name, lines, lambda where, line: parse(where, load_json(where, line)), limit=limit, skip_bad=skip_bad
        )


def gather(
    name: str,
    records: Iterable[tuple[str, Any]],
    parse: Callable[[str, Any], list[Example]],
    *,
    limit: int | None,
    skip_bad: bool,
) -> tuple[list[Example], int]:
    """Returns the examples that `parse` makes of places and records, and how many records it called bad.

    Arguments and errors are those of `read_json_lines`, which does this with the lines of a file called `name`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for all")
    examples: list[Example] = []
    num_read = num_bad = 0
    for where, record in records:
        num_read += 1
        try:
            examples += parse(where, record)
        except DataError:
            if not skip_bad:
                raise
            num_bad += 1
        if limit is not None and len(examples) >= limit:
            break
    if not examples:
        raise FileError(f"{name} holds no examples to read; of its {num_read} records {num_bad} are bad")
    return examples[:limit], num_bad


def load_json(where: str, data: bytes) -> Any:
    """Returns the value of a JSON text in UTF-8; DataError if it is none."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def as_record(where: str, value: Any, *keys: str) -> dict[str, Any]:
    """Returns a JSON value that is an object with all these keys; DataError if it is not."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object, with keys and values; it is a {type(value).__name__}")
    for key in keys:
        if key not in value:
            *others, last = keys
            listed = f"{', '.join(others)} and {last}" if others else last
            raise DataError(f"{where}: key {key!r} is missing; each needs {listed}")
    return value


def text_at(where: str, record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """Returns the text at a key that is there; DataError if it is none, or blank and may not be."""
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: key {key!r} must be a text; it is a {type(text).__name__}")
    if not text.strip() and not may_be_empty:
        raise DataError(f"{where}: key {key!r} is empty")
    try:
        text.encode("utf-8")  # JSON can spell halves of characters, which no tokeniser takes
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: key {key!r} is no Unicode text: {error}") from error
    return text


def texts_at(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    """Returns the texts in the list at a key that is there, at least one; DataError if they are none."""
    texts = record[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: key {key!r} must be a list of texts, at least one")
    return tuple(texts)
