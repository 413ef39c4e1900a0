"""`hshare-jax plot`: draws how alike choices of tokens are in a text, a plan, or the cost of methods."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.cli.errors import Parser, UsageError, usage_errors
from hshare_jax.cli.options import (
    add_files,
    add_kv_cache_dtype,
    add_named_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    check_not_empty,
    check_output,
    is_same_file,
    open_named,
    read_files,
    read_method,
    read_quantize,
    read_text,
    whole,
)
from hshare_jax.files.figures import check_suffix, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# jax and the modules that need it are imported in the functions that run after the options have been read. So is
# matplotlib, which comes with the extra `eval`.

OF_TEXT = {
    "heads": "how far the lists of each layer choose the same tokens",
    "layers": "how far layers choose the same tokens",
    "steps": "how long a choice of tokens lasts",
    "plan": "which lists are computed, and which lists copy them",
}
OF_RESULTS = {
    "quality": (
        "divergence from dense decoding against tokens read",
        "results of hshare-jax eval --task perplexity, or of scripts/study/methods.py",
    ),
    "speed": (
        "divergence from dense decoding against the time of a step",
        "results of scripts/study/methods.py, which takes the times too",
    ),
}


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Adds the figures of `plot` and their options."""
    parser.set_defaults(run=run_plot)
    figures = parser.add_subparsers(required=True, metavar="FIGURE", parser_class=Parser, dest="figure")
    for name, what in OF_TEXT.items():
        of_text = figures.add_parser(name, help=what)
        add_prompt_files(of_text)
        add_named_model(of_text)
        add_kv_cache_dtype(of_text)
        if name == "steps":
            of_text.add_argument(
                "--steps", type=whole, default=64, metavar="N",
                help="longest distance between two steps that is measured (default: %(default)s)",
            )  # fmt: skip
        _add_outputs(of_text)
        add_files(add_settings(of_text), plan=False)
    for name, (what, source) in OF_RESULTS.items():
        of_results = figures.add_parser(name, help=what)
        of_results.add_argument("--results", type=Path, nargs="+", required=True, metavar="JSONL", help=source)
        _add_outputs(of_results)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, nargs="+", required=True, metavar="FILE", help="one or more files, .png or .svg"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run_plot(options: argparse.Namespace) -> int:
    """Draws a figure and writes it. Returns the exit status."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'hshare-jax[eval]'")
    _check_outputs(options)
    figure = _draw_text(options) if options.figure in OF_TEXT else _draw_results(options)
    for path in options.output:
        save(figure, path)
    print(f"wrote {' and '.join(map(str, options.output))}", file=sys.stderr)
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    if options.figure in OF_TEXT:
        inputs = [*options.prompt_file, getattr(options, "channels_file", None)]
    else:
        inputs = options.results
    for index, path in enumerate(options.output):
        try:
            check_suffix(path)
        except ValueError as error:
            raise UsageError(f"--output {error}") from error
        if any(is_same_file(path, other) for other in options.output[:index]):
            raise UsageError(f"--output names {path} twice")
        if path.is_dir():
            raise UsageError(f"--output {path}: Is a directory")
        check_output(path, inputs=inputs, overwrite=options.overwrite)


def _draw_text(options: argparse.Namespace) -> "Figure":
    """A figure of the tokens that a model chooses in a prompt."""
    steps = getattr(options, "steps", 0)
    if options.figure == "steps" and steps < 1:
        raise UsageError(f"--steps {steps} must be at least 1")
    text = _read_prompt(options)
    method = read_method(options)
    files = open_named(options)
    (prompt,) = apply_chat_template(files, [text], options)
    from hshare_jax.evaluation.patterns import check_prompt, measure_patterns
    from hshare_jax.evaluation.plots import overlap

    with usage_errors():
        method.settings.check(files.config)
        check_prompt(files.config, len(prompt), settings=method.settings, steps=steps)
        method, origins = read_files(options, files, method)
    model = files.load(options.dtype, read_quantize(options, files), kv_cache_dtype=options.kv_cache_dtype)
    for origin in origins:
        origin.check(model)
    found = measure_patterns(model, prompt, method=method, steps=steps)
    subject = f"{model.name}, {len(prompt):,} tokens, lists of {method.settings.num_critical}"
    if options.figure == "heads":
        return overlap.plot_head_similarity(found.head_overlap, subject=subject)
    if options.figure == "layers":
        return overlap.plot_layer_similarity(found.layer_overlap, subject=subject)
    if options.figure == "steps":
        return overlap.plot_step_similarity(found.step_overlap, subject=f"{subject}, the last {2 * steps} decoded")
    dense_layers = method.settings.num_dense
    return overlap.plot_plan(found.plan, dense_layers, subject=f"{subject}, {method.sharing_ratio}")


def _read_prompt(options: argparse.Namespace) -> str:
    """The one prompt that the options name; UsageError for none, several or an empty one."""
    if not options.prompt_file:
        raise UsageError("no prompt: give one with --prompt-file")
    if len(options.prompt_file) > 1:
        raise UsageError(f"--prompt-file is given {len(options.prompt_file)} times; a figure shows one prompt")
    (name,) = options.prompt_file
    text = read_text(name, "--prompt-file ")
    check_not_empty([name], [text])
    return text


def _draw_results(options: argparse.Namespace) -> "Figure":
    """A figure of the cost of methods, from files of results."""
    from hshare_jax.evaluation.plots.results import plot_quality, plot_speed
    from hshare_jax.evaluation.results import read_results

    draw = plot_quality if options.figure == "quality" else plot_speed
    try:
        lines, model = read_results(options.results)
        return draw(lines, subject=model)
    except ValueError as error:
        raise UsageError(f"--results: {error}") from error
    except OSError as error:
        raise UsageError(f"--results {error.filename}: {error.strerror}") from error
