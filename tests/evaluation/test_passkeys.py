"""Passkeys: a number at every depth of a text, and the answers of decode steps to a question about it."""

import dataclasses

import jax.numpy as jnp
import pytest
from random_weights import random_params
from tiny_decoder import MODEL, random_rows
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.evaluation.passkeys import ANSWER_TOKENS, NEEDLE, ask, is_found, make_passkeys
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.generate import generate
from hshare_jax.models.pretrained import Model
from hshare_jax.prompts import pad_prompts

TINY = Model(
    dataclasses.replace(MODEL, max_positions=512), random_params(MODEL), byte_tokenizer(LETTERS), (), "tiny", ""
)
TEXT = "the rain in spain stays mainly in the plain, or so it is said. " * 30


def test_passkeys_hide_a_number_at_every_depth_and_a_seed_repeats_them():
    def encode(text):
        return byte_tokenizer()(text)["input_ids"]

    passkeys = make_passkeys(byte_tokenizer(), TEXT * 3, 400, range(20))
    assert passkeys == make_passkeys(byte_tokenizer(), TEXT * 3, 400, range(20))
    assert len({passkey.key for passkey in passkeys}) == 20
    for passkey in passkeys:
        assert len(passkey.text) + len(passkey.question) == 400
        text = str(byte_tokenizer().decode(list(passkey.text)))
        assert text.count(passkey.key) == 2
        room = 400 - len(passkey.question) - len(encode(NEEDLE.format(key=passkey.key)))
        found = len(encode(text[: text.index("\n\nThe pass key is")]))
        assert abs(found - passkey.depth * room) <= 2
    assert max(p.depth for p in passkeys) > 0.8
    assert min(p.depth for p in passkeys) < 0.2
    (deep,) = make_passkeys(byte_tokenizer(), TEXT * 3, 400, [0], depth=1.0)
    assert str(byte_tokenizer().decode(list(deep.text))).endswith("is the pass key.\n\n")


@pytest.mark.parametrize("context", [60, 100_000])
def test_a_passkey_that_does_not_fit_is_refused(context):
    with pytest.raises(ValueError, match=f"context={context} must lie between"):
        make_passkeys(byte_tokenizer(), TEXT, context, [0])


def test_an_answer_is_what_greedy_decoding_says_after_the_question():
    rows = [list(map(int, row)) for row in random_rows(25, lengths=(20, 20))]
    question = [3, 1, 4]
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts(rows))
    state = prefill_for(TINY, tokens, lengths, 64, [None]).start(None)
    answers, _ = ask(TINY.params, question, state, config=TINY.config)
    expected = generate(TINY, [row + question for row in rows], max_new_tokens=ANSWER_TOKENS, method=None)
    assert answers.tolist() == expected.tokens


def test_an_answer_counts_where_it_begins_with_the_number():
    (passkey,) = make_passkeys(byte_tokenizer(), TEXT * 3, 400, [0])
    assert is_found(passkey, f" {passkey.key}. It")
    assert not is_found(passkey, f" not {passkey.key}")
    assert not is_found(passkey, f" {passkey.key}0")
    assert not is_found(passkey, f" {passkey.key[:4]}")
