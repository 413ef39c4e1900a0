"""Texts: UTF-8 with or without a mark is read alike, and everything else is named."""

import codecs

import pytest

from hshare_jax.files.texts import check_text, decode_text, parse_json, read_text, to_json


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_mark_and_the_ends_of_lines_make_no_difference(tmp_path, mark):
    (tmp_path / "a.txt").write_bytes(mark + "caf\u00e9\r\nb\rc\n".encode())
    assert read_text(tmp_path / "a.txt") == "caf\u00e9\nb\nc\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_the_mark_of_another_encoding_is_named(encoding):
    with pytest.raises(ValueError, match=f"a.txt is not UTF-8 text .* mark of {encoding.upper()}; convert it to UTF-8"):
        decode_text("text".encode(encoding), "a.txt")


def test_other_bytes_and_halves_of_characters_are_named():
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 3\); convert it to UTF-8"):
        decode_text(b"caf\xe9", "a.txt")
    with pytest.raises(ValueError, match=r"it is not UTF-8 text \(character 1 is U\+D83D, half a character\)"):
        check_text("a\ud83d", "it")
    check_text("\ufeff\U0001f600", "it")


def test_json_that_is_nested_too_deeply_is_named():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(b"[" * 100_000)


def test_json_that_spells_half_a_character_is_named():
    assert parse_json(r'["\ud83d\ude00"]') == ["\U0001f600"]
    for text in (r'{"\ud83d": 1}', r'[["a", "b\udc00"]]', b'"\xed\xa0\x80"'):
        with pytest.raises(
            ValueError, match=r"its content is not UTF-8 text \(character \d is U\+D.*, half a character\)"
        ):
            parse_json(text)


def test_json_is_escaped_only_where_the_encoding_cannot_hold_it():
    assert to_json({"a": "\u00e9"}) == to_json({"a": "\u00e9"}, "latin-1") == '{"a": "\u00e9"}'
    assert to_json({"a": "\u00e9"}, "ascii") == r'{"a": "\u00e9"}'
    assert to_json("\udce9") == r'"\udce9"'
