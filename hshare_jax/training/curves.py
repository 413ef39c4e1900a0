"""The figure of a run: loss, perplexity and learning rate over its steps, from metrics.jsonl."""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hshare_jax.files.figures import BLUE, GREY, VERMILION, blank_figure, set_title
from hshare_jax.files.texts import parse_json
from hshare_jax.training.loss import perplexity_of

_NUMBERS = {"train": ("step", "loss", "learning_rate"), "eval": ("step", "loss")}  # drawn, of each kind of line


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of kind "train" and "eval" of a metrics.jsonl. A last line that is only half written is left out.

    Raises:
        ValueError: a line is not a JSON object, or lacks a number that the figure shows.
    """
    lines, whole = [], Path(path).read_bytes().rpartition(b"\n")[0]
    for number, text in enumerate(whole.split(b"\n"), start=1):
        try:
            line = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); this is no metrics.jsonl") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number} is not a JSON object; this is no metrics.jsonl")
        kind = line.get("kind")
        if not isinstance(kind, str) or kind not in _NUMBERS:
            continue
        for name in _NUMBERS[kind]:
            if not isinstance(line.get(name), int | float):
                raise ValueError(f"{path}:{number}: {name}={line.get(name)!r} must be a number; repair this line")
        lines.append(line)
    return lines


def plot_training(lines: list[dict[str, Any]], *, subject: str = "") -> Figure:
    """A figure with two panels over the steps: loss, with a second scale for perplexity, and the learning rate.

    Args:
        lines: the result of `read_metrics`.
        subject: what was trained, for the title.

    Raises:
        ValueError: there are no lines.
    """
    if not lines:
        raise ValueError("lines is empty: no step of this run has been written yet")
    trained = [line for line in lines if line["kind"] == "train"]
    evaluated = [line for line in lines if line["kind"] == "eval"]
    figure = blank_figure(7.2, 5.6)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for drawn, label, style in (
        (trained, "training, one step's windows", {"color": GREY, "linewidth": 1}),
        (evaluated, "held-out windows", {"color": BLUE, "linewidth": 2, "marker": "o", "markersize": 4}),
    ):
        losses.plot([line["step"] for line in drawn], [line["loss"] for line in drawn], label=label, **style)
    losses.set_ylabel("loss (nats per token)")
    losses.legend(loc="upper right")
    perplexity = losses.secondary_yaxis("right")
    perplexity.set_ylabel("perplexity, e to the loss")
    perplexity.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: _short(perplexity_of(loss))))
    rates.plot([line["step"] for line in trained], [line["learning_rate"] for line in trained], color=VERMILION)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("optimiser steps")
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    set_title(figure, "Loss over training", subject)
    return figure


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
