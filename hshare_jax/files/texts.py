"""Text that comes from outside: files are read as UTF-8, with or without a mark, and each str is checked to be Unicode.

A byte order mark is a character that some editors write at the beginning of a file. It is no part of the text.
"""

import codecs
import json
import os
from pathlib import Path
from typing import Any

# The marks of other encodings. UTF-32 comes first, because its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
MARK = codecs.BOM_UTF8


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file, in which every line ends in a line feed alone.

    Raises:
        ValueError: the file is not UTF-8.
        OSError: the file cannot be read.
    """
    return decode_text(Path(path).read_bytes(), os.fspath(path))


def decode_text(data: bytes, name: str) -> str:
    """The text of bytes in UTF-8, without a byte order mark. Lines end in a line feed, as Python reads text files.

    Args:
        data: the bytes.
        name: where they come from, for the error.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    check_mark(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def check_mark(data: bytes, name: str) -> None:
    """Raises ValueError if bytes begin with the mark of another encoding than UTF-8."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)
    if encoding is not None:
        raise ValueError(f"{name} is not UTF-8 text (byte 0): it has the mark of {encoding}; convert it to UTF-8")


def check_text(text: str, name: str) -> None:
    """Raises ValueError if a str holds half a character, which no tokenizer takes and no file can hold.

    Python makes such halves of bytes that are not UTF-8, in the arguments of a program for instance. JSON can spell
    them too.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"{name} is not UTF-8 text (character {error.start} is {half}, half a character); give whole characters"
        ) from error


def check_path(path: str | os.PathLike[str]) -> None:
    """Raises ValueError if the name of a path is not UTF-8, which the libraries that read and write models need."""
    whole = os.path.abspath(os.path.expanduser(path))
    check_text(whole, f"the path {whole.encode(errors='backslashreplace').decode()}")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that comes from outside.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or spells half a character.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    check_text(json.dumps(value, ensure_ascii=False), "its content")
    return value


def to_json(value: Any, encoding: str = "utf-8") -> str:
    r"""A value as JSON in one line. Its characters are escaped (`\u00e9`) if the encoding lacks one of them."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
