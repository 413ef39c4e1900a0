"""GSM8K: grade school mathematics (arXiv 2110.14168), asked zero-shot and scored as lm-evaluation-harness does."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hshare_jax.errors import check_whole, setting
from hshare_jax.evaluation.metrics import best, exact_number
from hshare_jax.evaluation.tasks.examples import DataError, Example, as_record, read_json_lines, text_at
from hshare_jax.evaluation.tasks.generation import GenerationTask

# From lm-evaluation-harness's gsm8k.yaml, version 3, and its default length.
_STOP = ("Question:", "</s>", "<|im_end|>")
_MAX_NEW_TOKENS = 256
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclasses.dataclass(frozen=True)
class GSM8K(GenerationTask):
    """The problems of a published file of GSM8K (test.jsonl)."""

    name = "gsm8k"

    max_new_tokens: int | None = setting(None, "where an answer ends; by default 256")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens is not None:
            check_whole("max_new_tokens", self.max_new_tokens, 1)

    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[list[Example], int]:
        """The problems, and how many lines were bad; see `Task.read`."""
        (path,) = paths
        return read_json_lines(path, self._parse, limit=self.limit, skip_bad=skip_bad)

    def _parse(self, where: str, value: Any) -> list[Example]:
        record = as_record(where, value, "question", "answer")
        question = text_at(where, record, "question")
        number = text_at(where, record, "answer").rpartition("#### ")[2].strip()
        if not re.fullmatch(r"-?[0-9.,]*[0-9]", number):
            raise DataError(f"{where}: key 'answer' must end in '#### ' and a number")
        prompt, most = f"Question: {question}\nAnswer:", self.max_new_tokens or _MAX_NEW_TOKENS
        return [Example(where, prompt, (number,), most, _STOP, wants_chat=False, task="gsm8k")]

    def score(self, item: Example, output: str) -> dict[str, float]:
        """1 or 0 for the strict answer in a text, and for the flexible answer."""
        return {
            "strict": best(exact_number, strict_answer(output), item.references),
            "flexible": best(exact_number, flexible_answer(output), item.references),
        }


def strict_answer(text: str) -> str:
    """The first number behind "#### ", as it is written; "" if there is none."""
    found = _STRICT.search(text)
    return found[1] if found else ""


def flexible_answer(text: str) -> str:
    """The last number, as it is written; "" if there is none.

    As published, two dots, commas or dollar signs in a row count as a number.
    """
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else ""
