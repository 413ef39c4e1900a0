"""Figures of what methods cost: divergence from dense decoding against tokens read, and against time."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hshare_jax.evaluation.plots.overlap import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    blank_figure,
    set_title,
)
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.registry import METHODS, has_use_for

DEFAULT = f"hshare {HShareSettings().sharing_ratio}"  # the package's default, as results name it

_COLOURS = {
    "hshare": BLUE,
    "anchors": SKY,
    "calibrated": SKY,
    "published": VERMILION,
    "exact_topk": BLACK,
    "double_sparsity": BLACK,
    "streaming_llm": ORANGE,
    "h2o": PURPLE,
    "quest": GREEN,
    "quest_window": GREEN,
    "snapkv": GREY,
    "snapkv_fixed": GREY,
}  # fmt: skip  (a colour for a family; its members differ by their markers)
_MARKERS = "osD^vPpX*<>dx+1234|"


def plot_quality(lines: Sequence[Mapping[str, Any]], *, highlight: str = DEFAULT, subject: str = "") -> Figure:
    """Returns the divergence from dense decoding against the tokens read: a panel a context, a line a method.

    Args:
        lines: of `read_results`, those of kind "text": context, budget, name, reads, divergence. Of several lines of
            one context, budget and name the mean is shown. Points without divergence, those of dense decoding, are left
            out: a logarithmic axis has no place for them.
        highlight: the name of the method that stands out.
        subject: what was measured, for the title.

    Raises:
        ValueError: nothing to show.
    """
    points = _means(lines, "text", ("context",), ("reads", "divergence"))
    facets = {key: found for key, found in points.items() if _drawn(found)}
    if not facets:
        raise ValueError("no line has a divergence to plot: results of perplexity, of a method other than dense")
    figure, panels, styles = _panels(facets, highlight)
    for axes, ((context,), found) in zip(panels, facets.items(), strict=True):
        for name, curve in _curves(_drawn(found)).items():
            axes.plot(*zip(*((p["reads"], p["divergence"]) for _, p in curve), strict=True), **styles[name])
        dense = [p["reads"] for (name, _), p in found.items() if name == "dense"]
        reads = f"\n(dense decoding reads {np.mean(dense):,.0f})" if dense else ""
        axes.set_title(f"{context:,} tokens of context{reads}", fontsize=10)
        axes.set_xlabel("tokens read a step (mean over layers and heads)")
    _finish_panels(figure, panels, styles, highlight)
    set_title(figure, "What reading fewer tokens costs", subject)
    return figure


def plot_speed(lines: Sequence[Mapping[str, Any]], *, highlight: str = DEFAULT, subject: str = "") -> Figure:
    """Returns the divergence from dense decoding against the time of a step: a panel a context and batch size.

    Args:
        lines: of `read_results`: those of kind "speed" (context, budget, name, batch, milliseconds) joined with those
            of kind "text" by context, budget and name; what lacks either is left out. Dense decoding's time is a
            vertical line.
        highlight: the name of the method that stands out; its points tell their budgets.
        subject: what was measured, for the title.

    Raises:
        ValueError: nothing to show.
    """
    quality = _means(lines, "text", ("context",), ("divergence",))
    facets = _means(lines, "speed", ("context", "batch"), ("milliseconds",))
    for (context, _), found in facets.items():
        for key, point in found.items():
            point |= quality.get((context,), {}).get(key, {})
    facets = {key: found for key, found in facets.items() if _drawn(found)}
    if not facets:
        raise ValueError(
            "no method has both: a line of kind speed, and one of kind text with a divergence, of the same context and "
            "budget"
        )
    figure, panels, styles = _panels(facets, highlight)
    for axes, ((context, batch), found) in zip(panels, facets.items(), strict=True):
        for name, curve in _curves(_drawn(found)).items():
            axes.plot(*zip(*((p["milliseconds"], p["divergence"]) for _, p in curve), strict=True), **styles[name])
            for budget, point in curve if name == highlight else []:
                where = point["milliseconds"], point["divergence"]
                style = {"fontsize": 8, "color": styles[name]["color"], "zorder": 5}
                axes.annotate(f"{budget} tokens", where, (7, 5), textcoords="offset points", **style)
        dense = [p["milliseconds"] for (name, _), p in found.items() if name == "dense"]
        if dense:
            time = float(np.mean(dense))
            axes.axvline(time, color="black", linestyle="--", linewidth=1.3)
            axes.annotate(
                f"dense {time:.3g} ms", (time, 0.02), (-4, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", rotation=90, fontsize=8, ha="right", va="bottom",
            )  # fmt: skip
        axes.set_title(f"{context:,} tokens of context, {batch} row{'s' if batch > 1 else ''}", fontsize=10)
        axes.set_xlabel("time of a decode step (ms)")
    _finish_panels(figure, panels, styles, highlight)
    set_title(figure, "What faster steps cost", subject)
    return figure


def read_results(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[dict[str, Any]], str]:
    """Returns (lines that `plot_quality` and `plot_speed` take, the model's name) from files of results.

    Lines of `hshare-jax eval --task perplexity` get the names, contexts and budgets that scripts/study/methods.py
    writes: its hshare at the default ratio is "hshare 1/2-1-1", its published plan "published 7/8-3/4-1/2". Lines of
    other tasks and kinds are left out, and so is a last line that was only half written.

    Raises:
        ValueError: a file that holds no results, files of different models, or files that measured one context in
            different ways, or one method, context and budget with different settings.
        OSError: a file that cannot be read.
    """
    lines: list[dict[str, Any]] = []
    known: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}  # what must be the same, by what it is of

    def compare(about: tuple[Any, ...], path: Path, own: dict[str, Any], what: str) -> None:
        other, theirs = known.setdefault(about, (path, own))
        names = (name for name in {**theirs, **own} if str(theirs.get(name)) != str(own.get(name)))
        if name := next(names, None):
            raise ValueError(
                f"{other} and {path} both hold {what}, but differ in {name}, {theirs.get(name)} and {own.get(name)}; "
                "plot them apart"
            )

    model = ""
    for path in map(Path, paths):
        study, found = _read_file(path)
        model = study["model"]
        compare((), path, {name: study.get(name) for name in ("model", "identity")}, "results of a model")
        for line in found:
            context = line["context"]
            for name in _PROTOCOL:
                if name in study:
                    about = (line["kind"], context, name)
                    compare(about, path, {name: study[name]}, f"results of {context} tokens")
            key = tuple(line.get(name) for name in ("kind", "context", "budget", "name", "batch"))
            what = f"{line['name']} at {line['budget']} of {context} tokens"
            compare((*key, "settings"), path, _setting_of(study, line["name"]), what)
            lines.append(line)
    return lines, model


_PROTOCOL = ("steps", "dtype")  # what all lines of a panel share
_SAME_WHATEVER = (
    "results",
    "task",
    "data",
    "data_sha256",
    "texts",
    "limit",
    "skip_start",
    "seeds",
    "batch_size",
)  # what lines may be pooled over
_FILES = ("plan_file", "plan_file_sha256", "channels_file", "channels_file_sha256")


def _setting_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns what lines of one name must agree in: of HShare's settings and files those the method has a use for."""
    family = name.partition(" ")[0]
    method = family if family in METHODS else "hshare"  # "published 7/8-3/4-1/2"
    settings = study.get("settings", {})
    setting = {"what made them": "hshare-jax eval" if settings else "a study"} | settings
    setting |= {key: value for key, value in study.items() if key not in (*_SAME_WHATEVER, "settings")}
    of_hshare = (*settings, *_FILES)
    return {k: v for k, v in setting.items() if k not in of_hshare or has_use_for(method, k.removesuffix("_sha256"))}


def _read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    text, parsed = path.read_bytes(), []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            parsed.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); this is no results file") from error
        if not isinstance(parsed[-1], dict):
            raise ValueError(f"{path}:{number} is not a JSON object; this is no results file")
    if not parsed or not isinstance(parsed[0].get("model"), str):
        raise ValueError(f"{path} does not begin with a line that names the model; this is no results file")
    study, *lines = parsed
    try:
        return study, [found for line in lines if (found := _as_study_line(study, line)) is not None]
    except KeyError as error:
        raise ValueError(f"{path} has a line without {error}; these results cannot be plotted") from error


def _as_study_line(study: dict[str, Any], line: dict[str, Any]) -> dict[str, Any] | None:
    wanted = {"text": ("reads", "divergence"), "speed": ("batch", "milliseconds")}
    if "kind" in line:
        names = ("kind", "context", "budget", "name", *wanted.get(line["kind"], ()))
        return {name: line[name] for name in names} if line["kind"] in wanted else None
    if line.get("task") != "perplexity" or "divergence" not in line["scores"]:
        return None
    settings = study["settings"]
    return {
        "kind": "text",
        "context": int(study["context"]),
        "budget": sum(int(settings[name]) for name in ("num_sinks", "num_critical", "num_recent")),
        "name": _study_name(study, line["method"]),
        "reads": line["reads"],
        "divergence": line["scores"]["divergence"],
    }


def _study_name(study: dict[str, Any], method: str) -> str:
    if method != "hshare":
        return method
    settings = study["settings"]
    if "plan_file" in study:
        return f"hshare {Path(study['plan_file']).name}"
    interval = int(settings["refresh_interval"])
    query = "1" if interval == 1 else f"1/{interval}"
    kind = "hshare" if settings["plan"] == "units" else settings["plan"]
    return f"{kind} {settings['layer_ratio']}-{settings['head_ratio']}-{query}"


_Points = dict[tuple[str, int], dict[str, float]]  # by name and budget


def _means(
    lines: Sequence[Mapping[str, Any]], kind: str, facet: tuple[str, ...], values: tuple[str, ...]
) -> dict[tuple[Any, ...], _Points]:
    """Returns by facet, ascending, the mean of each value over the lines of one method and budget."""
    found: dict[tuple[Any, ...], dict[tuple[str, int], list[Mapping[str, Any]]]] = {}
    for line in lines:
        if line["kind"] == kind:
            points = found.setdefault(tuple(line[name] for name in facet), {})
            points.setdefault((line["name"], line["budget"]), []).append(line)
    return {
        key: {
            point: {value: float(np.mean([np.mean(line[value]) for line in same])) for value in values}
            for point, same in found[key].items()
        }
        for key in sorted(found)
    }


def _drawn(points: _Points) -> _Points:
    return {key: p for key, p in points.items() if key[0] != "dense" and p.get("divergence", 0) > 0}


def _curves(points: _Points) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Returns for each method its points by ascending budget."""
    curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for (name, budget), point in sorted(points.items(), key=lambda item: item[0][1]):
        curves.setdefault(name, []).append((budget, point))
    return curves


def _panels(
    facets: dict[tuple[Any, ...], _Points], highlight: str
) -> tuple[Figure, list[Axes], dict[str, dict[str, Any]]]:
    """Returns (figure, an axes a facet, how each method is drawn, the methods that stray farthest first)."""
    curves: dict[str, list[float]] = {}
    for found in facets.values():
        for (name, _), point in _drawn(found).items():
            curves.setdefault(name, []).append(np.log(point["divergence"]))
    names = sorted(curves, key=lambda name: -float(np.mean(curves[name])))
    num_columns = min(len(facets), 2)
    num_rows = -(-len(facets) // num_columns)
    figure = blank_figure(3.8 * num_columns + 2.4, max(3.8 * num_rows, 0.24 * len(names) + 1) + 0.4)
    grid, panels = figure.add_gridspec(num_rows, num_columns), []
    for index in range(len(facets)):
        place = grid[index // num_columns, index % num_columns]
        panels.append(figure.add_subplot(place, sharey=panels[0] if panels else None))
        panels[-1].grid(alpha=0.3)
        if index % num_columns:
            panels[-1].tick_params(labelleft=False)
        else:
            panels[-1].set_ylabel("KL divergence from dense decoding (nats)")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    logs = [log for of_method in curves.values() for log in of_method]
    panels[0].set_ylim(np.exp(min(logs)) / 1.6, np.exp(max(logs)) * 1.6)  # so wide that a tick lies in between
    return figure, panels, _styles(names, highlight)


def _styles(names: list[str], highlight: str) -> dict[str, dict[str, Any]]:
    """Returns how each method is drawn: a colour for its family, a marker of its own, and one that stands out."""
    order = sorted(names, key=lambda name: (name != highlight, name))
    markers = {name: _MARKERS[index % len(_MARKERS)] for index, name in enumerate(order)}
    spare = (ORANGE, PURPLE, GREEN, SKY, VERMILION, GREY)
    strangers = sorted({name.partition(" ")[0] for name in names} - set(_COLOURS))
    colours = _COLOURS | {family: spare[index % len(spare)] for index, family in enumerate(strangers)}
    styles = {}
    for name in names:
        stands_out = name == highlight
        styles[name] = {
            "label": name,
            "color": colours[name.partition(" ")[0]],
            "marker": markers[name],
            "markersize": 9 if stands_out else 6,
            "markeredgewidth": 1.8 if markers[name] in "x+12" else 1.0,  # those without a face
            "linewidth": 3.2 if stands_out else 1.2,
            "alpha": 1.0 if stands_out or len(names) <= 9 else 0.75,
            "zorder": 4 if stands_out else 3,
        }
    return styles


def _finish_panels(figure: Figure, panels: list[Axes], styles: dict[str, dict[str, Any]], highlight: str) -> None:
    found = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    legend = figure.legend(
        handles=[found[name] for name in styles], labels=list(styles), loc="outside right upper", fontsize=9,
        title="method, the farthest\nfrom dense first", title_fontsize=9, markerscale=0.9,
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() == highlight:
            text.set_fontweight("bold")
