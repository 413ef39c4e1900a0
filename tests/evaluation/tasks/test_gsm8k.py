"""GSM8K: the published prompt, and the number that is found in awkward answers."""

import json

import pytest

from hshare_jax.evaluation.tasks.examples import DataError, Example
from hshare_jax.evaluation.tasks.gsm8k import GSM8K, flexible_answer, strict_answer

# The first problem of the published test set, shortened.
DUCKS = {"question": "How much a day?", "answer": "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"}


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "test.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return path

    return write


def test_prompt_is_the_zero_shot_one_of_lm_evaluation_harness(write):
    examples, num_bad = GSM8K().read([write(DUCKS)])
    assert examples == [
        Example(
            id="test.jsonl:1",
            prompt="Question: How much a day?\nAnswer:",
            references=("18",),
            max_new_tokens=256,
            stop=("Question:", "</s>", "<|im_end|>"),
            wants_chat=False,
            task="gsm8k",
        )
    ]
    assert num_bad == 0


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (DUCKS["answer"], "18", "18"),
        ("", "", ""),
        ("I cannot tell.", "", ""),
        ("18", "", "18"),
        ("7", "", "7"),  # one digit alone
        ("#### 18", "18", "18"),
        ("####18", "", "18"),  # strict asks for the space
        ("#### $18", "", "$18"),  # and for no sign
        ("#### 18 ducks", "18", "18"),
        ("#### 18.", "18.", "18."),
        ("#### 1,450,000", "1,450,000", "1,450,000"),
        ("#### -10", "-10", "-10"),
        ("#### 2.50", "2.50", "2.50"),
        ("#### 18\n\n#### 20", "18", "20"),  # the first, and the last
        ("The answer is $18.", "", "$18."),
        ("The answer is -$18", "", "-$18"),
        ("The answer is $-18", "", "-18"),
        ("9 * 2 = 18, of 100%", "", "100"),
        ("It takes 3 hours and 20 minutes.", "", "20"),
        ("between 16-18", "", "-18"),  # a range reads as a sign
        ("18...", "", "18..."),
        ("18 and so on...", "", "..."),  # as published, dots pass for a number
        ("\u221218", "", "18"),  # a typographic minus is no sign
        ("#### \uff11\uff18", "", ""),  # digits are ASCII
        ("x\u00b2 = 18 \u20ac", "", "18"),
    ],
)
def test_number_is_found_as_it_is_spelt(text, strict, flexible):
    assert strict_answer(text) == strict
    assert flexible_answer(text) == flexible


@pytest.mark.parametrize(
    ("reference", "text", "strict", "flexible"),
    [
        ("18", "So she makes $18.", 0, 1),
        ("18", "So she makes $18.\n#### 18", 1, 1),
        ("18", "#### 18\nor 20", 1, 0),
        ("70,000", "#### 70000", 1, 1),
        ("70000", "He made $70,000.", 0, 1),
        ("-10", "#### -10.", 1, 1),
        ("10", "#### -10", 0, 0),
        ("18", "#### 18.00", 0, 0),  # compared as text
        ("18", "18...", 0, 0),  # one dot alone is removed
        ("18", "eighteen", 0, 0),
        ("18", "", 0, 0),
    ],
)
def test_answers_are_scored_by_both_rules(write, reference, text, strict, flexible):
    (example,), _ = GSM8K().read([write({"question": "How many?", "answer": f"#### {reference}"})])
    assert GSM8K().score(example, text) == {"strict": strict, "flexible": flexible}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "How many?"}, "key 'answer' is missing; each needs question and answer"),
        ({"question": "", "answer": "#### 1"}, "key 'question' is empty"),
        ({"question": "How many?", "answer": 18}, "key 'answer' must be a text"),
        ({"question": "How many?", "answer": "some"}, "key 'answer' must end in '#### ' and a number"),
        ({"question": "How many?", "answer": "#### 18 ducks"}, "key 'answer' must end in '#### ' and a number"),
    ],
)
def test_bad_problems_are_named_or_skipped(write, record, message):
    path = write(DUCKS, record, DUCKS)
    with pytest.raises(DataError, match=r"^test\.jsonl:2: ") as raised:
        GSM8K().read([path])
    assert message in str(raised.value)
    examples, num_bad = GSM8K().read([path], skip_bad=True)
    assert (len(examples), num_bad) == (2, 1)
    assert len(GSM8K(limit=1).read([path])[0]) == 1


def test_the_option_says_where_answers_end(write):
    assert GSM8K(max_new_tokens=7).read([write(DUCKS)])[0][0].max_new_tokens == 7
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        GSM8K(max_new_tokens=0)
