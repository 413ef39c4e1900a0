"""Figures of the cost of methods: divergence from dense decoding, against tokens read and against time."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hshare_jax.files.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, blank_figure, set_title
from hshare_jax.methods.hshare.method import HShare

DEFAULT = f"hshare {HShare().sharing_ratio}"  # the package's default method, as results name it

# A colour for each family of methods. Markers tell the methods of a family apart.
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
}
_MARKERS = "osD^vPpX*<>dx+1234|"


def plot_quality(lines: Sequence[Mapping[str, Any]], *, highlight: str = DEFAULT, subject: str = "") -> Figure:
    """The divergence from dense decoding against the tokens read: a panel for each context, a curve for each method.

    Args:
        lines: from `read_results`; only lines of kind "text" are drawn. A point is the mean over the lines of one
            context, budget and name. Points of divergence zero, such as dense decoding's, are left out, because the
            axis is logarithmic.
        highlight: the name of the method that stands out.
        subject: the model and the texts, for the title.

    Raises:
        ValueError: there is nothing to draw.
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
        axes.set_xlabel("tokens read a step, mean over heads")
    _add_legend(figure, panels, styles, highlight)
    set_title(figure, "What reading fewer tokens costs", subject)
    return figure


def plot_speed(lines: Sequence[Mapping[str, Any]], *, highlight: str = DEFAULT, subject: str = "") -> Figure:
    """The divergence from dense decoding against the time of a decode step: a panel for each context and batch size.

    A vertical line shows the time of dense decoding.

    Args:
        lines: from `read_results`. Lines of kind "speed" and of kind "text" are joined by context, budget and name; a
            method that lacks either kind is left out.
        highlight: the name of the method that stands out. Its points are labelled with their budgets.
        subject: the model and the texts, for the title.

    Raises:
        ValueError: there is nothing to draw.
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
    _add_legend(figure, panels, styles, highlight)
    set_title(figure, "What faster steps cost", subject)
    return figure


_Points = dict[tuple[str, int], dict[str, float]]  # by name and budget


def _means(
    lines: Sequence[Mapping[str, Any]], kind: str, facet: tuple[str, ...], values: tuple[str, ...]
) -> dict[tuple[Any, ...], _Points]:
    """The mean of each value over the lines of one method and budget, by facet in ascending order."""
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
    """The points that a logarithmic axis has a place for."""
    return {key: p for key, p in points.items() if key[0] != "dense" and p.get("divergence", 0) > 0}


def _curves(points: _Points) -> dict[str, list[tuple[int, dict[str, float]]]]:
    """Each method's points in ascending order of budget."""
    curves: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for (name, budget), point in sorted(points.items(), key=lambda item: item[0][1]):
        curves.setdefault(name, []).append((budget, point))
    return curves


def _panels(
    facets: dict[tuple[Any, ...], _Points], highlight: str
) -> tuple[Figure, list[Axes], dict[str, dict[str, Any]]]:
    """An empty figure, a panel for each facet, and each method's style, by falling divergence."""
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
    panels[0].set_ylim(np.exp(min(logs)) / 1.6, np.exp(max(logs)) * 1.6)  # wide enough to hold a tick
    return figure, panels, _styles(names, highlight)


def _styles(names: list[str], highlight: str) -> dict[str, dict[str, Any]]:
    """The style of each method: its family's colour, and a marker that no other method has. `highlight` stands out."""
    order = sorted(names, key=lambda name: (name != highlight, name))
    markers = {name: _MARKERS[index % len(_MARKERS)] for index, name in enumerate(order)}
    spare = (ORANGE, PURPLE, GREEN, SKY, VERMILION, GREY)
    strangers = sorted({_family(name) for name in names} - set(_COLOURS))
    colours = _COLOURS | {family: spare[index % len(spare)] for index, family in enumerate(strangers)}
    styles = {}
    for name in names:
        stands_out = name == highlight
        styles[name] = {
            "label": name,
            "gid": name,  # by which the legend finds the line; matplotlib replaces labels such as "" and "_x"
            "color": colours[_family(name)],
            "marker": markers[name],
            "markersize": 9 if stands_out else 6,
            "markeredgewidth": 1.8 if markers[name] in "x+12" else 1.0,  # markers that are only lines
            "linewidth": 3.2 if stands_out else 1.2,
            "alpha": 1.0 if stands_out or len(names) <= 9 else 0.75,
            "zorder": 4 if stands_out else 3,
        }
    return styles


def _family(name: str) -> str:
    """The method of a name that tells its settings too: "exact_topk, tail" or "hshare 1/2-1-1"."""
    return re.split("[ ,]", name, maxsplit=1)[0]


def _add_legend(figure: Figure, panels: list[Axes], styles: dict[str, dict[str, Any]], highlight: str) -> None:
    """Adds the legend."""
    found = {str(line.get_gid()): line for axes in panels for line in axes.get_lines()}
    labels = [repr(name) if name[:1] in ("", "_") else name for name in styles]
    legend = figure.legend(
        handles=[found[name] for name in styles], labels=labels, loc="outside right upper", fontsize=9,
        title="method, the farthest\nfrom dense first", title_fontsize=9, markerscale=0.9,
    )  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() == highlight:
            text.set_fontweight("bold")
