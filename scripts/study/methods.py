"""Measures every method at every budget on real text and writes the tables of docs/results.md.

Methods are compared with dense decoding. Windows of each text are prefilled once. Every method then decodes the last
tokens of each window, and reads the text's own tokens while it does. Each finished cell is a line of the results file,
so a run that was killed resumes where it was; the report holds the cells that are there. Two stages are measured side
by side, each in a process with one thread. The speeds are measured last, alone.

    python -m scripts.study.methods --text A.txt B.txt C.txt D.jsonl --results methods.jsonl --report docs/results.md
"""

import argparse
import dataclasses
import gc
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hshare_jax.calibration import calibrate
from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.passkeys import Passkey, answer, is_found, read_passkeys
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.evaluation.text_windows import Scorer, Window
from hshare_jax.files.records import Records
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.models.pretrained import Model, load_model
from scripts.study.cells import (
    NAMES,
    PASSKEY_BATCH,
    PASSKEY_BUDGET,
    PASSKEY_CONTEXT,
    PLANS,
    ROOM,
    SKIP,
    WINDOWS,
    Cell,
    all_cells,
    beginnings,
    hash_text,
    hide_passkeys,
    read_texts,
    windows_of,
)
from scripts.study.reports import command, write_report
from scripts.study.tables import report

MARK = "<!-- The text below is written by scripts/study/methods.py. -->"
# Contexts and budgets that are measured from one prefill. The longest stages come first, so that the stages that run
# side by side end together.
STAGES = ((8192, (512, 128)), (4096, (512, 128)), (1024, (128,)), (1024, (512,)))
# The context and budget at which recall is measured, on every 53rd step because it takes time. 53 is a prime.
RECALL_AT, RECALL_EVERY = (4096, 512), 53
CALIBRATED_ON = 8000  # characters of each text: one block or two
MAX_SEEDS = 2 * PASSKEY_BATCH  # all batches are prefilled at once, and a batch takes one and a half gigabytes
SPEED_CONTEXT, SPEED_BUDGETS = 4096, (512, 128)
SPEED_STEPS, SPEED_ROUND = 12, 4  # a round holds whole refresh intervals
# A results file can be resumed only if it was made with these values.
PROTOCOL = {
    "recall_at": RECALL_AT, "recall_every": RECALL_EVERY, "calibrated_on": CALIBRATED_ON, "speed_steps": SPEED_STEPS,
    "skip": SKIP, "windows": WINDOWS,
}  # fmt: skip
AT_ONCE = 2  # processes, a stage each, because a decode step gains little from a second core

Keep = Callable[[dict[str, Any]], object]  # takes the line of a finished cell
Stage = tuple[Callable[..., None], list[Cell], dict[str, Any]]  # a function, its cells, its other arguments


def cells(context: int, budgets: tuple[int, ...]) -> Iterator[Cell]:
    """Yields the cells of one stage.

    Dense decoding is measured once a context, and other kinds of plans only at 512 of 4,096.
    """
    first = next(of_stage[0] for its_context, of_stage in STAGES if its_context == context)
    for budget in budgets:
        for name in (*NAMES, *(PLANS if (context, budget) == (4096, 512) else ())):
            if name != "dense" or budget == first:
                yield Cell(context, budget, name)


def left(keep: Records, kind: str, wanted: Iterable[Cell], names: Sequence[str] | None) -> list[Cell]:
    """The cells of these names (None: all) that the results lack.

    Ends the run if the results hold one of the cells with other settings.
    """
    found = {(line["kind"], line["context"], line["budget"], line["name"]): line["settings"] for line in keep.lines}
    keys = {cell: (kind, *dataclasses.astuple(cell)) for cell in wanted if names is None or cell.name in names}
    for cell, key in keys.items():
        if found.get(key, repr(cell.method)) != repr(cell.method):
            sys.exit(f"{keep.path} holds {key} with settings that are no longer this script's; name another file")
    return [cell for cell, key in keys.items() if key not in found]


def measure_context(
    model: Model, todo: list[Cell], keep: Keep, *, windows: list[Window], calibrated_on: list[str], steps: int
) -> None:
    """Scores cells of one context on all windows, and keeps a line for each cell."""
    context = todo[0].context
    methods = [cell.method for cell in todo]
    with tqdm(total=context - steps, desc=f"prefill {context}", unit="token", disable=None) as bar:
        scorer = Scorer(model, windows, steps, methods, progress=bar.update)

    calibrated: dict[Cell, Method | None] = {}
    for cell in todo:
        method = cell.method
        if cell.name.startswith("calibrated") and isinstance(method, HShare):
            found = calibrate(model, calibrated_on, method=method)
            calibrated[cell] = dataclasses.replace(method, plan=found.plan, channels=found.channels)

    def measure(cell: Cell) -> dict[str, Any]:
        takes_recall = (context, cell.budget) == RECALL_AT
        recall_every = RECALL_EVERY if takes_recall else None
        rows = scorer.score(calibrated.get(cell, cell.method), recall_every=recall_every)
        return {
            **cell.begin_line("text"),
            "reads": round(float(rows["reads"].mean()), 1),
            "recall": round(float(np.nanmean(rows["recall"])), 4) if takes_recall else None,
            "loss": round(float(rows["loss"].mean()), 5),
            "divergence": rows["divergence"].round(6).tolist(),
            "agrees": rows["agrees"].astype(int).tolist(),
        }

    measure_cells(todo, measure, keep, desc=f"cells at {context}")


def measure_cells(todo: list[Cell], measure: Callable[[Cell], dict[str, Any]], keep: Keep, *, desc: str) -> None:
    """Keeps the line of every cell, in order. Compiled programs are dropped when the kind of method changes."""
    with tqdm(total=len(todo), desc=desc, disable=None) as bar:
        for _, group in itertools.groupby(todo, key=lambda cell: (cell.budget, cell.name.split()[0])):
            for cell in group:
                keep(measure(cell))
                bar.update()
            jax.clear_caches()
            gc.collect()


def measure_passkeys(model: Model, todo: list[Cell], keep: Keep, *, passkeys: list[Passkey]) -> None:
    """Asks every method for the numbers hidden in texts, and keeps a line for each method and budget."""
    batches = [passkeys[start : start + PASSKEY_BATCH] for start in range(0, len(passkeys), PASSKEY_BATCH)]
    methods = [cell.method for cell in todo]

    def measure(cell: Cell) -> dict[str, Any]:
        answers = [answer(model, batch, held, cell.method) for batch, held in zip(batches, prefilled, strict=True)]
        found = map(is_found, passkeys, itertools.chain.from_iterable(answers))
        return {**cell.begin_line("passkey"), "found": list(map(int, found))}

    prefilled = [read_passkeys(model, batch, methods) for batch in tqdm(batches, "prefill passkeys", disable=None)]
    measure_cells(todo, measure, keep, desc="passkeys")


def measure_speed(model: Model, todo: list[Cell], keep: Keep, *, windows: list[Window]) -> None:
    """Times decode steps of the cells on one core, all windows at once, and keeps a line for each cell."""
    context = todo[0].context
    tokens = jnp.asarray([window.tokens for window in windows], jnp.int32)
    length = context - SPEED_STEPS
    lengths = jnp.full((len(windows),), length, jnp.int32)
    methods = [cell.method for cell in todo]
    prefilled = prefill_for(model, tokens[:, :length], lengths, context, methods)

    def measure(cell: Cell) -> dict[str, Any]:
        method, seconds = cell.method, []
        state = jax.block_until_ready(prefilled.start(method))
        interval = 1 if state.method_state is None else state.method_state.refresh_interval
        for step in range(SPEED_STEPS):
            began = time.perf_counter()
            token, refresh = tokens[:, length + step], step % interval == 0
            logits, state = decode_step(model.params, token, state, config=model.config, refresh=refresh)
            jax.block_until_ready(logits)
            seconds.append(time.perf_counter() - began)
        prefilled.take_back(state)
        rounds = np.reshape(seconds[SPEED_ROUND:], (-1, SPEED_ROUND)).mean(axis=1)  # the first round compiles
        milliseconds = round(1000 * float(np.median(rounds)), 2)
        return {**cell.begin_line("speed"), "batch": len(windows), "milliseconds": milliseconds}

    measure_cells(todo, measure, keep, desc=f"speed at {context}")


def run_stages(model: str, stages: list[Stage], keep: Records) -> None:
    """Runs the stages that have cells left, `AT_ONCE` side by side, each in a separate process with one thread.

    A process sends its lines through a pipe, which ends when the process does. If one process fails, all are ended.
    """
    os.environ["PJRT_NPROC"] = "1"  # threads of XLA:CPU in the processes that are started below
    spawn = multiprocessing.get_context("spawn")
    waiting = [stage for stage in stages if stage[1]]
    running: dict[Connection, SpawnProcess] = {}  # by the pipes of their lines
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                lines, into = spawn.Pipe(duplex=False)
                process = spawn.Process(target=_run, args=(model, waiting.pop(0), into), daemon=True)
                process.start()
                into.close()  # the process has a copy of this end
                running[lines] = process
            ready = wait(list(running))
            for lines in [pipe for pipe in running if pipe in ready]:
                try:
                    keep.append(lines.recv())
                except EOFError:
                    process = running.pop(lines)
                    process.join()
                    if process.exitcode:
                        sys.exit("a stage failed, see above; the same command resumes where the results end")
    finally:
        for process in running.values():
            process.terminate()


def _run(model: str, stage: Stage, lines: Connection) -> None:
    run, todo, given = stage
    run(load_model(model), todo, lines.send, **given)


def plan_stages(options: argparse.Namespace, texts: dict[str, str], keep: Records) -> list[list[Stage]]:
    """The stages that are left to measure, in two rounds: those that may run side by side, then the speeds alone.

    The model is loaded here only to check the arguments, so that a mistake is told before anything is measured.
    """
    (name, book), *_ = texts.items()
    model = load_model(options.model)
    keep.settle(identity=model.identity)
    given = {"calibrated_on": [text[:CALIBRATED_ON] for text in beginnings(texts)], "steps": options.steps}
    names = options.names
    stages: list[Stage] = [
        (measure_context, left(keep, "text", cells(c, b), names), given | {"windows": windows_of(model, texts, c)})
        for c, b in STAGES if c in options.contexts
    ]  # fmt: skip
    if options.seeds:
        asked = left(keep, "passkey", all_cells(PASSKEY_CONTEXT, (PASSKEY_BUDGET,)), names)
        stages.append((measure_passkeys, asked, {"passkeys": hide_passkeys(model, book, options.seeds)}))
    timed = left(keep, "speed", all_cells(SPEED_CONTEXT, SPEED_BUDGETS), names)
    return [stages, [(measure_speed, timed, {"windows": windows_of(model, {name: book}, SPEED_CONTEXT)})]]


def main() -> None:
    """Measures the cells that the results lack, and writes the report."""
    contexts = [*dict.fromkeys(context for context, _ in STAGES)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", required=True, help="text files; of a .jsonl, the field `prompt`"
    )
    parser.add_argument("--results", type=Path, required=True, help="JSONL file to write, and to resume from")
    parser.add_argument("--report", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--contexts", type=int, nargs="+", choices=contexts, default=contexts)
    parser.add_argument("--steps", type=int, default=256, help="positions scored of each of the eight windows")
    parser.add_argument("--names", nargs="+", choices=(*NAMES, *PLANS), help="measure only these methods")
    parser.add_argument("--seeds", type=int, default=50, help="number of passkey prompts; 0 for none")
    parser.add_argument("--report-only", action="store_true", help="write the report, measure nothing")
    options = parser.parse_args()
    if options.steps > ROOM:
        parser.error(f"--steps {options.steps} must be at most {ROOM}")
    if not 0 <= options.seeds <= MAX_SEEDS:
        parser.error(f"--seeds {options.seeds} must lie between 0 and {MAX_SEEDS}")
    texts = read_texts(parser, options.text)
    study = {
        "model": options.model, "texts": {name: hash_text(text) for name, text in texts.items()},
        "steps": options.steps, "seeds": options.seeds, "protocol": PROTOCOL,
    }  # fmt: skip
    try:
        keep = Records(options.results, study, keys=("kind", "context", "budget", "name"), later=("identity",))
        rounds = [] if options.report_only else plan_stages(options, texts, keep)
    except ValueError as error:
        parser.error(str(error))
    for stages in rounds:
        run_stages(options.model, stages, keep)
    runs = "; ".join(dict.fromkeys(line["made"] for line in keep.lines))
    header = (
        f"{options.model}, float32; {runs}. {WINDOWS} windows of {', '.join(texts)}; the last {options.steps} "
        f"positions of each scored, {WINDOWS * options.steps} in all. Intervals: paired bootstrap over blocks of "
        f"neighbouring positions. Layer 0 is dense in every method without tails.\n\n    {command(options)}"
    )
    write_report(options.report, MARK, report(keep.lines, header))


if __name__ == "__main__":
    main()
