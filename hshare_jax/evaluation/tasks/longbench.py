"""LongBench: its sixteen English tasks (arXiv 2308.14508), asked and scored as its published code does."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hshare_jax.errors import SettingError, setting
from hshare_jax.evaluation.metrics import (
    best,
    check_libraries,
    classification,
    code_similarity,
    count,
    retrieval,
    rouge_l,
    token_f1,
)
from hshare_jax.evaluation.tasks.examples import DataError, Example, as_record, read_json_lines, text_at, texts_at
from hshare_jax.evaluation.tasks.generation import GenerationTask, encode_prompt, has_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompts are LongBench's config/dataset2prompt.json, letter for letter (github.com/THUDM/LongBench; MIT licence,
# Copyright (c) 2023 THU-KEG & Zhipu AI). The lengths are its config/dataset2maxlen.json.
_MULTI_HOP = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
_TEMPLATES = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the "
        "question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n"
        "\nStory: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if "
        "possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
    ),
    "qasper": (
        "You are given a scientific article and a question. Answer the question as concisely as you can, "
        "using a single phrase or sentence if possible. If the question cannot be answered based on the "
        'information in the article, write "unanswerable". If the question is a yes/no question, answer '
        '"yes", "no", or "unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n'
        " Answer the question based on the above article as concisely as you can, using a single phrase or "
        "sentence if possible. If the question cannot be answered based on the information in the article, "
        'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not "
        "output any other words.\n\nQuestion: {input}\nAnswer:"
    ),
    "hotpotqa": _MULTI_HOP,
    "2wikimqa": _MULTI_HOP,
    "musique": _MULTI_HOP,
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n"
        "{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the "
        "query in one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:"
    ),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}"
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The following are some examples.\n\n{context}\n\n{input}"
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}"
    ),
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please "
        "carefully read these paragraphs and determine how many unique paragraphs there are after removing "
        "duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format "
        "should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
    ),
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
_MAX_NEW_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
SUBSETS = tuple(_TEMPLATES)
# The prompts of these tasks end in examples of one line each: no chat template, and the answer is one line.
_FEW_SHOT = ("trec", "triviaqa", "samsum")
_CODE = ("lcc", "repobench-p")


@dataclasses.dataclass(frozen=True)
class LongBench(GenerationTask):
    """LongBench's English tasks, from a file of JSON lines.

    A line is published (dataset, context, input, answers, all_classes) or already rendered (task, prompt, answers,
    all_classes). Other keys are ignored. `limit` counts the examples of all tasks together.
    """

    name = "longbench"

    subset: Sequence[str] | None = setting(None, "only these of LongBench's tasks; by default all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.subset or ()) - set(SUBSETS)):
            rule = f"is none of LongBench's English tasks: {', '.join(SUBSETS)}"
            raise SettingError("subset", ", ".join(unknown), rule)

    def read(self, paths: Sequence[Path], *, skip_bad: bool = False) -> tuple[list[Example], int]:
        """The examples, and how many lines were bad; see `Task.read`."""
        check_libraries()
        (path,) = paths
        return read_json_lines(path, self._parse, limit=self.limit, skip_bad=skip_bad)

    def _parse(self, where: str, value: Any) -> list[Example]:
        record = as_record(where, value)
        is_rendered = "prompt" in record
        task_key, *text_keys = ("task", "prompt") if is_rendered else ("dataset", "context", "input")
        as_record(where, record, task_key, *text_keys, "answers", "all_classes")
        task = text_at(where, record, task_key)
        if task not in SUBSETS:
            raise DataError(f"{where}: {task_key}={task!r} is none of LongBench's English tasks: {', '.join(SUBSETS)}")
        if self.subset is not None and task not in self.subset:
            return []
        template = "{prompt}" if is_rendered else _TEMPLATES[task]
        # A text that the template leaves out may be empty: a report to be summarised has no input.
        fields = {key: text_at(where, record, key, may_be_empty=f"{{{key}}}" not in template) for key in text_keys}
        references = texts_at(where, record, "answers")
        if task == "passage_retrieval_en" and not all(re.fullmatch(r"Paragraph \d+", text) for text in references):
            raise DataError(f"{where}: key 'answers' must hold 'Paragraph' and a number; it is {list(references)}")
        return [
            Example(
                id=where,
                prompt=template.format(**fields),
                references=references,
                max_new_tokens=_MAX_NEW_TOKENS[task],
                stop=(),
                wants_chat=task not in _FEW_SHOT + _CODE,
                task=f"longbench/{task}",
                classes=texts_at(where, record, "all_classes") if task == "trec" else (),
            )
        ]

    def shorten(self, tokenizer: "PreTrainedTokenizerBase", example: Example, room: int) -> list[int]:
        """The token ids of a prompt without the middle of the text. The chat template stays whole, as published."""
        from hshare_jax.prompts import tokenize

        of_template = 0
        if has_template(tokenizer, example):
            of_template = len(encode_prompt(tokenizer, dataclasses.replace(example, prompt="")))
        text = tokenize(tokenizer, example.prompt, name=example.id, add_special_tokens=False)
        tokens = encode_prompt(tokenizer, example)
        # A text that is cut and encoded again may have some tokens more than were kept. Then less of it is kept.
        for kept in range(room - of_template, 1, -8):
            shorter = tokenizer.decode(truncate_middle(text, kept), clean_up_tokenization_spaces=False)
            tokens = encode_prompt(tokenizer, dataclasses.replace(example, prompt=str(shorter)))
            if len(tokens) <= room:
                break
        return tokens

    def score(self, item: Example, output: str) -> dict[str, float]:
        """The task's metric of a text, against the reference that fits best (LongBench's eval.py)."""
        task = item.task.removeprefix("longbench/")
        if task in _FEW_SHOT:
            output = output.lstrip("\n").partition("\n")[0]
        return {"score": best(_metric(task, item.classes), output, item.references)}


def _metric(task: str, classes: tuple[str, ...]) -> Callable[[str, str], float]:
    match task:
        case "gov_report" | "qmsum" | "multi_news" | "samsum":
            return rouge_l
        case "trec":
            return functools.partial(classification, classes=classes)
        case "passage_count":
            return count
        case "passage_retrieval_en":
            return retrieval
        case "lcc" | "repobench-p":
            return code_similarity
        case _:  # the questions
            return token_f1


def truncate_middle(ids: Sequence[int], max_length: int) -> list[int]:
    """The first and the last `max_length // 2` of too many token ids.

    A prompt has an instruction at either end, so its middle is left out. LongBench decodes both halves and encodes the
    text again.

        # max_length 4:  1 2 3 4 5 6 -> 1 2 5 6
    """
    if max_length < 2:
        raise ValueError(f"max_length={max_length} must be at least 2, a token for each half")
    if len(ids) <= max_length:
        return list(ids)
    half = max_length // 2
    return [*ids[:half], *ids[-half:]]
