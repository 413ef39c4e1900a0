"""`hshare-jax eval`: measures the quality that sparse decoding costs, on published tasks and on any text."""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.devices import add_devices, read_mesh
from hshare_jax.cli.errors import UsageError, option_name, usage_errors
from hshare_jax.cli.options import (
    add_files,
    add_impl,
    add_kv_cache_dtype,
    add_named_model,
    add_settings,
    argument_of,
    check_method,
    check_not_input,
    check_output,
    default_of,
    open_named,
    read_files,
    read_method,
    read_quantize,
    whole,
)
from hshare_jax.errors import check_whole
from hshare_jax.evaluation.run import KEYS, summarise
from hshare_jax.evaluation.tasks import TASKS, Task
from hshare_jax.evaluation.tasks.examples import DataError, FileError
from hshare_jax.host_memory import return_freed_memory
from hshare_jax.methods.names import METHODS

if TYPE_CHECKING:
    from hshare_jax.files.records import Records
    from hshare_jax.methods.hshare.method import HShare
    from hshare_jax.models.pretrained import ModelFiles

# jax and the modules that need it are imported in the functions that run after the options have been read.


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `eval`."""
    parser.set_defaults(run=run_eval)
    parser.add_argument("--task", required=True, choices=tuple(TASKS))
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="the task's published file; for passkey a book, for perplexity any texts",
    )  # fmt: skip
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=["hshare"], metavar="NAME",
        help=f"one or more of {', '.join(METHODS)}; each reads as many tokens as HShare would (default: hshare)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="JSONL",
        help="file that gets a line for each item and method; a run that was stopped is resumed from it",
    )  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave bad examples out, and count them")
    parser.add_argument(
        "--batch-size", type=whole, default=8, metavar="N", help="items computed together (default: %(default)s)"
    )
    add_impl(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_named_model(parser)
    add_kv_cache_dtype(parser)
    add_devices(parser)
    _add_task_options(parser.add_argument_group("tasks", argument_default=argparse.SUPPRESS))
    add_files(add_settings(parser))


def _add_task_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of all tasks. Options that are not given leave no trace."""
    for name, fields in _options_of_tasks().items():
        by_help: dict[str, list[str]] = {}
        for task, field in fields.items():
            by_help.setdefault(field.metadata["help"] + default_of(field.default), []).append(task)
        help = "; ".join(f"{', '.join(tasks)}: {text}" for text, tasks in by_help.items())
        field = next(iter(fields.values()))
        group.add_argument(option_name(name), help=help.replace("%", "%%"), **argument_of(field.type))


def _options_of_tasks() -> dict[str, dict[str, dataclasses.Field]]:
    """For each option, the field of every task that has the option, by the task's name."""
    found: dict[str, dict[str, dataclasses.Field]] = {}
    for task, kind in TASKS.items():
        for field in dataclasses.fields(kind):
            found.setdefault(field.name, {})[task] = field
    return found


def run_eval(options: argparse.Namespace) -> int:
    """Measures and prints a summary. Returns the exit status."""
    task = _read_task(options)
    _check_files(options, task)
    hshare = read_method(options)
    if not hasattr(options, "min_length"):  # methods are compared at equal reads, so no row reads everything unasked
        hshare = hshare.with_settings({"min_length": 0})
    check_method(options, options.method, hshare)
    data, num_bad = _read_data(options, task)
    files = open_named(options)
    mesh = read_mesh(options, files.config)
    return_freed_memory()
    items, num_long = _fit(options, task, files, data)
    sizes = task.sizes(items)
    from hshare_jax.kernels.api import check_impl
    from hshare_jax.methods.registry import method_named, notes_on_short_texts

    with usage_errors():
        check_impl(options.impl)
        config = files.config.for_parts(options.tensor_parallel_size)
        hshare.settings.check(config)
        hshare, origins = read_files(options, files, hshare)
        added = max((size - prefilled for prefilled, size in sizes), default=1)
        methods = {name: method_named(name, hshare, max_new_tokens=added) for name in options.method}
        for method in methods.values():
            if method is not None and mesh is not None:
                method.check_mesh(config, mesh)
        records = _open_records(options, task, files, hshare)
    notes = notes_on_short_texts(hshare, files.config, sizes, names=options.method)
    for note in notes:
        print(f"hshare-jax: note: {note}", file=sys.stderr)
    model = files.load(options.dtype, read_quantize(options, files), mesh, options.kv_cache_dtype)
    for origin in origins:
        origin.check(model)
    with usage_errors():
        records.settle(identity=model.identity)
    task.run(model, items, methods, records, batch_size=options.batch_size, impl=options.impl)
    # The file may hold further items and methods.
    ids = {item.id for item in items}
    lines = [line for line in records.lines if line["method"] in methods and line["id"] in ids]
    summary = {
        "task": task.name, "model": files.name, "bad": num_bad + num_long, "notes": notes, "methods": summarise(lines),
    }  # fmt: skip
    if options.json:
        print(json.dumps(summary))
    else:
        _print_summary(summary)
    return 0


def _read_task(options: argparse.Namespace) -> Task:
    """The task with its options; UsageError for an option of another task, or a value outside its range."""
    given = {}
    for name, fields in _options_of_tasks().items():
        if not hasattr(options, name):
            continue
        if options.task not in fields:
            raise UsageError(f"{option_name(name)} is for --task {' or '.join(fields)}, not {options.task}")
        given[name] = getattr(options, name)
    with usage_errors():
        check_whole("batch_size", options.batch_size, 1)
        return TASKS[options.task](**given)


def _check_files(options: argparse.Namespace, task: Task) -> None:
    """Raises UsageError for files that the task does not take, or an output that cannot be written."""
    if len(options.data) > 1 and not task.takes_many_files:
        raise UsageError(f"--data names {len(options.data)} files; --task {task.name} reads one")
    if len({path.name for path in options.data}) < len(options.data):
        raise UsageError("--data names two files of one name, which results could not tell apart; rename one")
    if options.skip_bad and not task.has_examples:
        takers = " or ".join(name for name, kind in TASKS.items() if kind.has_examples)
        raise UsageError(f"--skip-bad is for --task {takers}, not {task.name}, whose data holds no examples")
    files = [getattr(options, name, None) for name in ("plan_file", "channels_file")]
    inputs = [*options.data, *files]  # and not the model: `Records` adds to files of results alone
    if not options.output.exists():
        check_output(options.output, inputs=inputs, overwrite=False)
        return
    check_not_input(options.output, inputs)
    if not os.access(options.output, os.W_OK):  # a run is resumed from a file that exists
        raise UsageError(f"--output {options.output} cannot be written: no permission")


def _read_data(options: argparse.Namespace, task: Task) -> tuple[Any, int]:
    """The contents of the task's files, and the number of bad examples; UsageError for files that cannot be read."""
    try:
        return task.read(options.data, skip_bad=options.skip_bad)
    except ModuleNotFoundError as error:
        raise UsageError(f"--task {task.name} needs {error.name}: pip install 'hshare-jax[eval]'") from error
    except DataError as error:
        raise _bad_data(options, error) from error
    except OSError as error:
        raise UsageError(f"--data {error.filename}: {error.strerror}") from error


def _fit(options: argparse.Namespace, task: Task, files: "ModelFiles", data: Any) -> tuple[list[Any], int]:
    """The task's items, and the number of those that are too long for the model; UsageError if they do not fit."""
    with usage_errors():
        try:
            return task.fit(files, data, skip_bad=options.skip_bad)
        except DataError as error:
            raise _bad_data(options, error) from error


def _bad_data(options: argparse.Namespace, error: DataError) -> UsageError:
    has_way_out = not options.skip_bad and not isinstance(error, FileError)
    return UsageError(f"{error}{' (--skip-bad leaves such examples out)' if has_way_out else ''}")


def _open_records(options: argparse.Namespace, task: Task, files: "ModelFiles", hshare: "HShare") -> "Records":
    """The results file, whose first line says what is measured; ValueError if it holds results of another run."""
    from hshare_jax.files.records import Records

    settings = [(part, field.name) for part in (hshare.settings, hshare.search) for field in dataclasses.fields(part)]
    study: dict[str, Any] = {
        "task": task.name,
        "model": files.name,
        "data": [path.name for path in options.data],
        "data_sha256": [_hash(path) for path in options.data],
        "settings": {name: str(getattr(part, name)) for part, name in settings},
        "batch_size": options.batch_size,
        "impl": options.impl,
        "dtype": options.dtype or files.dtype,
    }
    if options.kv_cache_dtype != "auto":  # results of before there was a choice can be resumed
        study["kv_cache_dtype"] = options.kv_cache_dtype
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        if field.name != "limit":
            study[field.name] = None if value is None else str(value)
    for name in ("revision", "plan_file", "channels_file"):
        if (value := getattr(options, name, None)) is not None:
            study[name] = value
    for name in ("plan_file", "channels_file"):
        if name in study:
            study[f"{name}_sha256"] = _hash(study[name])
    # With another limit the same run goes on, unless the limit moves items, or changes which rows share a plan.
    if task.limit_moves_items or hshare.search.plan_scope == "batch":
        study["limit"] = task.limit
    # The identity is a checksum of the weights, which are read later. A model that is trained further keeps its name.
    return Records(options.output, study, keys=KEYS, later=("identity",))


def _hash(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _print_summary(summary: dict[str, Any]) -> None:
    """Prints a table with a row for each method, and below it the scores of each task if there are several."""
    rows = [{"method": name, **values} for name, values in summary["methods"].items()]
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "tasks"))
    table = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    _print_table(table)
    for row in rows:
        for task, scores in row.get("tasks", {}).items():
            print(f"{row['method']}  {task}  " + "  ".join(f"{name} {value}" for name, value in scores.items()))
    if summary["bad"]:
        print(f"left out {summary['bad']} bad examples", file=sys.stderr)


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
