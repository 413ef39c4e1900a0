"""What all tasks share: unfinished work keeps whole batches, and a summary is a mean of means."""

import dataclasses

from hshare_jax.evaluation.run import KEYS, in_batches, summarise, unfinished, unfinished_by_batch
from hshare_jax.files.records import Records


@dataclasses.dataclass(frozen=True)
class Item:
    id: str


A, B, C = map(Item, "abc")
METHODS = {"dense": None, "other": None}


def records_of(path, *finished):
    records = Records(path / "out.jsonl", {}, keys=KEYS)
    for item, method in finished:
        records.append({"id": item.id, "method": method})
    return records


def test_the_last_batch_may_be_smaller():
    assert in_batches([A, B, C], 2) == [[A, B], [C]]
    assert in_batches([], 2) == []


def test_a_batch_with_an_unfinished_item_is_done_again_as_a_whole(tmp_path):
    records = records_of(tmp_path, (A, "dense"), (C, "dense"), (B, "other"), (A, "other"))
    found = [(name, batch) for name, _, batch in unfinished(METHODS, [[A, B], [C]], records)]
    assert found == [("dense", [A, B]), ("other", [C])]
    found = [(name, batch) for name, _, batch in unfinished(METHODS, [[A, B], [C]], records, by_batch=True)]
    assert found == [("dense", [A, B]), ("other", [C])]


def test_all_methods_of_a_batch_come_together(tmp_path):
    records = records_of(tmp_path, (A, "dense"), (B, "dense"))
    pairs = [(name, batch) for name, _, batch in unfinished(METHODS, [[A], [B, C]], records)]
    assert pairs == [("dense", [B, C]), ("other", [A]), ("other", [B, C])]
    by_batch = [
        (batch, [name for name, _ in work])
        for batch, work in unfinished_by_batch(METHODS, [[A], [B, C]], records)
    ]  # fmt: skip
    assert by_batch == [([A], ["other"]), ([B, C], ["dense", "other"])]


def test_work_that_is_finished_on_the_way_is_not_done_again(tmp_path):
    records, done = records_of(tmp_path), []
    for batch, work in unfinished_by_batch(METHODS, [[A, B]], records):
        for name, _ in work:
            done.append((name, batch))
            for item in batch:
                records.append({"id": item.id, "method": "dense"})
                records.append({"id": item.id, "method": "other"})
    assert done == [("dense", [A, B])]


def line(method, task, reads=None, **scores):
    return {"method": method, "task": task, "scores": scores} | ({} if reads is None else {"reads": reads})


def test_a_summary_has_the_means_of_every_method():
    lines = [
        line("hshare", "gsm8k", 10, strict=1.0, flexible=1.0), line("hshare", "gsm8k", 21, strict=0.0, flexible=1.0),
        line("dense", "gsm8k", strict=1.0, flexible=0.0),
    ]  # fmt: skip
    assert summarise(lines) == {
        "hshare": {"items": 2, "reads": 15.5, "strict": 0.5, "flexible": 1.0},
        "dense": {"items": 1, "strict": 1.0, "flexible": 0.0},
    }


def test_several_tasks_count_alike_and_are_told_apart():
    lines = [line("dense", "longbench/trec", score=1.0)] * 3 + [line("dense", "longbench/lcc", score=0.5)]
    assert summarise(lines) == {
        "dense": {
            "items": 4, "score": 0.75, "tasks": {"longbench/trec": {"score": 1.0}, "longbench/lcc": {"score": 0.5}},
        }
    }  # fmt: skip


def test_perplexity_is_exp_of_the_mean_loss():
    lines = [line("dense", "perplexity", loss=1.0), line("dense", "perplexity", loss=3.0)]
    assert summarise(lines)["dense"]["perplexity"] == 7.3891
    assert summarise([line("dense", "perplexity", loss=2000.0)])["dense"]["perplexity"] == float("inf")
