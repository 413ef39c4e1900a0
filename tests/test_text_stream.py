"""The text stream never takes shown text back, ends before a stop string, and equals the tokenizer's text."""

import codecs
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_tokenizer import END, byte_fallback_tokenizer, byte_tokenizer

from hshare_jax.text_stream import TextStream

TOKENIZER = byte_tokenizer()
END_ID = TOKENIZER.convert_tokens_to_ids(END)
FALLBACK = byte_fallback_tokenizer(["▁", "▁and", "é"])


def bytes_of(text):
    """One token per byte of the text, with no merged pairs."""
    return list(text.encode())


def run(tokens, stop=(), tokenizer=TOKENIZER):
    """The text shown after each token, and the final text."""
    stream, shown = TextStream(tokenizer, stop), []
    for token in tokens:
        stream.push(token)
        shown.append(stream.text)
    return shown, stream.finish()


def test_a_character_is_shown_when_its_last_byte_has_come():
    shown, final = run(bytes_of("aéあ😀b"))
    assert shown == ["a", "a", "aé", "aé", "aé", "aéあ", "aéあ", "aéあ", "aéあ", "aéあ😀", "aéあ😀b"]
    assert final == "aéあ😀b"


def test_a_character_cut_off_by_the_end_is_shown_as_the_tokenizer_decodes_it():
    shown, final = run(bytes_of("ab😀")[:-1])
    assert shown[-1] == "ab"
    assert final == TOKENIZER.decode(bytes_of("ab😀")[:-1]) == "ab\N{REPLACEMENT CHARACTER}"


def test_the_end_token_has_no_text():
    shown, final = run([*bytes_of("so"), END_ID])
    assert shown == ["s", "so", "so"]
    assert final == "so"


def test_a_stop_string_across_tokens_is_never_shown():
    shown, final = run(bytes_of("one two END three"), ["END"])
    assert shown[:8] == ["o", "on", "one", "one ", "one t", "one tw", "one two", "one two "]
    assert set(shown[8:]) == {"one two "}
    assert final == "one two "


def test_text_that_only_begins_like_a_stop_string_is_shown_late():
    shown, final = run(bytes_of("aab."), ["aac"])
    assert shown == ["", "", "aab", "aab."]
    assert final == "aab."


def test_the_beginning_of_a_stop_string_at_the_end_is_released():
    shown, final = run(bytes_of("the EN"), ["END"])
    assert shown[-1] == "the "
    assert final == "the EN"


def test_the_first_of_several_stop_strings_ends_the_text():
    assert run(bytes_of("a b c d"), ["d", "b", "c"])[1] == "a "
    stream = TextStream(TOKENIZER, ["b"])
    for token in bytes_of("ab"):
        assert not stream.is_stopped
        stream.push(token)
    assert stream.is_stopped


def test_a_stop_string_of_multibyte_characters_is_found():
    assert run(bytes_of("x😀あy"), ["あ"])[1] == "x😀"


def test_merged_tokens_stream_as_their_bytes_do():
    tokens = TOKENIZER("the end in sight")["input_ids"]
    assert len(tokens) < len("the end in sight")
    assert run(tokens)[1] == "the end in sight"
    assert run(tokens, ["he"])[1] == "t"  # the stop string begins inside a token


@pytest.mark.parametrize("stop", [(), ("ab",), ("aab", "b\n", "é")])
@hypothesis.given(text=st.text(alphabet=st.sampled_from("ab\né😀")))
def test_shown_text_equals_the_definition_for_every_text(stop, text):
    tokens = bytes_of(text)
    shown, final = run(tokens, stop)
    decoder, whole, expected = codecs.getincrementaldecoder("utf-8")(), "", None
    for token in tokens:
        whole += decoder.decode(bytes([token]))
        ends = [whole.find(string) for string in stop if string in whole]
        if ends and expected is None:
            expected = whole[: min(ends)]
    assert final == (whole if expected is None else expected)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise([*shown, final]))
    assert not any(string in final for string in stop)


@hypothesis.given(tokens=st.lists(st.sampled_from([*bytes_of("aé😀"), 0xFF, 0xC3, END_ID, 256])))
def test_any_tokens_give_the_text_of_the_tokenizer(tokens):
    shown, final = run(tokens)
    assert final == TOKENIZER.decode(tokens, skip_special_tokens=True)
    assert all(final.startswith(text) for text in shown)


def test_a_shown_byte_stays_when_the_next_bytes_are_invalid():
    tokens = [0x0A, 0xE2, 257, 256, 258]
    assert FALLBACK.decode(tokens) == "\N{REPLACEMENT CHARACTER}" * 2 + " and é"
    shown, final = run(tokens, tokenizer=FALLBACK)
    assert shown == ["\n", "\n", "\n\N{REPLACEMENT CHARACTER} and", final[:7], final]
    assert final == "\n\N{REPLACEMENT CHARACTER} and é"


@hypothesis.given(tokens=st.lists(st.sampled_from([0x0A, 0x61, *"あ".encode(), 0xFF, 256, 257, 258])))
def test_any_fallback_bytes_give_text_that_only_grows(tokens):
    shown, final = run(tokens, tokenizer=FALLBACK)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise([*shown, final]))
    expected = FALLBACK.decode(tokens)
    if "\N{REPLACEMENT CHARACTER}" not in expected:
        assert final == expected
