"""Examples: reading stops where it should, and bad data is skipped or named by file and line."""

import json

import pytest

from hshare_jax.evaluation.tasks.examples import (
    DataError,
    Example,
    FileError,
    as_record,
    read_json_lines,
    text_at,
    texts_at,
)


def parse(where, value):
    record = as_record(where, value, "question", "answer")
    return [Example(where, text_at(where, record, "question"), texts_at(where, record, "answer"), 8, (), False, "any")]


def read(path, limit=None, skip_bad=False):
    return read_json_lines(path, parse, limit=limit, skip_bad=skip_bad)


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "test.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return path

    return write


def good(number):
    return {"question": f"{number}?", "answer": [str(number)]}


BAD = [
    ({"question": "1?"}, "key 'answer' is missing; each needs question and answer"),
    ({"question": " \n", "answer": ["1"]}, "key 'question' is empty"),
    ({"question": 1, "answer": ["1"]}, "key 'question' must be a text; it is a int"),
    ({"question": None, "answer": ["1"]}, "key 'question' must be a text; it is a NoneType"),
    ({"question": "1?", "answer": "1"}, "key 'answer' must be a list of texts"),
    ({"question": "1?", "answer": []}, "key 'answer' must be a list of texts, at least one"),
    ({"question": "1?", "answer": ["1", 1]}, "key 'answer' must be a list of texts"),
    (["1?", "1"], "must be an object, with keys and values; it is a list"),
    (b'{"question": "1?", "ans', "not JSON"),
    (b'{"question": "\\ud800", "answer": ["1"]}', "not JSON: its content is not UTF-8 text (character 14"),
    (b'{"question": "caf\xe9", "answer": ["1"]}', "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_first_bad_line_is_named(write, line, message):
    path = write(good(1), b"", line, good(2))
    with pytest.raises(DataError, match=r"^test\.jsonl:3:? ") as raised:
        read(path)
    assert message in str(raised.value)


@pytest.mark.parametrize("line", [line for line, _ in BAD])
def test_bad_lines_are_skipped_and_counted_on_request(write, line):
    examples, num_bad = read(write(line, good(1), line, good(2)), skip_bad=True)
    assert [example.id for example in examples] == ["test.jsonl:2", "test.jsonl:4"]
    assert num_bad == 2


def test_blank_lines_are_ignored_but_numbered(write):
    examples, num_bad = read(write(b"", good(1), b" \r", good(2), b"", b""))
    assert [(example.id, example.prompt) for example in examples] == [("test.jsonl:2", "1?"), ("test.jsonl:4", "2?")]
    assert num_bad == 0


def test_a_byte_order_mark_is_no_part_of_a_line(write):
    path = write(b"\xef\xbb\xbf" + json.dumps(good(1)).encode(), good(2))
    for skip_bad in (False, True):
        examples, num_bad = read(path, skip_bad=skip_bad)
        assert ([example.prompt for example in examples], num_bad) == (["1?", "2?"], 0)


def test_a_file_in_another_encoding_is_refused_even_where_bad_lines_are_skipped(write):
    path = write(json.dumps(good(1)).encode("utf-16"))
    with pytest.raises(
        FileError, match=r"test\.jsonl is not UTF-8 text \(byte 0\): it has the mark of UTF-16; convert"
    ):
        read(path, skip_bad=True)


def test_a_line_ends_at_a_newline_only(write):
    path = write('{"question": "one\u2028two\x85three", "answer": ["1"]}'.encode())
    assert read(path)[0][0].prompt == "one\u2028two\x85three"


def test_limit_stops_before_later_bad_lines(write):
    examples, num_bad = read(write(good(1), good(2), b"{"), limit=2)
    assert len(examples) == 2
    assert num_bad == 0


def test_limit_counts_good_lines(write):
    examples, num_bad = read(write(good(1), b"{", good(2), good(3)), limit=2, skip_bad=True)
    assert [example.prompt for example in examples] == ["1?", "2?"]
    assert num_bad == 1


def test_limit_above_the_number_of_lines_reads_all(write):
    assert len(read(write(good(1), good(2)), limit=9)[0]) == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_must_be_positive(write, limit):
    with pytest.raises(ValueError, match=f"limit={limit} must be at least 1, or None"):
        read(write(good(1)), limit=limit)


@pytest.mark.parametrize(
    ("lines", "counts"), [((), "0 records 0"), ((b"", b" "), "0 records 0"), ((b"{", b"}"), "2 records 2")]
)
def test_a_file_without_examples_is_an_error(write, lines, counts):
    with pytest.raises(DataError, match=rf"^test\.jsonl holds no examples to read; of its {counts} are bad"):
        read(write(*lines), skip_bad=True)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent.jsonl")
