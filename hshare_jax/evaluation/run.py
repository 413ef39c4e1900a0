"""Evaluation runs: items in fixed batches, every method on each, a line of results for each item and method."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from hshare_jax.evaluation.tasks.examples import DataError, Example, FileError
from hshare_jax.evaluation.tasks.passkey import Passkey, answer, is_found, read_passkeys
from hshare_jax.evaluation.text_windows import Scorer, Window
from hshare_jax.files.records import Records
from hshare_jax.generate import generate
from hshare_jax.methods.base import Method
from hshare_jax.models.pretrained import Model, ModelFiles

Settings = Method | None
Score = Callable[[Example, str], dict[str, float]]
Item = TypeVar("Item")
KEYS = ("id", "method")  # what tells lines of a results file apart


def encode_example(
    model: Model | ModelFiles, example: Example, shorten: Callable[[Sequence[int], int], list[int]] | None
) -> list[int]:
    """Returns the token ids of an example's prompt, in the model's chat template where the task wants one.

    Args:
        model: whose tokeniser and positions count.
        example: the example.
        shorten: what cuts a prompt (ids, most) that leaves no room for the answer; None: such a prompt is bad data.

    Raises:
        DataError: a prompt that is too long.
    """
    tokenizer, most = model.tokenizer, model.config.max_positions - example.max_new_tokens
    assert tokenizer is not None
    if most < 1:
        raise DataError(
            f"{example.id}: max_new_tokens={example.max_new_tokens} of {example.task} must be below the model's "
            f"{model.config.max_positions} positions"
        )
    text, has_template = example.prompt, bool(example.wants_chat and tokenizer.chat_template)
    ids = _encode(tokenizer, text, has_template)
    if len(ids) > most and shorten is not None:  # the text and not its template, as published
        room, cut = len(_encode(tokenizer, "", has_template)) if has_template else 0, most
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(ids) > most and cut > room:  # what is cut and encoded again may be some tokens longer
            text = str(tokenizer.decode(shorten(plain, cut - room), clean_up_tokenization_spaces=False))
            ids, cut = _encode(tokenizer, text, has_template), cut - 8
    if len(ids) > most:
        raise DataError(
            f"{example.id}: the prompt has {len(ids)} tokens; with max_new_tokens={example.max_new_tokens} the model's "
            f"{model.config.max_positions} positions leave room for {most}"
        )
    return list(map(int, ids))


def _encode(tokenizer: Any, text: str, has_template: bool) -> list[int]:
    if not has_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]  # the template writes the special tokens itself


def encode_examples(
    model: Model | ModelFiles,
    examples: Iterable[Example],
    *,
    shorten: Callable[[Sequence[int], int], list[int]] | None = None,
    skip_bad: bool = False,
) -> tuple[list[tuple[Example, list[int]]], int]:
    """Returns (examples with their token ids, how many were left out because they are too long for the model).

    Raises:
        DataError: a prompt that is too long, unless `skip_bad`; FileError, all of them.
    """
    encoded, num_bad = [], 0
    for example in examples:
        try:
            encoded.append((example, encode_example(model, example, shorten)))
        except DataError:
            if not skip_bad:
                raise
            num_bad += 1
    if not encoded:
        raise FileError(f"no example is left: all {num_bad} prompts are too long for the model")
    return encoded, num_bad


def run_generation(
    model: Model,
    encoded: Sequence[tuple[Example, list[int]]],
    methods: Mapping[str, Settings],
    score: Score,
    records: Records,
    *,
    batch_size: int,
    **given: Any,
) -> None:
    """Lets every method answer every example, greedily, and writes the scores; finished items are not done again.

    Args:
        model: from `load_model`.
        encoded: from `encode_examples`.
        methods: settings by name.
        score: the task's own.
        records: where lines go, keyed by `KEYS`.
        batch_size: examples decoded together, those of similar length.
        given: a plan, channels or impl, for `generate`; a plan goes to `hshare` alone, channels to it and to
            `double_sparsity`.
    """
    by_size = sorted(encoded, key=lambda pair: (pair[0].max_new_tokens, pair[0].stop, len(pair[1])))
    alike: list[list[tuple[Example, list[int]]]] = []
    for pair in by_size:
        if not alike or _limits(alike[-1][-1][0]) != _limits(pair[0]) or len(alike[-1]) == batch_size:
            alike.append([])
        alike[-1].append(pair)
    for name, method, batch in _todo(methods, alike, records, lambda pair: pair[0].id):
        first = batch[0][0]
        result = generate(
            model, [ids for _, ids in batch],
            max_new_tokens=first.max_new_tokens, method=method, stop=first.stop,
        )  # fmt: skip
        found = zip(batch, result.texts, result.tokens, result.usage.reads, strict=True)
        for (example, ids), text, tokens, reads in found:
            records.append(
                {
                    "id": example.id, "method": name, "task": example.task, "text": text,
                    "prompt_tokens": len(ids), "new_tokens": len(tokens),
                    **({"reads": round(reads, 1)} if reads else {}),  # a row that ended with the prefill's token: none
                    "scores": score(example, text),
                }
            )  # fmt: skip


def _limits(example: Example) -> tuple[int, tuple[str, ...]]:
    return example.max_new_tokens, example.stop


def run_passkeys(
    model: Model,
    passkeys: Sequence[Passkey],
    methods: Mapping[str, Settings],
    records: Records,
    *,
    batch_size: int,
    impl: str = "auto",
    **given: Any,
) -> None:
    """Asks every method for every number; a batch of texts is prefilled once for all methods."""
    batches = [list(passkeys[start : start + batch_size]) for start in range(0, len(passkeys), batch_size)]
    held = None
    for name, method, batch in _todo(methods, batches, records, lambda passkey: passkey.id, is_batch_outer=True):
        if held is None or held[0] is not batch:
            held = None  # two batches would not fit where one does
            held = batch, read_passkeys(model, batch, list(methods.values()))
        texts = answer(model, batch, held[1], method, impl=impl)
        for passkey, text in zip(batch, texts, strict=True):
            records.append(
                {
                    "id": passkey.id, "method": name, "task": "passkey", "depth": round(passkey.depth, 4),
                    "text": text, "scores": {"found": float(is_found(passkey, text))},
                }
            )  # fmt: skip


def run_texts(
    model: Model,
    windows: Sequence[Window],
    methods: Mapping[str, Settings],
    records: Records,
    *,
    steps: int,
    batch_size: int,
    impl: str = "auto",
    **given: Any,
) -> None:
    """Scores every method on the last `steps` positions of every window; a batch is prefilled once for all methods."""
    batches = [list(windows[start : start + batch_size]) for start in range(0, len(windows), batch_size)]
    held = None
    for name, method, batch in _todo(methods, batches, records, lambda window: window.id, is_batch_outer=True):
        if held is None or held[0] is not batch:
            held = None  # two batches would not fit where one does
            held = batch, Scorer(model, batch, steps, list(methods.values()), impl=impl)
        scores = held[1].score(method)
        for row, window in enumerate(batch):
            means = {key: round(float(values[row].mean()), 6) for key, values in scores.items() if key != "recall"}
            if not np.isfinite(means["loss"]):
                raise ValueError(
                    f"{window.id}: the loss of {name} is {means['loss']} in {model.dtype}: the weights are broken, or "
                    "the dtype is too narrow for them; float32 is the widest"
                )
            means["recall"] = round(float(np.nanmean(scores["recall"][row])), 6)  # it is not taken on every step
            reads = means.pop("reads")
            records.append(
                {"id": window.id, "method": name, "task": "perplexity", "steps": steps, "reads": reads, "scores": means}
            )


def _todo(
    methods: Mapping[str, Settings],
    batches: Sequence[list[Item]],
    records: Records,
    id_of: Callable[[Item], str],
    *,
    is_batch_outer: bool = False,
) -> Iterator[tuple[str, Settings, list[Item]]]:
    """Yields (name, settings, batch) where something is left to do; batches stay whole, so that numbers stay."""
    pairs = [(name, batch) for name in methods for batch in batches]
    if is_batch_outer:
        pairs = [(name, batch) for batch in batches for name in methods]
    with tqdm(total=sum(len(batch) for _, batch in pairs), desc="evaluate", unit="item", disable=None) as bar:
        for name, batch in pairs:
            if any({"id": id_of(item), "method": name} not in records for item in batch):
                yield name, methods[name], batch
            bar.update(len(batch))


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns for every method the number of items, the mean tokens read and the mean of each score.

    Of several tasks, the scores of each and their mean over tasks. Perplexity is exp of the mean loss.
    """
    found: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(line["method"] for line in lines):
        mine = [line for line in lines if line["method"] == method]
        by_task = {
            task: _mean_scores([line for line in mine if line["task"] == task])
            for task in dict.fromkeys(line["task"] for line in mine)
        }
        names = dict.fromkeys(name for scores in by_task.values() for name in scores)
        scores = {name: statistics.fmean(s[name] for s in by_task.values() if name in s) for name in names}
        if "loss" in scores:
            scores["perplexity"] = float(np.exp(scores["loss"]))
        reads = [line["reads"] for line in mine if "reads" in line]
        found[method] = {
            "items": len(mine),
            **({"reads": round(statistics.fmean(reads), 1)} if reads else {}),
            **{name: round(value, 4) for name, value in scores.items()},
            **({"tasks": by_task} if len(by_task) > 1 else {}),
        }
    return found


def _mean_scores(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for line in lines for name in line["scores"])
    return {name: round(statistics.fmean(line["scores"][name] for line in lines), 4) for name in names}
