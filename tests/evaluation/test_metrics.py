"""Metrics: published examples, and values computed by hand from the definitions."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest

from hshare_jax.evaluation.metrics import (
    best,
    classification,
    code_similarity,
    count,
    exact_match,
    exact_number,
    leave_one_out,
    normalise,
    retrieval,
    rouge_l,
    token_f1,
)

CLASSES = ("Other number", "number", "Date", "Color")
TEXT = st.text("aé the1,.$-#\n`", max_size=20)
METRICS = [
    exact_match,
    exact_number,
    token_f1,
    rouge_l,
    count,
    retrieval,
    code_similarity,
    functools.partial(classification, classes=CLASSES),
]


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Cat\n sat, on a mat!", "cat sat on mat"),
        ("the U.S.'s", "uss"),
        ("another theme", "another theme"),
        ("A", ""),
        ("“quoted” — ÉTÉ", "“quoted” — été"),  # only ASCII punctuation goes
        ("a-the", "athe"),  # punctuation goes before articles
    ],
)
def test_answers_are_normalised_as_squad_does(answer, normal):
    assert normalise(answer) == normal


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Denver Broncos", "the Denver Broncos.", 1.0),
        ("in the white town", "White", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # precision 1/3, recall 1
        (
            "cat cat dog",
            "cat dog dog bird",
            2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4),
        ),  # repeats count as often as shared
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("the", "a", 0.0),  # as LongBench, which finds nothing in common
    ],
)
def test_token_f1_is_that_of_shared_words(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("The cat!", "cat", 1.0), ("the", "a", 1.0), ("cats", "cat", 0.0), ("", "cat", 0.0)],
)
def test_exact_match_ignores_case_articles_and_punctuation(prediction, reference, score):
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "score"),
    [("1,000", 1), ("$1000", 1), ("1000.", 1), ("$1,000.", 1), ("1000.00", 0), ("1000..", 0), ("-1000", 0), ("", 0)],
)
def test_numbers_are_compared_as_they_are_spelt(prediction, score):
    assert exact_number(prediction, "1,000") == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # Lin 2004, section 3.1: its S2 and S3 against S1, all of four words.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # Distinct words, case and all: one of one predicted, one of two wanted.
        ("the the the", "the The", 2 / 3),
        ("", "police killed the gunman", 0.0),
        (" ... ", "police killed the gunman", 0.0),
        ("word " * 3000, "word", 1.0),
    ],
)
def test_rouge_l_is_that_of_the_longest_common_subsequence(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score, abs=1e-7)  # the library adds 1e-8 to a divisor


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Date", "Date", 1.0),
        ("It is a Date or a Color", "Date", 1 / 2),
        ("Other number", "Other number", 1.0),  # "number" is a part of the right name
        ("Other number", "number", 1 / 2),  # but a longer wrong name counts
        ("number", "Other number", 0.0),
        ("date", "Date", 0.0),
        ("", "Date", 0.0),
    ],
)
def test_classification_is_shared_by_the_names_given(prediction, reference, score):
    assert classification(prediction, reference, CLASSES) == score


@pytest.mark.parametrize(
    ("prediction", "score"), [("11", 1.0), ("11 of 30", 1 / 2), ("There are 11.", 1.0), ("111", 0.0), ("eleven", 0.0)]
)
def test_count_and_retrieval_are_the_share_of_right_numbers(prediction, score):
    assert count(prediction, "11") == score
    assert retrieval(prediction, "Paragraph 11") == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("this is a test", "this is a test!", 0.97),  # fuzzywuzzy's README
        ("\n\nreturn x\nother", "return x", 1.0),
        ("```python\n# first\n// or\nreturn x", "return x", 1.0),
        ("x = 1  # one", "x = 1", 0.0),  # as published, a line with a comment in it is one
        ("\n\n", "return x", 0.0),
        ("return x", "return y", 0.88),  # 2 x 7 equal characters of 16: 87.5, rounded to even
    ],
)
def test_code_similarity_is_that_of_the_first_line_of_code(prediction, reference, score):
    assert code_similarity(prediction, reference) == score


def test_best_takes_the_reference_that_fits():
    assert best(exact_match, "two", ["one", "two", "three"]) == 1.0
    assert best(exact_match, "four", ["one", "two", "three"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        ("yes", ["yes"], 1.0),
        ("yes", ["yes", "no"], 1 / 2),  # without the first only "no" is left
        ("yes", ["yes", "yes", "no"], 1.0),
        ("no", ["yes", "yes", "yes", "no"], 3 / 4),
        ("maybe", ["yes", "yes", "no"], 0.0),
    ],
)
def test_each_reference_is_left_out_in_turn(prediction, references, score):
    assert leave_one_out(exact_match, prediction, references) == score


@hypothesis.given(prediction=TEXT, reference=TEXT)
def test_every_score_lies_between_0_and_1(prediction, reference):
    for metric in METRICS:
        assert 0 <= metric(prediction, reference) <= 1
