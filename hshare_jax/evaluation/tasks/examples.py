"""Examples: prompts with right answers, read from files. Bad data is named by file and line."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hshare_jax.errors import SettingError
from hshare_jax.files.texts import MARK, check_mark, decode_text, parse_json


class DataError(ValueError):
    """Bad data; the message names the file and the line or record."""


class FileError(DataError):
    """A file of which no example is left, even if bad data is skipped."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt, and the right answers that the text after it is scored against."""

    id: str  # the same on every run: "test.jsonl:17", where lines count from 1; errors name it
    prompt: str
    references: tuple[str, ...]  # right answers, at least one
    max_new_tokens: int
    stop: tuple[str, ...]  # the text ends before the first of these
    wants_chat: bool  # whether an instruct model should get the prompt through its chat template
    task: str  # "gsm8k", "longbench/trec"
    classes: tuple[str, ...] = ()  # all labels of a classification
    tokens: tuple[int, ...] = ()  # the prompt's token ids, once `GenerationTask.fit` has encoded it


def read_json_lines(
    path: str | os.PathLike[str],
    parse: Callable[[str, Any], list[Example]],
    *,
    limit: int | None,
    skip_bad: bool,
) -> tuple[list[Example], int]:
    """The examples in a file of JSON lines, and how many of the lines read were bad.

    Args:
        path: the file. Blank lines are ignored.
        parse: makes examples from a line's place, such as "test.jsonl:17", and the line's value. It may make none.
        limit: reading stops after so many examples; None reads all.
        skip_bad: skips bad lines and counts them. Otherwise the first bad line raises.

    Raises:
        DataError: a bad line; FileError, a file without examples, or with the mark of another encoding than UTF-8.
        OSError: a file that cannot be read.
    """
    name = Path(path).name
    # In bytes, because text mode also ends lines at characters that JSON strings may hold.
    with open(path, "rb") as file:
        try:
            check_mark(file.peek(4), name)
        except ValueError as error:
            raise FileError(str(error)) from error
        numbered = ((number, line.removeprefix(MARK)) for number, line in enumerate(file, 1))
        lines = ((f"{name}:{number}", line) for number, line in numbered if line.strip())
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
    """The examples that `parse` makes of records, and how many of the records were bad.

    `read_json_lines` calls this function with the lines of a file, and describes the errors.

    Args:
        name: the file's name, for errors.
        records: each record's place and value.
        parse, limit, skip_bad: as for `read_json_lines`.
    """
    if limit is not None and limit < 1:
        raise SettingError("limit", limit, "must be at least 1, or None for all")
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
    """The value of a JSON text in UTF-8; DataError if the text is not one."""
    try:
        text = decode_text(data, where)
    except ValueError as error:
        raise DataError(str(error)) from error
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def as_record(where: str, value: Any, *keys: str) -> dict[str, Any]:
    """A JSON value, checked to be an object with all these keys; DataError if it is not."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object, with keys and values; it is a {type(value).__name__}")
    for key in keys:
        if key not in value:
            *others, last = keys
            listed = f"{', '.join(others)} and {last}" if others else last
            raise DataError(f"{where}: key {key!r} is missing; each needs {listed}")
    return value


def text_at(where: str, record: dict[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """The text at a key of the record; DataError if it is not a text, or is blank and may not be."""
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: key {key!r} must be a text; it is a {type(text).__name__}")
    if not text.strip() and not may_be_empty:
        raise DataError(f"{where}: key {key!r} is empty")
    return text


def texts_at(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    """The texts in the list at a key of the record; DataError if it is not a list of texts, or is empty."""
    texts = record[key]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: key {key!r} must be a list of texts, at least one")
    return tuple(texts)
