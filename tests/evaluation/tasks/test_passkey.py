"""Passkey retrieval: options that cannot be, passkeys that fit the model, and the lines that a run writes."""

import dataclasses
from fractions import Fraction

import pytest
from random_weights import random_params
from tiny_decoder import HSHARE, MODEL
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.evaluation.passkeys import ANSWER_TOKENS, answer, make_passkeys, read_passkeys
from hshare_jax.evaluation.run import KEYS
from hshare_jax.evaluation.tasks.passkey import PasskeyRetrieval
from hshare_jax.files.records import Records
from hshare_jax.models.pretrained import Model

TINY = Model(
    dataclasses.replace(MODEL, max_positions=512), random_params(MODEL), byte_tokenizer(LETTERS), (), "tiny", ""
)
TEXT = "the rain in spain stays mainly in the plain, or so it is said. " * 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"skip_start": Fraction(1)}, r"skip_start=1 must lie in \[0, 1\)"),
        ({"depth": Fraction(3, 2)}, r"depth=3/2 must lie in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PasskeyRetrieval(**options)


def test_a_book_gives_a_passkey_for_each_seed(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    task = PasskeyRetrieval(limit=3, context=200, skip_start=Fraction(1, 2), depth=Fraction(1, 4), seed=7)
    book, num_bad = task.read([tmp_path / "book.txt"])
    assert (book, num_bad) == (TEXT, 0)
    passkeys, num_long = task.fit(TINY, book)
    half = TEXT[len(TEXT) // 2 :]
    assert (passkeys, num_long) == (make_passkeys(byte_tokenizer(LETTERS), half, 200, range(7, 10), depth=0.25), 0)
    prefilled = len(passkeys[0].text)
    assert task.sizes(passkeys) == [(prefilled, 200 + ANSWER_TOKENS)] * 3
    with pytest.raises(ValueError, match="context=505 must be at most 504, so that the model has room for the answer"):
        PasskeyRetrieval(context=505).fit(TINY, book)


def test_a_line_holds_the_answer_and_whether_the_number_is_found(tmp_path):
    task = PasskeyRetrieval(limit=3, context=200)
    passkeys, _ = task.fit(TINY, TEXT)
    records = Records(tmp_path / "out.jsonl", {}, keys=KEYS)
    methods = {"hshare": HSHARE, "dense": None}
    task.run(TINY, passkeys, methods, records, batch_size=2)
    assert [(line["id"], line["method"]) for line in records.lines] == [
        *[(passkey.id, name) for name in methods for passkey in passkeys[:2]],
        *[(passkeys[2].id, name) for name in methods],
    ]
    prefilled = read_passkeys(TINY, passkeys[:2], [HSHARE, None])
    texts = answer(TINY, passkeys[:2], prefilled, HSHARE)
    assert [line["text"] for line in records.lines[:2]] == texts
    assert task.score(passkeys[0], f" {passkeys[0].key}.") == {"found": 1.0}
    assert task.score(passkeys[0], " 1") == {"found": 0.0}
    assert records.lines[0] == {
        "id": passkeys[0].id, "method": "hshare", "task": "passkey", "depth": round(passkeys[0].depth, 4),
        "text": texts[0], "scores": task.score(passkeys[0], texts[0]),
    }  # fmt: skip
