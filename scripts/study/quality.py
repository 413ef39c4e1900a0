"""Measures what plans, labels and dense layers cost in quality, without tails; writes docs/quality-tables.md.

A tail hides much of what a list misses, so these settings are compared without one, and with layer 0 dense;
scripts/study/methods.py compares methods, tails included. Windows of each text are prefilled once, densely and exactly.
Every setting then decodes the last tokens of each window through the cache, reads the text's own tokens while it does
(teacher forcing), and is compared with dense decoding step by step. Each finished cell is a line of the results file
and is not measured again, so a run that was killed resumes where it was.

    python -m scripts.study.quality --text A.txt B.txt C.txt D.txt --results quality.jsonl \\
        --report docs/quality-tables.md
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from hshare_jax.calibration import calibrate
from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from hshare_jax.evaluation.passkeys import Passkey, answer, is_found, read_passkeys
from hshare_jax.evaluation.text_windows import Scorer
from hshare_jax.files.records import Records
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.share_plan import mark_computed
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model, load_model
from scripts.study import cells as subjects
from scripts.study.cells import (
    PASSKEY_BATCH,
    WINDOWS,
    beginnings,
    hash_text,
    hide_passkeys,
    published,
    read_texts,
    windows_of,
)
from scripts.study.reports import command, made_with, write_report

PUBLISHED_RATIOS = ("1-1-1", "7/8-3/4-1/2", "3/4-3/4-1/2", "1/2-1/2-1/2")
MARK = "<!-- The text below is written by scripts/study/quality.py. -->"


def ours(budget: int, ratio: str = "1-1-1", **settings: object) -> HShare:
    """The package's defaults at a budget and ratio, but without tails and with layer 0 dense."""
    return subjects.ours(budget, ratio, **{"tail": None, "dense_layers": 1} | settings)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of the study."""

    table: str  # the question that it helps to answer
    name: str
    method: HShare
    channels: str = "prompt"  # or "calibrated": on the part of the texts that precedes the windows

    @property
    def key(self) -> str:
        """The name of this measurement in the results."""
        return f"{self.method} {self.channels}"


def cells(context: int) -> Iterator[Cell]:
    """Yields the cells of the study, the most important answers first."""
    exact = {"scoring": "exact"}
    for budget in (512, 128, 256, 64):
        table = f"{budget} of {context} tokens"
        yield Cell(table, "oracle: exact scores, lists per kv head", ours(budget, **exact))
        yield Cell(table, "oracle: exact scores, lists per query head", ours(budget, lists_per="query_head", **exact))
        for ratio in ("1-1-1", "2/3-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1"):
            yield Cell(table, f"units, {ratio}", ours(budget, ratio))
        for ratio in PUBLISHED_RATIOS if budget in (512, 128) else PUBLISHED_RATIOS[:2]:
            yield Cell(table, f"published, {ratio}", published(budget, ratio))
    table = "Which part loses what (512)"
    for ratio in ("7/8-1-1", "1/2-1-1", "1-3/4-1", "1-1/2-1", "7/8-3/4-1", "1/2-1/2-1"):
        yield Cell(table, f"published plan, {ratio}", published(512, ratio))
    for steps in (2, 4, 8):
        for dilate in (True, False):
            name = f"1-1-1/{steps}, {'dilated' if dilate else 'not dilated'}"
            yield Cell(table, f"units, {name}", ours(512, f"1-1-1/{steps}", dilate=dilate))
    table = "The same work in other ways: a third, or an eighth, of the selections (512)"
    for ratio in ("1/3-1-1", "2/3-1-1/2", "1/8-1-1", "1/4-1-1/2", "1/2-1-1/4"):
        yield Cell(table, f"units, {ratio}", ours(512, ratio))
    for ratio in ("2/3-1-1/2", "1/4-1-1/2"):
        yield Cell(table, f"units, {ratio}, not dilated", ours(512, ratio, dilate=False))
    for ratio in (PUBLISHED_RATIOS[1], PUBLISHED_RATIOS[3]):
        for lists in ("kv_head", "query_head"):
            for dilate in (True, False):
                name = f"published, {ratio}, lists per {lists}, {'dilated' if dilate else 'not dilated'}"
                yield Cell(table, name, published(512, ratio, lists_per=lists, dilate=dilate))
    yield Cell(table, "units, 1/3-1-1, lists per query head", ours(512, "1/3-1-1", lists_per="query_head"))
    yield Cell(table, "units, 1/3-1-1, one plan for the batch", ours(512, "1/3-1-1", plan_scope="batch"))
    yield Cell(table, "units, 1/8-1-1, one plan for the batch", ours(512, "1/8-1-1", plan_scope="batch"))
    for probes in (8, 32, 128):
        yield Cell(table, f"units, 1/8-1-1, {probes} probes", ours(512, "1/8-1-1", num_probes=probes))
    table = "Labels, 1-1-1 (512)"
    for channels in (8, 16, 32, 64):
        yield Cell(table, f"{channels} of 64 channels, 4 bits", ours(512, label_channels=channels))
    yield Cell(table, "32 of 64 channels, 8 bits", ours(512, label_bits=8))
    yield Cell(table, "32 of 64 channels, not quantised", ours(512, label_bits=None))
    for channels in (16, 32):
        name = f"{channels} of 64 channels, 4 bits, calibrated on the texts' beginnings"
        yield Cell(table, name, ours(512, label_channels=channels), "calibrated")
    table = "Dense first layers (512)"
    for dense in (0, 1, 2):
        yield Cell(table, f"{dense} dense, 1-1-1", ours(512, dense_layers=dense))
        yield Cell(table, f"{dense} dense, units 1/2-1-1", ours(512, "1/2-1-1", dense_layers=dense))
        oracle = ours(512, dense_layers=dense, lists_per="query_head", **exact)
        yield Cell(table, f"{dense} dense, oracle per query head", oracle)


def core(context: int) -> dict[str, tuple[str, ...]]:
    """The cells that are measured first: names by table."""
    return {
        f"512 of {context} tokens": (
            "oracle: exact scores, lists per kv head", "oracle: exact scores, lists per query head", "units, 1-1-1",
            "units, 2/3-1-1", "units, 1/2-1-1", "units, 1/3-1-1", "units, 1/8-1-1", "published, 7/8-3/4-1/2",
            "published, 3/4-3/4-1/2", "published, 1/2-1/2-1/2",
        ),
        f"128 of {context} tokens": (
            "oracle: exact scores, lists per kv head", "units, 1-1-1", "units, 1/2-1-1", "units, 1/3-1-1",
            "units, 1/8-1-1", "published, 7/8-3/4-1/2",
        ),
        f"256 of {context} tokens": ("units, 1-1-1", "units, 1/2-1-1"),
        f"64 of {context} tokens": ("units, 1-1-1", "units, 1/2-1-1"),
        "Which part loses what (512)": (
            "units, 1-1-1/2, dilated", "units, 1-1-1/2, not dilated", "published plan, 7/8-1-1",
            "published plan, 1-3/4-1",
        ),
        "The same work in other ways: a third, or an eighth, of the selections (512)": (
            "units, 2/3-1-1/2", "units, 1/4-1-1/2", "published, 7/8-3/4-1/2, lists per kv_head, dilated",
            "units, 1/3-1-1, one plan for the batch",
        ),
        "Labels, 1-1-1 (512)": (
            "16 of 64 channels, 4 bits", "32 of 64 channels, not quantised",
            "32 of 64 channels, 4 bits, calibrated on the texts' beginnings",
        ),
        "Dense first layers (512)": (
            "0 dense, 1-1-1", "2 dense, 1-1-1", "0 dense, units 1/2-1-1", "2 dense, units 1/2-1-1",
        ),
    }  # fmt: skip


def measure(scorer: Scorer, cell: Cell, ranked: np.ndarray | None) -> dict[str, object]:
    """A cell's line of the results file."""
    method, settings = cell.method, cell.method.settings
    if cell.channels == "calibrated":
        method = dataclasses.replace(method, channels=ranked)
    state = scorer.prefilled.start(method)
    assert isinstance(state.method_state, SharedLists)
    is_computed = np.asarray(mark_computed(np.asarray(state.method_state.source)))
    per_refresh = float(is_computed[:, settings.num_dense :].sum(axis=(1, 2)).mean())
    scores = scorer.score_state(state, method)
    return {
        "key": cell.key,
        "computed": per_refresh / settings.refresh_interval,  # selections a step
        "possible": is_computed[0].size,
        "reads": round(float(scores["reads"].mean()), 1),
        "recall": round(float(np.nanmean(scores["recall"])), 4),
        "divergence": scores["divergence"].round(7).tolist(),
        "agrees": scores["agrees"].astype(int).tolist(),
        "loss": round(float(scores["loss"].mean()), 5),
    }


def count_found(model: Model, passkeys: list[Passkey], method: Method | None) -> int:
    """How many of the numbers a method finds; the question is decoded sparsely."""
    found = 0
    for start in range(0, len(passkeys), PASSKEY_BATCH):
        batch = passkeys[start : start + PASSKEY_BATCH]
        answers = answer(model, batch, read_passkeys(model, batch, [method]), method)
        found += sum(map(is_found, batch, answers))
    return found


def passkey_methods() -> Iterator[tuple[str, HShare | None]]:
    """Yields (name, method) at 128 tokens."""
    yield "dense", None
    yield "oracle: exact scores, per kv head", ours(128, scoring="exact")
    for ratio in ("1-1-1", "2/3-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1", "1-1-1/2"):
        yield f"units, {ratio}", ours(128, ratio)
    for ratio in PUBLISHED_RATIOS:
        yield f"published, {ratio}", published(128, ratio)


def report(results: dict[str, dict], header: str, context: int) -> str:
    """The tables in Markdown."""
    lines = [header]
    for table in dict.fromkeys(cell.table for cell in cells(context)):
        rows = [cell for cell in cells(context) if cell.table == table and cell.key in results]
        if not rows:
            continue
        lines += [
            f"\n### {table}\n",
            "| setting | KL to dense, mean (95 %) | median | top-1 agreement (95 %) | KL over units 1-1-1 | "
            "selections a step | tokens read |",
            "|---|---|---|---|---|---|---|",
        ]
        for cell in rows:
            result = results[cell.key]
            base = results.get(Cell("", "", ours(cell.method.settings.budget)).key)
            kl, agrees = np.array(result["divergence"]), np.array(result["agrees"])
            ratio = "-"
            if base is not None and base is not result:
                of_base = np.array(base["divergence"])
                low, high = interval(mean_ratio, kl, of_base)
                ratio = f"{mean_ratio(kl, of_base):.2f} ({low:.2f}-{high:.2f})"
            kl_low, kl_high = interval(np.mean, kl)
            low, high = interval(np.mean, agrees)
            lines.append(
                f"| {cell.name} | {kl.mean():.4f} ({kl_low:.4f}-{kl_high:.4f}) | {np.median(kl):.4f} "
                f"| {agrees.mean():.1%} ({low:.1%}-{high:.1%}) | {ratio} "
                f"| {result['computed']:.1f} of {result['possible']} | {result['reads']:.0f} |"
            )
    found = [(name, results[f"passkey {name}"]) for name, _ in passkey_methods() if f"passkey {name}" in results]
    if found:
        lines += ["\n### Passkey, 1k, 128 tokens, question decoded sparsely\n", "| setting | found |", "|---|---|"]
        lines += [f"| {name} | {result['found']} of {result['seeds']} |" for name, result in found]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures the cells that the results lack, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="text files; of a .jsonl, the field `prompt`"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL file to write, and to resume from")
    parser.add_argument("--report", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=256, help="positions scored of each of the eight windows")
    parser.add_argument("--seeds", type=int, default=20, help="number of passkey prompts")
    parser.add_argument("--tables", nargs="+", help="measure only tables whose titles begin so")
    parser.add_argument("--core", action="store_true", help="measure only the cells behind docs/quality.md's advice")
    options = parser.parse_args()
    texts = read_texts(parser, options.text)
    study = {
        "model": options.model, "texts": {name: hash_text(text) for name, text in texts.items()},
        "context": options.context, "steps": options.steps, "seeds": options.seeds,
    }  # fmt: skip
    records = Records(options.results, study, keys=("key",), later=("identity",))

    def is_wanted(table: str) -> bool:
        return not options.tables or table.startswith(tuple(options.tables))

    wanted, core_names = [cell for cell in cells(options.context) if is_wanted(cell.table)], core(options.context)
    first = [cell for cell in wanted if cell.name in core_names.get(cell.table, ())]
    wanted = first if options.core else first + wanted
    todo = list({cell.key: cell for cell in wanted if {"key": cell.key} not in records}.values())
    model = load_model(options.model)
    records.settle(identity=model.identity)
    if todo:
        windows = windows_of(model, texts, options.context)
        scorer = Scorer(model, windows, options.steps, [cell.method for cell in todo])
        ranked = None
        if any(cell.channels == "calibrated" for cell in todo):
            ranked = calibrate(model, beginnings(texts), method=ours(128, "1/2-1-1"), max_blocks=8).channels
        with tqdm(total=len(todo), desc="cells", disable=None) as bar:
            for _, group in itertools.groupby(todo, key=lambda cell: cell.method.settings):
                for cell in group:
                    records.append(measure(scorer, cell, ranked))
                    bar.update()
                jax.clear_caches()  # other settings have other programs, and programs are large
        del scorer
    passkeys = hide_passkeys(model, next(iter(texts.values())), options.seeds)
    for name, method in passkey_methods() if is_wanted("Passkey") else ():
        if {"key": f"passkey {name}"} not in records:
            found = count_found(model, passkeys, method)
            records.append({"key": f"passkey {name}", "found": found, "seeds": options.seeds})
    results = {line["key"]: line for line in records.lines}
    names = ", ".join(path.name for path in options.text)
    header = (
        f"{made_with(model.name)}. {WINDOWS} windows of {options.context} tokens from {names}; the last "
        f"{options.steps} of each scored: {WINDOWS * options.steps} positions. Intervals: bootstrap over blocks of "
        f"neighbouring positions.\n\n    {command(options)}"
    )
    write_report(options.report, MARK, report(results, header, options.context))


if __name__ == "__main__":
    main()
