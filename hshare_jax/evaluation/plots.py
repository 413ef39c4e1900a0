"""Figures of what sharing rests on and what it costs, from arrays and from lines of results; they hold no state."""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib import cm, colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hshare_jax.config import HShareConfig
from hshare_jax.share_plan import SharePlan

SUFFIXES = (".png", ".svg")
DEFAULT = f"hshare {HShareConfig().sharing_ratio}"  # the package's default, as results name it
NO_LISTS = "#d9d9d9"

# Okabe and Ito's colours, which colour-blind readers tell apart too; without yellow, which is faint on white.
_BLACK, _BLUE, _SKY, _GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
_ORANGE, _VERMILION, _PURPLE, _GREY = "#E69F00", "#D55E00", "#CC79A7", "#7F7F7F"
_COLOURS = {
    "hshare": _BLUE,
    "anchors": _SKY,
    "published": _VERMILION,
    "exact_topk": _BLACK,
    "double_sparsity": _BLACK,
    "streaming_llm": _ORANGE,
    "h2o": _PURPLE,
    "quest": _GREEN,
    "quest_window": _GREEN,
    "snapkv": _GREY,
    "snapkv_fixed": _GREY,
}  # fmt: skip  (a colour for a family; its members differ by their markers)
_FAINT = 0.55  # how opaque a copied list is drawn
_MARKERS = "osD^vPpX*<>dx+12h8H"


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG or SVG, as the path's suffix says: all of it or, on an error, nothing.

    The same figure gives the same bytes.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory, because only there is a rename one indivisible step.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        draft = Path(scratch) / path.name
        with matplotlib.rc_context({"svg.hashsalt": "hshare_jax"}):
            metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
            figure.savefig(draft, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)
        draft.replace(path)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a file that `save` cannot write."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}: figures are written as PNG or SVG")


def plot_head_similarity(similarity: Float[np.ndarray, "L J J"], *, subject: str = "") -> Figure:
    """Returns small squares, one for each layer with lists: how much every two lists of it have in common.

    Args:
        similarity: of `measure_overlap`; layers without lists are zero.
        subject: what was measured, for the title.

    Raises:
        ValueError: no layer has lists.
    """
    layers, J = _with_lists(similarity), similarity.shape[1]
    num_columns = _num_columns(len(layers))
    num_rows = -(-len(layers) // num_columns)
    size, most = min(max(1.25, 0.16 * J), 3.0), _largest_between_two(similarity[layers])
    figure = _figure(size * num_columns + 1.6, (size + 0.2) * num_rows + 1.1)
    grid = figure.add_gridspec(num_rows, num_columns)
    panels, image = [], None
    for index, layer in enumerate(layers):
        axes = figure.add_subplot(grid[index // num_columns, index % num_columns])
        panels.append(axes)
        image = axes.imshow(similarity[layer], cmap="viridis", vmin=0, vmax=most)
        axes.set_title(f"layer {layer}", fontsize=9, pad=3)
        is_left, is_last = index % num_columns == 0, index + num_columns >= len(layers)
        _whole_ticks(axes, J, J, is_labelled=(is_last, is_left))
        if J <= 4:
            for i, j in np.ndindex(J, J):
                value = float(similarity[layer, i, j])
                axes.text(j, i, f"{value:.2f}", fontsize=7, ha="center", va="center", color=_ink(value / most))
    assert image is not None
    figure.supxlabel("list of the layer", fontsize=10)
    figure.supylabel("list of the layer", fontsize=10)
    _bar_of_shares(figure, image, panels, most)
    _set_title(figure, "How far the lists of a layer choose the same tokens", subject)
    return figure


def plot_layer_similarity(similarity: Float[np.ndarray, "L L"], *, subject: str = "") -> Figure:
    """Returns a square: how much the lists of every two layers have in common; layers without lists are grey.

    Args:
        similarity: of `measure_overlap`; layers without lists are zero.
        subject: what was measured, for the title.

    Raises:
        ValueError: no layer has lists.
    """
    L = len(similarity)
    has_lists = np.isin(np.arange(L), _with_lists(similarity))
    figure = _figure(min(max(5.6, 0.2 * L + 2), 12), min(max(4.8, 0.2 * L + 1.2), 11))
    axes = figure.add_subplot()
    axes.set_facecolor(NO_LISTS)
    shown = np.ma.masked_where(~(has_lists[:, None] & has_lists[None, :]), similarity)
    most = _largest_between_two(similarity[None])
    image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=most)
    _whole_ticks(axes, L, L)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    _bar_of_shares(figure, image, [axes], most)
    _set_title(figure, "How far layers choose the same tokens", subject)
    if not has_lists.all():
        _legend_below(figure, [Patch(facecolor=NO_LISTS, edgecolor="0.4", label="dense: reads everything, no lists")])
    return figure


def plot_step_similarity(overlap: Float[np.ndarray, "D L"], *, subject: str = "") -> Figure:
    """Returns how much a list still has in common with itself 1, 2, ... D steps later: a line a layer, and the mean.

    Args:
        overlap: of `measure_patterns`; layers without lists are zero.
        subject: what was measured, for the title.

    Raises:
        ValueError: no layer has lists, or there are no steps.
    """
    D, L = overlap.shape
    if D == 0:
        raise ValueError("overlap has no steps; measure at least one")
    layers = _with_lists(overlap.T)
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    depth = cm.ScalarMappable(Normalize(layers[0], max(layers[-1], layers[0] + 1)), colormaps["viridis"])
    steps, marker = np.arange(1, D + 1), "o" if D == 1 else None
    for layer in layers:
        colour = colormaps["viridis"]((layer - layers[0]) / max(layers[-1] - layers[0], 1))
        axes.plot(
            steps, overlap[:, layer], color=colour, linewidth=1.1, alpha=0.8, marker=marker, label=f"layer {layer}"
        )
    mean = overlap[:, layers].mean(axis=1)
    line = axes.plot(steps, mean, color="black", linewidth=3, marker=marker, label="mean of all layers with lists")[0]
    axes.set_ylim(0, 1)
    axes.set_xlim(min(1, D - 1), D if D > 1 else 2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.set_xlabel("distance between two choices (decode steps)")
    axes.set_ylabel("critical tokens that are chosen again")
    axes.grid(alpha=0.3)
    axes.legend(handles=[line], loc="upper right")
    bar = figure.colorbar(depth, ax=axes, label="layer")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _set_title(figure, "How long a choice of tokens lasts", subject)
    return figure


def plot_plan(plan: SharePlan, dense_layers: int, *, subject: str = "") -> Figure:
    """Returns the plan as a grid of layers and lists, each in the colour of the layer whose list it reads.

    A list that is computed says "own"; one that copies is fainter and names its source: "4.1" is list 1 of layer 4.

    Args:
        plan: the plan.
        dense_layers: how many first layers have no lists.
        subject: what it was found for, for the title.
    """
    source = np.array(plan.source)
    L, J = source.shape
    is_own, is_dense = source == np.arange(L * J).reshape(L, J), np.arange(L) < dense_layers
    cell = min(max(0.36, 3 / J), 0.9)
    figure = _figure(max(cell * J + 1.9, 5.2), max(0.27 * L, 1.0) + 2.0)
    axes = figure.add_subplot()
    axes.set_facecolor(NO_LISTS)
    image = axes.imshow(
        np.ma.masked_where(np.broadcast_to(is_dense[:, None], (L, J)), source // J), aspect="auto",
        alpha=np.where(is_own, 1.0, _FAINT), cmap="viridis", vmin=0, vmax=max(L - 1, 1), interpolation="nearest",
    )  # fmt: skip
    for layer, j in np.ndindex(L, J):
        if is_dense[layer]:
            continue
        target, own = int(source[layer, j]), bool(is_own[layer, j])
        ink = _ink(target // J / max(L - 1, 1), opacity=1.0 if own else _FAINT)
        text, weight = ("own", "bold") if own else (f"{target // J}.{target % J}", "normal")
        axes.text(j, layer, text, fontsize=8, ha="center", va="center", color=ink, fontweight=weight)
    axes.hlines(np.arange(L - 1) + 0.5, -0.5, J - 0.5, color="white", linewidth=0.8)
    axes.vlines(np.arange(J - 1) + 0.5, -0.5, L - 0.5, color="white", linewidth=0.8)
    _whole_ticks(axes, J, L)
    axes.set_xlabel("list")
    axes.set_ylabel("layer")
    num_lists, num_own = int((~is_dense).sum()) * J, int(is_own[~is_dense].sum())
    bar = figure.colorbar(image, ax=axes, label="layer whose list is read")
    bar.ax.invert_yaxis()  # the first layer on top, as in the grid
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _set_title(figure, f"The plan: {num_own} of {num_lists} lists are computed", subject)
    handles = [
        Patch(facecolor=_GREEN, label="own: computed there"),
        Patch(facecolor=to_rgba(_GREEN, _FAINT), label="4.1: copied from layer 4, list 1"),
    ]
    if dense_layers:
        handles.append(Patch(facecolor=NO_LISTS, edgecolor="0.4", label="dense: reads everything, no lists"))
    _legend_below(figure, handles)
    return figure


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
    _set_title(figure, "What reading fewer tokens costs", subject)
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
    _set_title(figure, "What faster steps cost", subject)
    return figure


def read_results(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[dict[str, Any]], str]:
    """Returns (lines that `plot_quality` and `plot_speed` take, the model's name) from files of results.

    Lines of `hshare-jax eval --task perplexity` get the names, contexts and budgets that scripts/study_methods.py
    writes: its hshare at the default ratio is "hshare 1/2-1-1", its published plan "published 7/8-3/4-1/2". Lines of
    other tasks and kinds are left out, and so is a last line that was only half written.

    Raises:
        ValueError: a file that holds no results, files of different models, or files that measured one method, context
            and budget with different settings.
        OSError: a file that cannot be read.
    """
    lines: list[dict[str, Any]] = []
    studies: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    models: dict[str, Path] = {}
    for path in map(Path, paths):
        study, found = _read_file(path)
        models.setdefault(study["model"], path)
        if len(models) > 1:
            (one, first), (other, second) = models.items()
            raise ValueError(f"{first} is about {one} and {second} about {other}; plot them apart")
        setting = {key: value for key, value in study.items() if key not in _SAME_WHATEVER}
        for line in found:
            key = tuple(line.get(name) for name in ("kind", "context", "budget", "name", "batch"))
            other, known = studies.setdefault(key, (path, setting))
            if difference := _difference(known, setting):
                raise ValueError(
                    f"{other} and {path} both hold {line['name']} at {line['budget']} of {line['context']} tokens, but "
                    f"differ in {difference}; plot them apart"
                )
            lines.append(line)
    return lines, next(iter(models), "")


_SAME_WHATEVER = (
    "task",
    "data",
    "texts",
    "limit",
    "skip_start",
    "seeds",
    "batch_size",
)  # what lines may be pooled over


def _difference(known: dict[str, Any], setting: dict[str, Any]) -> str:
    known, setting = ({**study, **study.get("settings", {})} for study in (known, setting))
    names = (name for name in {**known, **setting} if name != "settings" and known.get(name) != setting.get(name))
    return next((f"{name}, {known.get(name)} and {setting.get(name)}" for name in names), "")


def _read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    text, parsed = path.read_bytes(), []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            parsed.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error}); this is no results file") from error
        if not isinstance(parsed[-1], dict):
            raise ValueError(f"{path}:{number} is not a JSON object; this is no results file")
    if not parsed or "model" not in parsed[0]:
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
        "context": int(study.get("context", 1024)),
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
    figure = _figure(3.8 * num_columns + 2.4, max(3.8 * num_rows, 0.24 * len(names) + 1) + 0.4)
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
    spare = (_ORANGE, _PURPLE, _GREEN, _SKY, _VERMILION, _GREY)
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


_PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _set_title(figure: Figure, what: str, subject: str) -> None:
    figure.suptitle(f"{what}\n{subject}" if subject else what, fontsize=11, wrap=True)


def _with_lists(of_layers: Float[np.ndarray, "L ..."]) -> list[int]:
    """Returns the layers that are not zero throughout."""
    layers = np.flatnonzero(of_layers.reshape(len(of_layers), -1).max(axis=1) > 0).tolist()
    if not layers:
        raise ValueError("no layer has lists: all are zero")
    return layers


def _num_columns(num_panels: int) -> int:
    """Returns how many panels stand beside one another: somewhat more than above one another, few places empty."""
    candidates = range(max(round(num_panels**0.5), 1), round((2.2 * num_panels) ** 0.5) + 1)
    return min(candidates, key=lambda columns: (-num_panels % columns, -columns))


def _largest_between_two(similarity: Float[np.ndarray, "M n n"]) -> float:
    """Returns where colours end: at the greatest similarity of two, which that of one with itself, 1, would dwarf."""
    between = similarity[:, ~np.eye(similarity.shape[1], dtype=bool)]
    return float(np.clip(np.ceil(round(float(between.max()) * 10, 4)) / 10, 0.1, 1)) if between.any() else 1.0


def _bar_of_shares(figure: Figure, image: AxesImage, panels: list[Axes], most: float) -> None:
    bar = figure.colorbar(image, ax=panels, extend="max" if most < 1 else "neither", aspect=30)
    bar.set_label("share of critical tokens in common (1 with itself)")


def _ink(value: float, *, opacity: float = 1.0) -> str:
    """Returns black or white, whichever is read better on viridis at `value` in [0, 1] over white."""
    r, g, b, _ = colormaps["viridis"](value)
    lightness = (0.299 * r + 0.587 * g + 0.114 * b) * opacity + 1 - opacity
    return "black" if lightness > 0.5 else "white"


def _whole_ticks(axes: Axes, width: int, height: int, *, is_labelled: tuple[bool, bool] = (True, True)) -> None:
    """Ticks an image at whole numbers, all of a few, every so many of more."""
    for axis, count, labelled in zip((axes.xaxis, axes.yaxis), (width, height), is_labelled, strict=True):
        every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, count) if count / step <= 32 or step == count)
        axis.set_ticks(range(0, count, every) if labelled else [])
        axis.set_tick_params(labelsize=8)


def _legend_below(figure: Figure, handles: list[Patch]) -> None:
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False)
