"""CoQA: questions of a conversation about a story (arXiv 1808.07042), asked as lm-evaluation-harness does."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hshare_jax.errors import check_one_of, check_whole, setting
from hshare_jax.evaluation.metrics import exact_match, leave_one_out, token_f1
from hshare_jax.evaluation.tasks.examples import DataError, Example, FileError, as_record, gather, load_json, text_at
from hshare_jax.evaluation.tasks.generation import GenerationTask

_STOP = ("\nQ:",)
_MAX_NEW_TOKENS = 256  # lm-evaluation-harness's default


@dataclasses.dataclass(frozen=True)
class CoQA(GenerationTask):
    """The questions of CoQA's published file (coqa-dev-v1.0.json).

    With `turns` "last" only the last question of each conversation is an example, as in lm-evaluation-harness up to the
    task's version 3. With "all" every question is an example, as in CoQA's own evaluation. The prompt holds all turns
    before the question, with their answers.
    """

    name = "coqa"

    max_new_tokens: int | None = setting(None, "where an answer ends; by default 256")
    turns: Literal["last", "all"] = setting("last", "the questions asked of a conversation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None:
            check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_one_of("turns", self.turns, ("last", "all"))

    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[list[Example], int]:
        """The questions, and how many conversations were bad; see `Task.read`.

        Raises:
            DataError: a bad conversation, named by its record number from 1; FileError, a file that is not CoQA's.
            OSError: a file that cannot be read.
        """
        (path,) = paths
        name = path.name
        try:
            records = as_record(name, load_json(name, path.read_bytes()), "data")["data"]
        except DataError as error:
            raise FileError(str(error)) from error
        if not isinstance(records, list):
            raise FileError(f"{name}: key 'data' must be a list; it is a {type(records).__name__}")
        places = ((f"{name}: record {number}", record) for number, record in enumerate(records, 1))
        return gather(name, places, self._parse, limit=self.limit, skip_bad=skip_bad)

    def _parse(self, where: str, value: Any) -> list[Example]:
        record = as_record(where, value, "id", "story", "questions", "answers")
        id_, story = text_at(where, record, "id"), text_at(where, record, "story")
        questions, answers = _read_turns(where, record, "questions"), _read_turns(where, record, "answers")
        # Only the development set has additional answers.
        more = as_record(f"{where}: key 'additional_answers'", record.get("additional_answers") or {})
        people = [answers, *(_read_turns(where, more, key) for key in more)]
        if any(person.keys() != questions.keys() for person in people):
            raise DataError(f"{where}: every question needs one answer of each person, with its turn_id")

        examples, prompt, most = [], f"{story}\n\n", self.max_new_tokens or _MAX_NEW_TOKENS
        for turn, question in questions.items():
            if not question.strip():
                raise DataError(f"{where}: question {turn} is empty")
            asked = f"{prompt}Q: {question}\n\nA:"
            references = tuple(person[turn] for person in people)
            place = f"{where}, {id_}:{turn}"
            examples.append(Example(place, asked, references, most, _STOP, wants_chat=False, task="coqa"))
            prompt = f"{asked} {answers[turn]}\n\n"
        return examples if self.turns == "all" else examples[-1:]

    def score(self, item: Example, output: str) -> dict[str, float]:
        """Exact match and F1 of a text's first line over several people's answers, by `leave_one_out`.

        Equal answers of several people all count, as in CoQA's evaluate-v1.0.py; lm-evaluation-harness drops repeats.
        """
        answer = output.strip().partition("\n")[0]
        return {
            "em": leave_one_out(exact_match, answer, item.references),
            "f1": leave_one_out(_f1, answer, item.references),
        }


def _read_turns(where: str, record: dict[str, Any], key: str) -> dict[int, str]:
    """The texts of a list of turns, by turn_id and in the list's order."""
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: key {key!r} must be a list of turns, at least one")
    texts: dict[int, str] = {}
    for turn in turns:
        turn = as_record(f"{where}: key {key!r}", turn, "turn_id", "input_text")
        if type(number := turn["turn_id"]) is not int or number in texts:
            raise DataError(f"{where}: key {key!r}: turn_id={number!r} must be a whole number of its own")
        texts[number] = text_at(f"{where}: key {key!r}", turn, "input_text", may_be_empty=True)
    return texts


def _f1(prediction: str, reference: str) -> float:
    # Two answers without a word, such as "the" and "a", agree in CoQA.
    return max(exact_match(prediction, reference), token_f1(prediction, reference))
