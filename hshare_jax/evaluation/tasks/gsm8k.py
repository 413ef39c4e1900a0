"""GSM8K: grade school mathematics (arXiv 2110.14168), asked zero-shot and scored as lm-evaluation-harness does."""

import os
import re
from typing import Any

from hshare_jax.evaluation.metrics import best, exact_number
from hshare_jax.evaluation.tasks.examples import DataError, Example, as_record, read_json_lines, text_at

# From lm-evaluation-harness's gsm8k.yaml, version 3, and its default length.
_STOP = ("Question:", "</s>", "<|im_end|>")
_MAX_NEW_TOKENS = 256
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def read(
    path: str | os.PathLike[str], *, limit: int | None = None, skip_bad: bool = False
) -> tuple[list[Example], int]:
    """Returns the problems of a published file (test.jsonl), and how many lines were bad; see `read_json_lines`."""
    return read_json_lines(path, _parse, limit=limit, skip_bad=skip_bad)


def _parse(where: str, value: Any) -> list[Example]:
    record = as_record(where, value, "question", "answer")
    question = text_at(where, record, "question")
    number = text_at(where, record, "answer").rpartition("#### ")[2].strip()
    if not re.fullmatch(r"-?[0-9.,]*[0-9]", number):
        raise DataError(f"{where}: key 'answer' must end in '#### ' and a number")
    prompt = f"Question: {question}\nAnswer:"
    return [Example(where, prompt, (number,), _MAX_NEW_TOKENS, _STOP, wants_chat=False, task="gsm8k")]


def score(example: Example, text: str) -> dict[str, float]:
    """Returns 1 or 0 for a text, cut at the stop strings, by its strict and its flexible answer."""
    return {
        "strict": best(exact_number, strict_answer(text), example.references),
        "flexible": best(exact_number, flexible_answer(text), example.references),
    }


def strict_answer(text: str) -> str:
    """Returns the first number behind "#### ", as it is spelt; "" if there is none."""
    found = _STRICT.search(text)
    return found[1] if found else ""


def flexible_answer(text: str) -> str:
    """Returns the last number, as it is spelt; "" if there is none.

    As published, two dots, commas or dollar signs in a row pass for a number.
    """
    found = _FLEXIBLE.findall(text)
    return found[-1] if found else ""
