"""`hshare-jax eval`: what sparse decoding costs on a user's own model and text."""

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.options import (
    UsageError,
    add_named_model,
    add_settings,
    as_usage_error,
    check_method,
    check_output,
    choose_method,
    fraction,
    open_named,
    option_name,
    read_constants,
    read_settings,
    read_text,
    whole,
)
from hshare_jax.host_memory import return_freed_memory
from hshare_jax.methods.registry import METHODS, tell_short

if TYPE_CHECKING:
    from hshare_jax.evaluation.run import Settings
    from hshare_jax.evaluation.tasks.examples import DataError
    from hshare_jax.files.records import Records
    from hshare_jax.methods.hshare.settings import HShareSettings
    from hshare_jax.models.pretrained import Model, ModelFiles

READERS = ("gsm8k", "coqa", "longbench")  # tasks whose examples are read from a file of their own


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `hshare-jax eval`."""
    parser.set_defaults(run=run_eval)
    parser.add_argument("--task", required=True, choices=(*READERS, "passkey", "perplexity"))
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="the task's published file; for passkey a book, for perplexity any texts",
    )  # fmt: skip
    parser.add_argument("--method", nargs="+", choices=METHODS, default=["hshare"], metavar="NAME",
                        help=f"one or more of {', '.join(METHODS)}, all at HShare's budget (hshare)")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL",
                        help="a line for each item and method; a run that was stopped goes on here")  # fmt: skip
    parser.add_argument(
        "--limit", type=whole, metavar="N",
        help="read only the first N examples, N passkeys (50), or N windows spread over each text",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave bad examples out and count them")
    parser.add_argument("--batch-size", type=whole, default=8, metavar="N", help="items computed together (8)")
    parser.add_argument("--impl", choices=("auto", "pallas", "reference", "interpret"), default="auto",
                        help="what computes decode steps")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on standard output")
    add_named_model(parser)
    tasks = parser.add_argument_group("tasks", argument_default=argparse.SUPPRESS)
    tasks.add_argument("--max-new-tokens", type=whole, metavar="N", help="gsm8k and coqa: where an answer ends (256)")
    tasks.add_argument("--turns", choices=("last", "all"), help="coqa: the questions asked of a conversation (last)")
    tasks.add_argument("--subset", nargs="+", metavar="NAME", help="longbench: only these of its tasks")
    tasks.add_argument("--context", type=whole, metavar="N", help="passkey, perplexity: tokens of a text (1024)")
    tasks.add_argument("--steps", type=whole, metavar="N", help="perplexity: last positions scored of a window (256)")
    tasks.add_argument(
        "--skip-start",
        type=fraction,
        metavar="A/B",
        help="passkey, perplexity: leave out this much of a text's beginning (0)",
    )
    tasks.add_argument("--depth", type=fraction, metavar="A/B", help="passkey: where the number stands; else anywhere")
    tasks.add_argument("--seed", type=whole, metavar="N", help="passkey: of the first text; the next ones count up (0)")
    sharing = add_settings(parser)
    sharing.add_argument("--channels-file", metavar="FILE", help="label channels, from calibrate or as published")
    sharing.add_argument("--plan-file", metavar="FILE", help="a plan, from calibrate or as published")


_OF_TASK: dict[str, tuple[tuple[str, ...], Any]] = {
    # the tasks that an option is for, and its default
    "max_new_tokens": (("gsm8k", "coqa"), None), "turns": (("coqa",), "last"), "subset": (("longbench",), None),
    "context": (("passkey", "perplexity"), 1024), "steps": (("perplexity",), 256),
    "skip_start": (("passkey", "perplexity"), Fraction(0)), "depth": (("passkey",), None), "seed": (("passkey",), 0),
}  # fmt: skip


def run_eval(options: argparse.Namespace) -> int:
    """Runs `hshare-jax eval`."""
    task = options.task
    for name, (tasks, default) in _OF_TASK.items():
        if hasattr(options, name) and task not in tasks:
            raise UsageError(f"{option_name(name)} is for --task {' or '.join(tasks)}, not {task}")
        setattr(options, name, getattr(options, name, default))
    for name in ("limit", "batch_size", "max_new_tokens", "context", "steps"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"{option_name(name)} {value} must be at least 1")
    if task != "perplexity" and len(options.data) > 1:
        raise UsageError(f"--data names {len(options.data)} files; --task {task} reads one")
    if len({path.name for path in options.data}) < len(options.data):
        raise UsageError("--data names two files of one name, which results could not tell apart; rename one")
    if options.seed < 0:
        raise UsageError(f"--seed {options.seed} must be at least 0")
    if options.skip_bad and task not in READERS:
        raise UsageError(f"--skip-bad is for --task {' or '.join(READERS)}, not {task}, whose data holds no examples")
    if not options.output.exists():  # else the run goes on there
        check_output(options.output, overwrite=False)
    elif not os.access(options.output, os.W_OK):
        raise UsageError(f"--output {options.output} cannot be written: no permission")
    hshare = read_settings(options)
    check_method(options, options.method, hshare)
    items, num_bad = _read_items(options)
    files = open_named(options)
    return_freed_memory()
    from hshare_jax.evaluation.run import summarise
    from hshare_jax.kernels.api import check_impl

    items, too_long = _fit_items(options, files, items)
    num_bad += too_long
    # What SnapKV makes room for: the answer, with a passkey's question before it.
    room = {"perplexity": options.steps, "passkey": 64}.get(task)
    room = room or max((example.max_new_tokens for example, _ in items), default=1)
    methods = {name: choose_method(name, hshare, max_new_tokens=room) for name in options.method}
    try:
        check_impl(options.impl)
        hshare.num_label_channels(files.config)
        read_constants(options, files, hshare)
        records = _open_records(options, files, hshare)
    except ValueError as error:
        raise as_usage_error(error) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    notes = _tell_short(options, files, hshare, items)
    for note in notes:
        print(f"hshare-jax: note: {note}", file=sys.stderr)
    model = files.load(options.dtype)
    try:
        records.settle(identity=model.identity)
    except ValueError as error:
        raise as_usage_error(error) from error
    _evaluate(options, model, methods, items, records)
    ids = set(map(_id_of, items))
    wanted = [line for line in records.lines if line["method"] in methods and line["id"] in ids]
    summary = {"task": task, "model": files.name, "bad": num_bad, "notes": notes, "methods": summarise(wanted)}
    if options.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary)
    return 0


def _id_of(item: Any) -> str:
    """Returns what tells an item of a task from the others: an example with its tokens, a passkey or a window."""
    return item[0].id if isinstance(item, tuple) else item.id


def _task_module(task: str) -> Any:
    """Returns the module that reads and scores a task's examples."""
    try:
        return importlib.import_module(f"hshare_jax.evaluation.{task}")
    except ModuleNotFoundError as error:
        raise UsageError(f"--task {task} needs {error.name}: pip install 'hshare-jax[eval]'") from error


def _bad_data(options: argparse.Namespace, error: "DataError") -> UsageError:
    from hshare_jax.evaluation.tasks.examples import FileError

    has_way_out = not options.skip_bad and not isinstance(error, FileError)
    return UsageError(f"{error}{' (--skip-bad leaves such examples out)' if has_way_out else ''}")


def _read_items(options: argparse.Namespace) -> tuple[Any, int]:
    """Returns (what the task reads from its files, the number of bad records)."""
    from hshare_jax.evaluation.tasks.examples import DataError

    if options.task not in READERS:
        return {path.name: read_text(str(path), "--data ") for path in options.data}, 0
    more = {"coqa": {"turns": options.turns}, "longbench": {"tasks": options.subset}}.get(options.task, {})
    read = _task_module(options.task).read
    try:
        items, num_bad = read(options.data[0], limit=options.limit, skip_bad=options.skip_bad, **more)
    except DataError as error:
        raise _bad_data(options, error) from error
    except ValueError as error:
        raise UsageError(str(error).replace("tasks holds", "--subset names", 1)) from error
    except OSError as error:
        raise UsageError(f"--data {error.filename}: {error.strerror}") from error
    if options.max_new_tokens is not None:
        items = [dataclasses.replace(item, max_new_tokens=options.max_new_tokens) for item in items]
    return items, num_bad


def _fit_items(options: argparse.Namespace, files: "ModelFiles", items: Any) -> tuple[Any, int]:
    """Returns (items ready to be computed, the number of those too long for the model)."""
    from hshare_jax.evaluation.run import encode_examples
    from hshare_jax.evaluation.tasks.examples import DataError
    from hshare_jax.evaluation.tasks.passkey import ANSWER_TOKENS, make_passkeys
    from hshare_jax.evaluation.text_windows import cut_windows

    if files.tokenizer is None:
        raise ValueError(f"{files.name} has no tokeniser, so text cannot be given to it")
    context, skip = options.context, float(options.skip_start)
    if not 0 <= skip < 1:
        raise UsageError(f"--skip-start {skip} must lie in [0, 1)")
    try:
        if options.task in READERS:
            shorten = _task_module("longbench").truncate_middle if options.task == "longbench" else None
            return encode_examples(files, items, shorten=shorten, skip_bad=options.skip_bad)
        if options.task == "perplexity":
            if options.steps >= context:
                raise UsageError(f"--steps {options.steps} must be less than --context {context}")
            windows = [
                window
                for name, text in items.items()
                for window in cut_windows(files, name, text, context=context, count=options.limit, skip=skip)
            ]
            return windows, 0
        if context + ANSWER_TOKENS > files.config.max_positions:
            most = files.config.max_positions - ANSWER_TOKENS
            raise UsageError(f"--context {context} must be at most {most}, so that the model has room for the answer")
        (book,) = items.values()
        seed, depth = options.seed, options.depth
        if depth is not None and not 0 <= depth <= 1:
            raise UsageError(f"--depth {depth} must lie in [0, 1]")
        seeds = range(seed, seed + (options.limit or 50))
        book = book[int(len(book) * skip) :]
        return make_passkeys(files.tokenizer, book, context, seeds, depth=None if depth is None else float(depth)), 0
    except DataError as error:
        raise _bad_data(options, error) from error
    except ValueError as error:
        raise UsageError(str(as_usage_error(error)).replace("count=", "--limit ", 1)) from error


def _open_records(options: argparse.Namespace, files: "ModelFiles", hshare: "HShareSettings") -> "Records":
    from hshare_jax.evaluation.run import KEYS
    from hshare_jax.files.records import Records

    study: dict[str, Any] = {
        "task": options.task,
        "model": files.name,
        "data": [path.name for path in options.data],
        "data_sha256": [_hash(path) for path in options.data],
        "settings": {field.name: str(getattr(hshare, field.name)) for field in dataclasses.fields(hshare)},
        "batch_size": options.batch_size,
        "impl": options.impl,
        "dtype": options.dtype or files.dtype,
    }
    for name in (name for name, (tasks, _) in _OF_TASK.items() if options.task in tasks):
        value = getattr(options, name)
        study[name] = None if value is None else str(value)
    names = ("revision", "plan_file", "channels_file")
    study |= {name: str(value) for name in names if (value := getattr(options, name, None)) is not None}
    study |= {f"{name}_sha256": _hash(study[name]) for name in ("plan_file", "channels_file") if name in study}
    if options.task == "perplexity" or hshare.plan_scope == "batch":
        study["limit"] = options.limit  # it changes where windows stand, or which rows share a plan
    # The model is known by its weights, which are read later: trained again, it keeps its name.
    return Records(options.output, study, keys=KEYS, later=("identity",))


def _tell_short(options: argparse.Namespace, files: "ModelFiles", hshare: "HShareSettings", items: Any) -> list[str]:
    """Returns what a user must know of items that are too short for the settings."""
    from hshare_jax.evaluation.tasks.passkey import ANSWER_TOKENS

    if options.method == ["dense"]:
        return []
    match options.task:
        case "perplexity":
            sizes = [(len(window.tokens) - 1 - options.steps, len(window.tokens) - 1) for window in items]
        case "passkey":
            sizes = [(len(item.text), len(item.text) + len(item.question) + ANSWER_TOKENS) for item in items]
        case _:
            sizes = [(len(ids), len(ids) + example.max_new_tokens) for example, ids in items]
    needs_plan = "hshare" in options.method and not hasattr(options, "plan_file")
    return tell_short(hshare, files.config, sizes, needs_plan=needs_plan)


def _hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _evaluate(
    options: argparse.Namespace, model: "Model", methods: "dict[str, Settings]", items: Any, records: "Records"
) -> None:
    from hshare_jax.evaluation.run import run_generation, run_passkeys, run_texts

    plan, channels = read_constants(options, model, read_settings(options))
    common = {"batch_size": options.batch_size, "impl": options.impl, "plan": plan, "channels": channels}
    if options.task in READERS:
        run_generation(model, items, methods, _task_module(options.task).score, records, **common)
    elif options.task == "passkey":
        run_passkeys(model, items, methods, records, **common)
    else:
        run_texts(model, items, methods, records, steps=options.steps, **common)


def _print_summary(summary: dict[str, Any]) -> None:
    rows = [{"method": name, **values} for name, values in summary["methods"].items()]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "tasks"))
    table = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    for row in rows:
        for task, scores in row.get("tasks", {}).items():
            print(f"{row['method']}  {task}  " + "  ".join(f"{name} {value}" for name, value in scores.items()))
    if summary["bad"]:
        print(f"left out {summary['bad']} bad examples", file=sys.stderr)
