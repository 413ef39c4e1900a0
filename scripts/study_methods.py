#!/usr/bin/env python3
"""Measures every method at every budget on real text and writes the tables of docs/results.md.

Dense decoding is the yardstick: windows of each text are prefilled once, then every method decodes the last tokens of
each window, reading the text's own tokens. Each finished cell is a line of the results file, so a killed run goes on;
the report holds what is there. Two stages are measured side by side, each by a process with one thread; then, alone,
the speeds.

    python scripts/study_methods.py --text A.txt B.txt C.txt D.jsonl --results methods.jsonl --report docs/results.md
"""

import argparse
import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from study_reports import command, write_report
from tqdm import tqdm

from hshare_jax.calibration import calibrate
from hshare_jax.config import HShareConfig
from hshare_jax.decode import decode_step
from hshare_jax.decode_state import for_decoding
from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from hshare_jax.evaluation.methods import method_named
from hshare_jax.evaluation.passkey import ANSWER_TOKENS, Passkey, ask, is_found, make_passkeys
from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
from hshare_jax.evaluation.records import Records
from hshare_jax.evaluation.text_windows import Scorer, Window, cut_windows
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.selection import Method

SKIP = 0.25  # of a text, title pages and licences
BUDGETS = {64: (4, 44, 16), 128: (8, 88, 32), 256: (8, 200, 48), 512: (16, 432, 64)}  # sinks, critical, recent
RATIOS = ("7/8-3/4-1/2", "3/4-3/4-1/2", "1/2-1/2-1/2")
OURS = ("hshare 1-1-1", "hshare 1/2-1-1", "hshare 1/3-1-1", "hshare 1/8-1-1")
SIMPLER = ("streaming_llm", "h2o", "quest", "quest_window", "snapkv", "snapkv_fixed")  # no labels, no plan
NAMES = (
    "dense", "exact_topk", "double_sparsity", *OURS, *(f"published {ratio}" for ratio in RATIOS),
    *SIMPLER,
)  # fmt: skip
PLANS = ("anchors 1/2-1-1", "anchors 1/3-1-1", "calibrated 1/2-1-1", "calibrated 1/3-1-1")
MARK = "<!-- What follows is written by scripts/study_methods.py. -->"
DEFAULT, COMPARED = "hshare 1/2-1-1", "hshare 1/3-1-1"
# Of each context, the longest stage first; within one, what matters most. At 8k two budgets of the four: more would
# take the whole beyond two hours on two cores.
STUDY = {4096: (512, 128, 256, 64), 8192: (512, 128), 1024: (128, 512, 64, 256)}
WINDOWS = 8  # scored together
RECALL_OF = {(4096, 512), (1024, 128)}  # contexts and budgets: it takes time
CALIBRATED_ON = 8000  # characters of each text, one block or two
PASSKEY_BUDGETS, PASSKEY_BATCH = (128, 512), 25
SPEED_CONTEXT, SPEED_BUDGETS = 4096, (512, 128)
SPEED_STEPS, SPEED_ROUND = 24, 4  # a round holds whole refresh intervals
ROOM = 256  # decode steps that SnapKV makes room for
AT_ONCE = 2  # processes, a stage each: a decode step gains little from a second core, another stage much


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one budget and context."""

    context: int
    budget: int
    name: str

    @property
    def method(self) -> HShareConfig | Method | None:
        """Returns the settings; layer 0 is dense in all."""
        sinks, critical, recent = BUDGETS[self.budget]
        ours = HShareConfig(num_sinks=sinks, num_critical=critical, num_recent=recent)
        kind, _, ratio = self.name.partition(" ")
        if kind in ("hshare", "calibrated"):
            return ours.with_sharing_ratio(ratio)
        if kind == "anchors":
            return dataclasses.replace(ours, plan="anchors").with_sharing_ratio(ratio)
        if kind == "published":
            changes = {"num_probes": ours.num_probes, "dense_layers": ours.dense_layers}
            split = {"num_sinks": sinks, "num_critical": critical, "num_recent": recent}
            return dataclasses.replace(HShareConfig.published().with_sharing_ratio(ratio), **changes, **split)
        return method_named(self.name, ours, max_new_tokens=ROOM)

    @property
    def key(self) -> dict[str, Any]:
        """Returns the fields that tell this cell's line."""
        return {"kind": "text", "context": self.context, "budget": self.budget, "name": self.name}


def cells(context: int) -> Iterator[Cell]:
    """Yields the cells of one context; dense decoding once, and other ways to plan in one cell of the study."""
    for budget in STUDY[context]:
        for name in (*NAMES, *(PLANS if (context, budget) == (4096, 512) else ())):
            if name != "dense" or budget == STUDY[context][0]:
                yield Cell(context, budget, name)


def read_text(path: Path) -> str:
    """Returns a file's text; of .jsonl the field `prompt` of all lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["prompt"] for line in text.splitlines() if line.strip())
    return text


def is_measured(cell: Cell, keep: Records) -> bool:
    """Returns whether the results hold this cell; ends the run where they hold it with other settings."""
    for line in keep.lines:
        if cell.key.items() <= line.items():
            if line["settings"] != repr(cell.method):
                sys.exit(
                    f"{keep.path} holds {cell.key} with settings that are no longer this script's; name another file"
                )
            return True
    return False


def made() -> str:
    """Returns when and with what a line was measured."""
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{date.today()}, {versions}, {jax.devices()[0].device_kind}"


Keep = Callable[[dict[str, Any]], object]  # takes the line of a finished cell


def measure_context(model: Model, todo: list[Cell], keep: Keep, *, texts: dict[str, str], steps: int) -> None:
    """Scores cells of one context on all windows; a line a cell."""
    context = todo[0].context
    per_text = WINDOWS // len(texts)
    windows: list[Window] = []
    for name, text in texts.items():
        windows += cut_windows(model, name, text, context=context, count=per_text, skip=SKIP)
    methods = [cell.method for cell in todo]
    with tqdm(total=context - steps, desc=f"prefill {context}", unit="token", disable=None) as bar:
        scorer = Scorer(model, windows, steps, methods, progress=bar.update)

    beginnings = [text[: int(len(text) * SKIP)][:CALIBRATED_ON] for text in texts.values()]  # before all windows
    constants: dict[Cell, dict[str, Any]] = {}
    for cell in todo:
        if cell.name.startswith("calibrated"):
            assert isinstance(cell.method, HShareConfig)
            found = calibrate(model, beginnings, hshare=cell.method)
            constants[cell] = {"plan": found.plan, "channels": found.channels}

    def measure(cell: Cell) -> dict[str, Any]:
        takes_recall = (context, cell.budget) in RECALL_OF
        given = constants.get(cell, {}) | ({} if takes_recall else {"recall_every": None})
        rows = scorer.score(cell.method, **given)
        return {
            **cell.key,
            "made": made(),
            "settings": repr(cell.method),
            "reads": round(float(rows["reads"].mean()), 1),
            "recall": round(float(np.nanmean(rows["recall"])), 4) if takes_recall else None,
            "loss": round(float(rows["loss"].mean()), 5),
            "divergence": rows["divergence"].round(6).tolist(),
            "agrees": rows["agrees"].astype(int).tolist(),
        }

    measure_cells(todo, measure, keep, desc=f"cells at {context}")


def measure_cells(todo: list[Cell], measure: Callable[[Cell], dict[str, Any]], keep: Keep, *, desc: str) -> None:
    """Keeps the line of every cell, in order; the ratios of one kind of plan share their programs, which are large."""
    with tqdm(total=len(todo), desc=desc, disable=None) as bar:
        for _, group in itertools.groupby(todo, key=lambda cell: (cell.budget, cell.name.split()[0])):
            for cell in group:
                keep(measure(cell))
                bar.update()
            jax.clear_caches()
            gc.collect()


def measure_passkeys(model: Model, todo: list[Cell], keep: Keep, *, book: str, seeds: int) -> None:
    """Asks every method for the numbers hidden in 1,024-token texts; a line a method and budget."""
    assert model.tokenizer is not None
    length, tokenizer = 1024, model.tokenizer
    passkeys = make_passkeys(tokenizer, book[int(len(book) * SKIP) :], length, range(seeds))
    batches = [passkeys[start : start + PASSKEY_BATCH] for start in range(0, seeds, PASSKEY_BATCH)]

    def read(batch: list[Passkey]) -> Prefilled:
        tokens = jnp.asarray([passkey.text for passkey in batch], jnp.int32)
        lengths = jnp.full((len(batch),), tokens.shape[1], jnp.int32)
        return prefill_for(model, tokens, lengths, length + ANSWER_TOKENS, [cell.method for cell in todo])

    def measure(cell: Cell) -> dict[str, Any]:
        found = []
        for batch, prefilled in zip(batches, read_batches, strict=True):
            answers = ask(model.params, batch[0].question, prefilled.start(cell.method), config=model.config)
            texts = map(str, tokenizer.batch_decode(answers))
            found += [int(is_found(p, text)) for p, text in zip(batch, texts, strict=True)]
        return {"kind": "passkey", "budget": cell.budget, "name": cell.name, "made": made(), "found": found}

    read_batches = [read(batch) for batch in tqdm(batches, "prefill passkeys", disable=None)]
    measure_cells(todo, measure, keep, desc="passkeys")


def measure_speed(model: Model, todo: list[Cell], keep: Keep, *, text: str) -> None:
    """Times decode steps of the cells, all rows at once, on one text and core, a plan for each row; a line a cell."""
    context = todo[0].context
    windows = cut_windows(model, "speed", text, context=context, count=WINDOWS, skip=SKIP)
    tokens = jnp.asarray([window.tokens for window in windows], jnp.int32)
    length = context - SPEED_STEPS
    lengths = jnp.full((len(windows),), length, jnp.int32)
    methods = [cell.method for cell in todo]
    prefilled = prefill_for(model, tokens[:, :length], lengths, context, methods)

    def measure(cell: Cell) -> dict[str, Any]:
        method, seconds = cell.method, []
        interval = method.refresh_interval if isinstance(method, HShareConfig) else 1
        state = jax.block_until_ready(for_decoding(prefilled.start(method)))
        for step in range(SPEED_STEPS):
            began = time.perf_counter()
            token, refresh = tokens[:, length + step], step % interval == 0
            logits, state = decode_step(model.params, token, state, config=model.config, refresh=refresh)
            jax.block_until_ready(logits)
            seconds.append(time.perf_counter() - began)
        rounds = np.reshape(seconds[SPEED_ROUND:], (-1, SPEED_ROUND)).mean(axis=1)  # the first round compiles
        milliseconds = round(1000 * float(np.median(rounds)), 2)
        return {**cell.key, "kind": "speed", "made": made(), "batch": len(windows), "milliseconds": milliseconds}

    measure_cells(todo, measure, keep, desc=f"speed at {context}")


Stage = tuple[Callable[..., None], list[Cell], dict[str, Any]]  # what measures, its cells, what else it is given


def run_stages(model: str, stages: list[Stage], keep: Records) -> None:
    """Runs the stages that have cells left, `AT_ONCE` side by side, each in a process of its own with one thread."""
    os.environ["PJRT_NPROC"] = "1"  # XLA:CPU's threads, in the processes that follow
    spawn = multiprocessing.get_context("spawn")
    lines = spawn.SimpleQueue()
    with ProcessPoolExecutor(
        AT_ONCE, mp_context=spawn, initializer=_begin, initargs=(lines,), max_tasks_per_child=1
    ) as pool:
        running = [pool.submit(_run, model, stage) for stage in stages if stage[1]]
        is_done = False
        while not is_done:
            is_done = not wait(running, timeout=1).not_done
            while not lines.empty():
                keep.append(lines.get())
        for stage in running:
            stage.result()


def _begin(lines: Any) -> None:
    global _lines  # of this process: where the lines of its stage go
    _lines = lines


def _run(model: str, stage: Stage) -> None:
    run, todo, given = stage
    run(load_model(model), todo, _lines.put, **given)


def _all_names(context: int, budgets: tuple[int, ...]) -> list[Cell]:
    return [Cell(context, budget, name) for budget in budgets for name in NAMES]


def report(lines: list[dict[str, Any]], header: str) -> str:
    """Returns the tables in Markdown."""
    lines = sorted(lines, key=lambda line: (line["kind"], line.get("context", 0)))  # as stages took turns, now by stage
    text = {(line["context"], line["budget"], line["name"]): line for line in lines if line["kind"] == "text"}
    out = [header]
    for context in sorted({key[0] for key in text}):
        for budget in BUDGETS:
            names = [name for name in (*NAMES, *PLANS) if (context, budget, name) in text]
            if DEFAULT in names:  # what the others are compared with
                out += _table(context, budget, {name: text[context, budget, name] for name in names})
    passkeys = [line for line in lines if line["kind"] == "passkey"]
    if passkeys:
        out += _passkey_table(passkeys)
    if speed := [line for line in lines if line["kind"] == "speed"]:
        out += _speed_table(speed)
    out += [
        "\n### Where a cheaper or simpler method does better\n",
        "Mean and median of KL, top-1 agreement, and passkeys, beside methods that score no token by itself. "
        "Times have a table of their own.\n",
        *(_surprises(lines) or ["None."]),
    ]
    return "\n".join(out) + "\n"


def _table(context: int, budget: int, lines: dict[str, dict[str, Any]]) -> list[str]:
    base = np.array(lines[DEFAULT]["divergence"]) if DEFAULT in lines else None
    out = [
        f"\n### {budget} of {context} tokens\n",
        "| method | KL to dense, mean (95 %) | median | over the default's (95 %) | top-1 agreement (95 %) | "
        "recall of attention | perplexity | tokens read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, line in lines.items():
        kl, agrees = np.array(line["divergence"]), np.array(line["agrees"])
        ratio = "-"
        if base is not None and name not in (DEFAULT, "dense"):
            low, high = interval(mean_ratio, kl, base)
            ratio = f"{mean_ratio(kl, base):.2f} ({low:.2f}-{high:.2f})"
        kl_low, kl_high = interval(np.mean, kl)
        low, high = interval(np.mean, agrees)
        recall = "-" if line["recall"] is None else f"{line['recall']:.1%}"
        out.append(
            f"| {name} | {kl.mean():.4f} ({kl_low:.4f}-{kl_high:.4f}) | {np.median(kl):.4f} | {ratio} "
            f"| {agrees.mean():.1%} ({low:.1%}-{high:.1%}) | {recall} | {np.exp(line['loss']):.2f} "
            f"| {line['reads']:.0f} |"
        )
    return out


def _passkey_table(lines: list[dict[str, Any]]) -> list[str]:
    found = {(line["name"], line["budget"]): f"{sum(line['found'])} of {len(line['found'])}" for line in lines}
    heads = {budget: f"reading {budget}" for budget in sorted({line["budget"] for line in lines})}
    return ["\n### Passkeys found in 1,024 tokens, the question decoded by sparse steps\n", *_by_method(found, heads)]


def _speed_table(lines: list[dict[str, Any]]) -> list[str]:
    milliseconds = {(line["name"], (line["context"], line["budget"])): line["milliseconds"] for line in lines}
    cells = {}
    for (name, size), own in milliseconds.items():
        dense = milliseconds.get(("dense", size))
        cells[name, size] = f"{own:.1f} ms" + (f", {dense / own:.2f}" if dense else "")
    heads = {(line["context"], line["budget"]): f"{line['budget']} of {line['context']}" for line in lines}
    batch = lines[0]["batch"]
    title = f"\n### Speed of decode steps: milliseconds, and how many times as fast as dense, batch {batch}\n"
    return [title, *_by_method(cells, heads)]


def _by_method(cells: dict[tuple[str, Any], str], heads: dict[Any, str]) -> list[str]:
    """Returns a table with a row for each method and a column for each head; cells are found by both."""
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, column), "-") for column in heads)] for name in names]
    return [f"| {' | '.join(row)} |" for row in (["method", *heads.values()], ["---"] * (1 + len(heads)), *rows)]


def _surprises(lines: list[dict[str, Any]]) -> list[str]:
    """Returns what a method that shares nothing and computes no label does better than one of ours, cell by cell."""
    ours = (DEFAULT, COMPARED, "hshare 1/8-1-1", *(f"published {ratio}" for ratio in RATIOS))
    known = {(line["kind"], line.get("context"), line["budget"], line["name"]): line for line in lines}
    out = []
    for (kind, context, budget, name), line in known.items():
        for mine in ours if name in SIMPLER else ():
            if (other := known.get((kind, context, budget, mine))) is None:
                continue
            if kind == "text":
                theirs, kl = np.array(line["divergence"]), np.array(other["divergence"])
                ways = [way for way, pick in (("mean", np.mean), ("median", np.median)) if pick(theirs) < pick(kl)]
                agreements = np.mean(line["agrees"]), np.mean(other["agrees"])
                ways += ["top-1 agreement"] if agreements[0] > agreements[1] else []
                if ways:
                    out.append(
                        f"- {budget} of {context}: {name} ({theirs.mean():.4f} / {np.median(theirs):.4f} / "
                        f"{agreements[0]:.1%}, reads {line['reads']:.0f}) ahead of {mine} ({kl.mean():.4f} / "
                        f"{np.median(kl):.4f} / {agreements[1]:.1%}, reads {other['reads']:.0f}) by {', '.join(ways)}"
                    )
            if kind == "passkey" and sum(line["found"]) > sum(other["found"]):
                out.append(
                    f"- passkeys, reading {budget}: {name} finds {sum(line['found'])}, {mine} {sum(other['found'])}"
                )
    return out


def main() -> None:
    """Measures the cells that the results lack, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; of .jsonl the field `prompt`")
    parser.add_argument("--results", type=Path, required=True, help="JSONL to write to and to go on from")
    parser.add_argument("--report", type=Path, help="Markdown to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, nargs="+", default=[*STUDY], choices=[*STUDY])
    parser.add_argument("--steps", type=int, default=256, help="positions scored of each window; eight windows in all")
    parser.add_argument("--seeds", type=int, default=50, help="passkey prompts")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if WINDOWS % len(options.text):
        parser.error(f"--text names {len(options.text)} files; {WINDOWS} windows must divide evenly among them")
    if options.steps > ROOM:
        parser.error(f"--steps {options.steps} must be at most {ROOM}")
    study = {
        "model": options.model, "texts": [path.name for path in options.text], "steps": options.steps,
        "seeds": options.seeds,
    }  # fmt: skip
    keep = Records(options.results, study, keys=("kind", "context", "budget", "name"))
    if not options.report_only:
        texts = {path.name: read_text(path) for path in options.text}
        first = next(iter(texts.values()))
        scored = [[cell for cell in cells(c) if not is_measured(cell, keep)] for c in STUDY if c in options.contexts]
        asked = [
            c for c in _all_names(1024, PASSKEY_BUDGETS) if {**c.key, "kind": "passkey", "context": None} not in keep
        ]
        timed = [c for c in _all_names(SPEED_CONTEXT, SPEED_BUDGETS) if {**c.key, "kind": "speed"} not in keep]
        stages: list[Stage] = [(measure_context, todo, {"texts": texts, "steps": options.steps}) for todo in scored]
        stages.append((measure_passkeys, asked, {"book": first, "seeds": options.seeds}))
        run_stages(options.model, stages, keep)
        run_stages(options.model, [(measure_speed, timed, {"text": first})], keep)
    names = [path.name for path in options.text]
    runs = "; ".join(dict.fromkeys(line["made"] for line in keep.lines))
    header = (
        f"{options.model}, float32; {runs}. {WINDOWS} windows of {', '.join(names)}; the last {options.steps} "
        f"positions of each scored, {WINDOWS * options.steps} in all. Intervals: paired bootstrap over blocks of "
        f"neighbouring positions. Layer 0 is dense in every method.\n\n    {command(options)}"
    )
    write_report(options.report, MARK, report(keep.lines, header))


if __name__ == "__main__":
    main()
