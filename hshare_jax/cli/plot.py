"""`hshare-jax plot`: figures of what sharing rests on in a user's own text, and of what methods cost."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.cli.options import (
    Parser,
    UsageError,
    add_named_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    as_usage_error,
    check_not_empty,
    check_output,
    open_named,
    read_constants,
    read_settings,
    read_text,
    whole,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib, which the extra `eval` brings, is imported where a figure is drawn.

OF_TEXT = {
    "heads": "how far the lists of each layer choose the same tokens",
    "layers": "how far layers choose the same tokens",
    "steps": "how long a choice of tokens lasts",
    "plan": "which lists are computed, and which they serve",
}
OF_RESULTS = {
    "quality": (
        "divergence from dense decoding against tokens read",
        "of hshare-jax eval --task perplexity, or of scripts/study/methods.py",
    ),
    "speed": (
        "divergence from dense decoding against the time of a step",
        "of scripts/study/methods.py, which takes the times too",
    ),
}


def add_plot(parser: argparse.ArgumentParser) -> None:
    """Adds the figures of `hshare-jax plot` and their options."""
    parser.set_defaults(run=run_plot)
    figures = parser.add_subparsers(required=True, metavar="FIGURE", parser_class=Parser, dest="figure")
    for name, what in OF_TEXT.items():
        of_text = figures.add_parser(name, help=what)
        add_prompt_files(of_text)
        add_named_model(of_text)
        if name == "steps":
            of_text.add_argument("--steps", type=whole, default=64, metavar="N", help="longest distance measured (64)")
        _add_outputs(of_text)
        sharing = add_settings(of_text)
        sharing.add_argument("--channels-file", metavar="FILE", help="label channels, from calibrate or as published")
    for name, (what, source) in OF_RESULTS.items():
        of_results = figures.add_parser(name, help=what)
        of_results.add_argument(
            "--results", type=Path, nargs="+", required=True, metavar="JSONL",
            help=source,
        )  # fmt: skip
        _add_outputs(of_results)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, nargs="+", required=True, metavar="FILE", help="one or more of .png and .svg"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run_plot(options: argparse.Namespace) -> int:
    """Runs `hshare-jax plot`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("plots need matplotlib: pip install 'hshare-jax[eval]'")
    _check_outputs(options)
    figure = _draw_text(options) if options.figure in OF_TEXT else _draw_results(options)
    from hshare_jax.evaluation.plots.overlap import save

    for path in options.output:
        save(figure, path)
    print(f"wrote {' and '.join(map(str, options.output))}", file=sys.stderr)
    return 0


def _check_outputs(options: argparse.Namespace) -> None:
    from hshare_jax.evaluation.plots.overlap import check_suffix

    for index, path in enumerate(options.output):
        try:
            check_suffix(path)
        except ValueError as error:
            raise UsageError(f"--output {error}") from error
        if path in options.output[:index]:
            raise UsageError(f"--output names {path} twice")
        if path.is_dir():
            raise UsageError(f"--output {path}: Is a directory")
        check_output(path, overwrite=options.overwrite)


def _draw_text(options: argparse.Namespace) -> "Figure":
    """Returns a figure of the lists that a model chooses in a prompt."""
    steps = getattr(options, "steps", 0)
    if options.figure == "steps" and steps < 1:
        raise UsageError(f"--steps {steps} must be at least 1")
    if not options.prompt_file:
        raise UsageError("no prompt: give one with --prompt-file")
    if len(options.prompt_file) > 1:
        raise UsageError(f"--prompt-file is given {len(options.prompt_file)} times; a figure shows one prompt")
    (name,) = options.prompt_file
    text = read_text(name, "--prompt-file ")
    check_not_empty([name], [text])
    hshare = read_settings(options)
    files = open_named(options)
    (prompt,) = apply_chat_template(files, [text], options)
    from hshare_jax.evaluation.patterns import check_prompt, measure_patterns
    from hshare_jax.evaluation.plots import overlap as plots

    try:
        hshare.num_label_channels(files.config)
        check_prompt(files.config, len(prompt), hshare=hshare, steps=steps)
        read_constants(options, files, hshare)
    except ValueError as error:
        raise as_usage_error(error) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error
    model = files.load(options.dtype)
    _, channels = read_constants(options, model, hshare)
    found = measure_patterns(model, prompt, hshare=hshare, steps=steps, channels=channels)
    subject = f"{model.name}, {len(prompt):,} tokens, lists of {hshare.num_critical}"
    if options.figure == "heads":
        return plots.plot_head_similarity(found.head_overlap, subject=subject)
    if options.figure == "layers":
        return plots.plot_layer_similarity(found.layer_overlap, subject=subject)
    if options.figure == "steps":
        subject += f", the last {2 * steps} decoded"
        return plots.plot_step_similarity(found.step_overlap, subject=subject)
    return plots.plot_plan(found.plan, hshare.dense_layers, subject=f"{subject}, {hshare.sharing_ratio}")


def _draw_results(options: argparse.Namespace) -> "Figure":
    """Returns a figure of what methods cost, from files of results."""
    from hshare_jax.evaluation.plots.results import plot_quality, plot_speed, read_results

    draw = plot_quality if options.figure == "quality" else plot_speed
    try:
        lines, model = read_results(options.results)
        return draw(lines, subject=model)
    except ValueError as error:
        raise UsageError(f"--results: {error}") from error
    except OSError as error:
        raise UsageError(f"--results {error.filename}: {error.strerror}") from error
