"""Shared by the runs of all evaluation tasks: batches, the work that is left to do, and a summary of the results."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

if TYPE_CHECKING:
    from hshare_jax.files.records import Records
    from hshare_jax.methods.base import Method

KEYS = ("id", "method")  # the fields that tell the lines of a results file apart


@runtime_checkable
class HasId(Protocol):
    """An item of a task."""

    @property
    def id(self) -> str:
        """Names the item in the results file; the same on every run."""
        ...


Item = TypeVar("Item", bound=HasId)


def in_batches(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """The items in batches of `batch_size`; the last batch may be smaller."""
    return [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]


def unfinished(
    methods: "Mapping[str, Method | None]",
    batches: Sequence[list[Item]],
    records: "Records",
    *,
    by_batch: bool = False,
) -> "Iterator[tuple[str, Method | None, list[Item]]]":
    """Yields a method's name, the method and a batch wherever results are missing, and draws a progress bar.

    A batch of which some items are finished is yielded whole, so that a resumed run computes the same numbers.

    Args:
        methods: the methods by name.
        batches: the batches.
        records: the results file, keyed by `KEYS`.
        by_batch: yields all methods of a batch before the next batch. Otherwise all batches of a method come first.
    """
    pairs = [(name, batch) for name in methods for batch in batches]
    if by_batch:
        pairs = [(name, batch) for batch in batches for name in methods]
    with tqdm(total=sum(len(batch) for _, batch in pairs), desc="evaluate", unit="item", disable=None) as bar:
        for name, batch in pairs:
            if any({"id": item.id, "method": name} not in records for item in batch):
                yield name, methods[name], batch
            bar.update(len(batch))


def unfinished_by_batch(
    methods: "Mapping[str, Method | None]", batches: Sequence[list[Item]], records: "Records"
) -> "Iterator[tuple[list[Item], Iterator[tuple[str, Method | None]]]]":
    """Yields each batch with the methods that lack results of it, for tasks that prefill a batch only once."""
    work = unfinished(methods, batches, records, by_batch=True)
    for batch, of_batch in itertools.groupby(work, key=lambda item: item[2]):
        yield batch, ((name, method) for name, method, _ in of_batch)


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every method, the number of items, the mean of the tokens read and the mean of each score.

    If the lines are of several tasks, a score is the mean over the tasks' means, and the tasks' own scores are added.
    Perplexity is exp of the mean loss.
    """
    summary: dict[str, dict[str, Any]] = {}
    for method in dict.fromkeys(line["method"] for line in lines):
        of_method = [line for line in lines if line["method"] == method]
        by_task = {
            task: _mean_scores([line for line in of_method if line["task"] == task])
            for task in dict.fromkeys(line["task"] for line in of_method)
        }
        names = dict.fromkeys(name for scores in by_task.values() for name in scores)
        means = {name: statistics.fmean(s[name] for s in by_task.values() if name in s) for name in names}
        if "loss" in means:
            means["perplexity"] = math.exp(means["loss"]) if means["loss"] < 700 else math.inf  # exp(710) overflows
        found: dict[str, Any] = {"items": len(of_method)}
        if reads := [line["reads"] for line in of_method if "reads" in line]:
            found["reads"] = round(statistics.fmean(reads), 1)
        found |= _rounded(means)
        if len(by_task) > 1:
            found["tasks"] = {task: _rounded(scores) for task, scores in by_task.items()}
        summary[method] = found
    return summary


def _mean_scores(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for line in lines for name in line["scores"])
    return {name: statistics.fmean(line["scores"][name] for line in lines) for name in names}


def _rounded(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}
