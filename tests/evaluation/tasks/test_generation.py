"""Prompts of tasks: they fit the model or are named, and are decoded in batches of alike ones."""

import dataclasses

import pytest
from random_weights import random_params
from tiny_decoder import MODEL
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.evaluation.run import KEYS
from hshare_jax.evaluation.tasks.examples import DataError, Example, FileError
from hshare_jax.evaluation.tasks.generation import _in_batches_alike
from hshare_jax.evaluation.tasks.gsm8k import GSM8K
from hshare_jax.evaluation.tasks.longbench import LongBench
from hshare_jax.files.records import Records
from hshare_jax.generate import generate
from hshare_jax.models.pretrained import Model

CONFIG = dataclasses.replace(MODEL, max_positions=100)
TEMPLATE = "{% for m in messages %}the user, {{ m.content }}{% endfor %}{% if add_generation_prompt %} so, {% endif %}"
TOKENIZER, CHATTING = byte_tokenizer(LETTERS), byte_tokenizer(LETTERS)
CHATTING.chat_template = TEMPLATE
TINY = Model(CONFIG, random_params(MODEL), TOKENIZER, (), "tiny", "")
CHAT = dataclasses.replace(TINY, tokenizer=CHATTING)


def example(prompt: str, **changes: object) -> Example:
    made = Example(f"test.jsonl:{prompt[:3]}", prompt, ("1",), 8, (), wants_chat=True, task="gsm8k")
    return dataclasses.replace(made, **changes)  # pyright: ignore[reportArgumentType]


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])  # pyright: ignore[reportArgumentType]


def test_a_prompt_goes_through_the_chat_template_where_both_want_it():
    plain, chat = example("it is so", wants_chat=False), example("it is so")
    assert [found.tokens for found in GSM8K().fit(TINY, [plain, chat])[0]] == [encode("it is so")] * 2
    found, _ = GSM8K().fit(CHAT, [plain, chat])
    assert [given.tokens for given in found] == [encode("it is so"), encode("the user, it is so so, ")]
    assert [dataclasses.replace(given, tokens=()) for given in found] == [plain, chat]
    assert GSM8K().sizes(found) == [(len(given.tokens), len(given.tokens) + 8) for given in found]


def test_a_prompt_that_is_too_long_is_named_or_left_out():
    long, short = example("long " * 30), example("it is so")
    num_tokens = len(encode(long.prompt))
    message = rf"test.jsonl:lon: the prompt has {num_tokens} tokens; with max_new_tokens=8 .* 100 .* room for 92"
    with pytest.raises(DataError, match=message):
        GSM8K().fit(TINY, [short, long])
    found, num_long = GSM8K().fit(TINY, [short, long], skip_bad=True)
    assert ([given.prompt for given in found], num_long) == (["it is so"], 1)
    with pytest.raises(FileError, match="no example is left: all 2 prompts are too long for the model"):
        GSM8K().fit(TINY, [long, long], skip_bad=True)


def test_an_answer_longer_than_the_model_is_refused():
    with pytest.raises(DataError, match="max_new_tokens=100 of gsm8k must be below the model's 100 positions"):
        GSM8K().fit(TINY, [example("it", max_new_tokens=100)])


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tiny has no tokenizer, so text cannot be given to it"):
        GSM8K().fit(dataclasses.replace(TINY, tokenizer=None), [example("it")])


@pytest.mark.parametrize("model", [TINY, CHAT], ids=["plain", "chat"])
def test_a_long_prompt_of_longbench_loses_the_middle_of_its_text(model):
    text = "a" * 70 + "the middle" + "d" * 70
    (found,), num_long = LongBench().fit(model, [example(text, task="longbench/qasper")])
    assert num_long == 0
    kept = str(TOKENIZER.decode(list(found.tokens)))
    before, after = ("the user, ", " so, ") if model is CHAT else ("", "")
    most = 92 - len(encode(before + after))
    assert len(found.tokens) <= 92
    assert most - 8 <= len(encode(kept)) - len(encode(before + after)) <= most
    assert kept.startswith(before + "aaa")
    assert kept.endswith("ddd" + after)
    assert "middle" not in kept


def test_a_template_as_long_as_the_model_leaves_no_room():
    chatty = byte_tokenizer(LETTERS)
    chatty.chat_template = TEMPLATE.replace("the user, ", "so it is said " * 12)
    model = dataclasses.replace(TINY, tokenizer=chatty)
    with pytest.raises(DataError, match=r"the prompt has .* leave room for 92"):
        LongBench().fit(model, [example("it is so", task="longbench/qasper")])


def test_batches_hold_examples_that_end_alike_and_are_as_long():
    examples = [
        example("c", tokens=(1,) * 9), example("b", tokens=(1,) * 5), example("a", tokens=(1,)),
        example("stop", stop=("x",), tokens=(1,) * 2), example("more", max_new_tokens=9, tokens=(1,) * 3),
    ]  # fmt: skip
    batches = [[given.prompt for given in batch] for batch in _in_batches_alike(examples, 2)]
    assert batches == [["a", "b"], ["c"], ["stop"], ["more"]]


def test_a_line_holds_the_answer_and_its_scores(tmp_path):
    task, prompts = GSM8K(), ["it is so", "in the end it is"]
    items, _ = task.fit(TINY, [example(prompt) for prompt in prompts])
    records = Records(tmp_path / "out.jsonl", {}, keys=KEYS)
    task.run(TINY, items, {"dense": None}, records, batch_size=2)
    expected = generate(TINY, prompts, max_new_tokens=8, method=None)
    lines = [line | {"reads": None} for line in records.lines]
    assert lines == [
        {
            "id": item.id, "method": "dense", "task": "gsm8k", "text": text, "prompt_tokens": len(item.tokens),
            "new_tokens": 8, "reads": None, "scores": task.score(item, text),
        }
        for item, text in zip(items, expected.texts, strict=True)
    ]  # fmt: skip
    reads = [round(number, 1) for number in expected.usage.reads]
    assert [line["reads"] for line in records.lines] == reads
