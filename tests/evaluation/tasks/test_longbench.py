"""LongBench: published and rendered lines, each task's metric, and prompts cut in the middle."""

import json
import sys
from pathlib import Path

import pytest

from hshare_jax.evaluation.tasks.examples import DataError, Example
from hshare_jax.evaluation.tasks.longbench import SUBSETS, LongBench, truncate_middle

HOTPOT = {
    "input": "Which {city}?",
    "context": "Passage 1:\nParis {is} a city.",
    "answers": ["Paris", "Lutetia"],
    "length": 5,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "0f1e",
}
RENDERED = {"task": "lcc", "prompt": "def f():\nNext line of code:\n", "answers": ["    pass"], "all_classes": None}
TREC = HOTPOT | {"dataset": "trec", "answers": ["Date"], "all_classes": ["Date", "Color"]}


@pytest.fixture
def write(tmp_path):
    def write(*records):
        path = tmp_path / "mini.jsonl"
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        return path

    return write


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def test_a_published_line_is_put_into_its_template(write):
    examples, num_bad = LongBench().read([write(HOTPOT)])
    instruction = (
        "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    )
    assert examples == [
        Example(
            id="mini.jsonl:1",
            prompt=f"{instruction}\n\nThe following are given passages.\nPassage 1:\nParis {{is}} a city.\n\n"
            f"{instruction}\n\nQuestion: Which {{city}}?\nAnswer:",
            references=("Paris", "Lutetia"),
            max_new_tokens=32,
            stop=(),
            wants_chat=True,
            task="longbench/hotpotqa",
        )
    ]
    assert num_bad == 0


def test_a_rendered_line_keeps_its_prompt(write):
    (example,), _ = LongBench().read([write(RENDERED)])
    assert example.prompt == RENDERED["prompt"]
    assert (example.task, example.max_new_tokens, example.references) == ("longbench/lcc", 64, ("    pass",))


def test_there_are_sixteen_tasks(write):
    answers = ["Paragraph 1"]  # right for every task
    examples, _ = LongBench().read([write(*(TREC | {"dataset": task, "answers": answers} for task in SUBSETS))])
    assert len(examples) == 16
    assert [example.task for example in examples if not example.wants_chat] == [
        "longbench/trec",
        "longbench/triviaqa",
        "longbench/samsum",
        "longbench/lcc",
        "longbench/repobench-p",
    ]
    assert not any(example.stop for example in examples)  # what counts of an answer is cut by its score
    assert [example.task for example in examples if example.classes] == ["longbench/trec"]
    assert all("Paris {is} a city." in example.prompt for example in examples)
    no_input = [example.task for example in examples if "Which {city}?" not in example.prompt]
    assert no_input == [f"longbench/{task}" for task in ("gov_report", "multi_news", "passage_count", "lcc")]


def test_what_the_template_does_not_ask_for_may_be_empty(write):
    (example,), _ = LongBench().read([write(HOTPOT | {"dataset": "gov_report", "input": ""})])
    assert example.prompt.startswith("You are given a report")


def test_only_the_chosen_tasks_are_read(write):
    path = write(HOTPOT, RENDERED, HOTPOT)
    assert [example.id for example in LongBench(subset=["lcc"]).read([path])[0]] == ["mini.jsonl:2"]
    assert [example.id for example in LongBench(limit=2, subset=["hotpotqa"]).read([path])[0]] == [
        "mini.jsonl:1",
        "mini.jsonl:3",
    ]
    with pytest.raises(DataError, match="holds no examples to read; of its 3 records 0 are bad"):
        LongBench(subset=["trec"]).read([path])
    with pytest.raises(ValueError, match="subset='dureader' is none of LongBench's English tasks: narrativeqa, "):
        LongBench(subset=["lcc", "dureader"])


@pytest.mark.parametrize(
    ("task", "answers", "text", "score"),
    [
        ("narrativeqa", ["a big cat", "dog"], "The cat", 2 / 3),  # precision 1, recall 1/2
        ("hotpotqa", ["Paris"], "Paris\nbecause", 2 / 3),  # questions count all lines: precision 1/2, recall 1
        ("triviaqa", ["Paris"], "\n\nParis\nQuestion: more", 1.0),  # but of these only the first
        ("triviaqa", ["Paris"], "  \nParis", 0.0),  # only newlines are stripped
        ("trec", ["Date"], "Date\nColor", 1.0),
        ("trec", ["Date"], "Date, Color\n", 1 / 2),
        ("samsum", ["police killed the gunman"], "\npolice kill the gunman\nDialogue", 3 / 4),
        ("gov_report", ["police killed the gunman"], "police\nkill the gunman", 3 / 4),
        ("qmsum", ["yes"], "yes", 1.0),
        ("multi_news", ["yes"], "", 0.0),
        ("passage_count", ["11"], "11 or 12", 1 / 2),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 3", 1.0),
        ("passage_retrieval_en", ["Paragraph 3"], "Paragraph 30", 0.0),
        ("lcc", ["    pass"], "# nothing\n    pass\nmore", 1.0),
        ("repobench-p", ["return x"], "", 0.0),
    ],
)
def test_each_task_has_its_published_metric(write, task, answers, text, score):
    (example,), _ = LongBench().read([write(TREC | {"dataset": task, "answers": answers})])
    assert LongBench().score(example, text) == {"score": pytest.approx(score)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without(HOTPOT, "context"), "key 'context' is missing; each needs dataset, context, input, answers"),
        (without(RENDERED, "task"), "key 'task' is missing; each needs task, prompt, answers and all_classes"),
        (without(RENDERED, "prompt"), "key 'dataset' is missing"),
        (without(TREC, "all_classes"), "key 'all_classes' is missing"),
        (HOTPOT | {"input": ""}, "key 'input' is empty"),
        (HOTPOT | {"context": " "}, "key 'context' is empty"),
        (RENDERED | {"prompt": ""}, "key 'prompt' is empty"),
        (RENDERED | {"prompt": ["a"]}, "key 'prompt' must be a text; it is a list"),
        (RENDERED | {"answers": "['    pass']"}, "key 'answers' must be a list of texts"),
        (RENDERED | {"answers": []}, "key 'answers' must be a list of texts, at least one"),
        (RENDERED | {"task": "dureader"}, "task='dureader' is none of LongBench's English tasks: narrativeqa, "),
        (TREC | {"all_classes": None}, "key 'all_classes' must be a list of texts"),
        (HOTPOT | {"dataset": "passage_retrieval_en"}, "key 'answers' must hold 'Paragraph' and a number; it is ['Pa"),
        ([], "must be an object"),
    ],
)
def test_bad_lines_are_named_or_skipped(write, record, message):
    path = write(HOTPOT, record, RENDERED)
    with pytest.raises(DataError, match=r"^mini\.jsonl:2: ") as raised:
        LongBench().read([path])
    assert message in str(raised.value)
    examples, num_bad = LongBench().read([path], skip_bad=True)
    assert (len(examples), num_bad) == (2, 1)


@pytest.mark.parametrize(
    ("length", "max_length", "kept"),
    [
        (0, 4, []),
        (4, 4, [0, 1, 2, 3]),
        (5, 4, [0, 1, 3, 4]),
        (6, 5, [0, 1, 4, 5]),  # halves are equal: one less than allowed
        (6, 2, [0, 5]),
    ],
)
def test_a_long_prompt_loses_its_middle(length, max_length, kept):
    assert truncate_middle(range(length), max_length) == kept


def test_truncation_needs_room_for_both_halves():
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        truncate_middle([1, 2, 3], 1)


def test_a_missing_library_is_named_before_the_file_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)  # how Python notes that a module is not there
    with pytest.raises(ModuleNotFoundError) as raised:
        LongBench().read([Path("absent.jsonl")])
    assert raised.value.name == "rapidfuzz"
