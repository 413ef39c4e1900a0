"""CoQA: the prompt of a conversation, and scores over several people's answers."""

import copy
import json

import pytest

from hshare_jax.evaluation.tasks.coqa import CoQA
from hshare_jax.evaluation.tasks.examples import DataError, Example


def turns(*texts):
    return [{"turn_id": number, "input_text": text} for number, text in enumerate(texts, 1)]


COTTON = {
    "id": "3dr23u6we5",
    "source": "mctest",
    "story": "Cotton was a little white kitten.",
    "questions": turns("What color was Cotton?", "Was she big?"),
    "answers": turns("white", "no"),
    "additional_answers": {"0": turns("white", "No"), "1": turns("a white kitten", "little")},
}


def with_changes(**changes):
    return copy.deepcopy(COTTON) | changes


def without(key):
    return {name: value for name, value in COTTON.items() if name != key}


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "coqa.json"
        path.write_text(json.dumps({"version": "1.0", "data": records}), encoding="utf-8")
        return path

    return write


def test_last_question_follows_the_conversation(write):
    examples, num_bad = CoQA().read([write(COTTON)])
    assert examples == [
        Example(
            id="coqa.json: record 1, 3dr23u6we5:2",
            prompt="Cotton was a little white kitten.\n\n"
            "Q: What color was Cotton?\n\nA: white\n\nQ: Was she big?\n\nA:",
            references=("no", "No", "little"),
            max_new_tokens=256,
            stop=("\nQ:",),
            wants_chat=False,
            task="coqa",
        )
    ]
    assert num_bad == 0


def test_all_turns_ask_every_question(write):
    examples, _ = CoQA(turns="all").read([write(COTTON)])
    assert [example.id for example in examples] == [
        "coqa.json: record 1, 3dr23u6we5:1",
        "coqa.json: record 1, 3dr23u6we5:2",
    ]
    assert examples[0].prompt == "Cotton was a little white kitten.\n\nQ: What color was Cotton?\n\nA:"
    assert examples[0].references == ("white", "white", "a white kitten")
    assert examples[1:] == CoQA().read([write(COTTON)])[0]


def test_limit_counts_questions(write):
    path = write(COTTON, with_changes(id="b"), with_changes(id="c", story=""))
    assert [example.id for example in CoQA(limit=3, turns="all").read([path])[0]] == [
        "coqa.json: record 1, 3dr23u6we5:1",
        "coqa.json: record 1, 3dr23u6we5:2",
        "coqa.json: record 2, b:1",
    ]
    assert [example.id for example in CoQA(limit=2).read([path])[0]] == [
        "coqa.json: record 1, 3dr23u6we5:2",
        "coqa.json: record 2, b:2",
    ]


def test_options_say_where_answers_end_and_what_is_asked(write):
    assert CoQA(max_new_tokens=7).read([write(COTTON)])[0][0].max_new_tokens == 7
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        CoQA(limit=0)


@pytest.mark.usefixtures("unchecked")
def test_there_are_two_ways_to_ask():
    with pytest.raises(ValueError, match="turns='first' must be one of 'last', 'all'"):
        CoQA(turns="first")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("more", [{}, None])
def test_additional_answers_may_be_absent(write, more):
    for record in (with_changes(additional_answers=more), without("additional_answers")):
        assert CoQA().read([write(record)])[0][0].references == ("no",)


@pytest.mark.parametrize(
    ("text", "references", "em", "f1"),
    [
        (" White.\nShe was", ("white",), 1.0, 1.0),
        # Left out in turn: the best of the others is 1, 1 and 1.
        ("white", ("white", "white", "a white kitten"), 1.0, 1.0),
        # f1 is 2/3 with "white" and 1 with "a white kitten": 1, 1 and 2/3; an exact match is 1, 1 and 0.
        ("the white kitten", ("white", "white", "a white kitten"), 2 / 3, 8 / 9),
        ("no", ("no", "yes"), 1 / 2, 1 / 2),
        ("the", ("a",), 1.0, 1.0),  # no words agree with no words
        ("", ("no",), 0.0, 0.0),
    ],
)
def test_scores_are_those_of_evaluate_v1(text, references, em, f1):
    # Computed by hand from CoQA's evaluate-v1.0.py (compute_f1 and _compute_turn_score).
    example = Example("a:1", "Q", references, 256, (), False, "coqa")
    assert CoQA().score(example, text) == {"em": pytest.approx(em), "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("story"), "key 'story' is missing; each needs id, story, questions and answers"),
        (with_changes(story=" "), "key 'story' is empty"),
        (with_changes(id=3), "key 'id' must be a text"),
        (with_changes(questions=turns("What?", "")), "question 2 is empty"),
        (with_changes(questions=[]), "key 'questions' must be a list of turns, at least one"),
        (with_changes(questions="What?"), "key 'questions' must be a list of turns"),
        (with_changes(questions=["What?", "Big?"]), "key 'questions': must be an object"),
        (with_changes(questions=[{"turn_id": 1}]), "key 'questions': key 'input_text' is missing"),
        (with_changes(answers=turns("white")), "every question needs one answer of each person"),
        (with_changes(answers=turns("white", 2)), "key 'answers': key 'input_text' must be a text"),
        (with_changes(answers=turns("white")[:1] * 2), "key 'answers': turn_id=1 must be a whole number of its own"),
        (with_changes(answers=[{"turn_id": "1", "input_text": "no"}]), "turn_id='1' must be a whole number"),
        (with_changes(additional_answers={"0": turns("white")}), "every question needs one answer of each person"),
        (with_changes(additional_answers=["white"]), "key 'additional_answers': must be an object"),
        ("Cotton", "must be an object, with keys and values; it is a str"),
    ],
)
def test_bad_conversations_are_named_or_skipped(write, record, message):
    path = write(COTTON, COTTON, record)
    with pytest.raises(DataError, match=r"^coqa\.json: record 3: ") as raised:
        CoQA().read([path])
    assert message in str(raised.value)
    examples, num_bad = CoQA().read([path], skip_bad=True)
    assert (len(examples), num_bad) == (2, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "coqa.json: not JSON"),
        (b'{"data": [', "coqa.json: not JSON"),
        (b'{"data": ["caf\xe9"]}', "coqa.json is not UTF-8"),
        (b"[]", "coqa.json: must be an object"),
        (b"{}", "coqa.json: key 'data' is missing"),
        (b'{"data": {}}', "coqa.json: key 'data' must be a list; it is a dict"),
        (b'{"data": []}', "coqa.json holds no examples"),
    ],
)
def test_a_file_that_is_not_coqa_is_an_error_even_when_skipping(tmp_path, content, message):
    path = tmp_path / "coqa.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        CoQA().read([path], skip_bad=True)
    assert str(raised.value).startswith(message)
