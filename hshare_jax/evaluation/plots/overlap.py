"""Figures of what sharing rests on: how alike lists, layers and steps are, and a plan. They hold no state."""

import numpy as np
from jaxtyping import Float
from matplotlib import cm, colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hshare_jax.files.figures import GREEN, blank_figure, set_title
from hshare_jax.methods.hshare.share_plan import SharePlan

NO_LISTS = "#d9d9d9"
_FAINT = 0.55  # how opaque a copied list is drawn


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
    figure = blank_figure(size * num_columns + 1.6, (size + 0.2) * num_rows + 1.1)
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
    set_title(figure, "How far the lists of a layer choose the same tokens", subject)
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
    figure = blank_figure(min(max(5.6, 0.2 * L + 2), 12), min(max(4.8, 0.2 * L + 1.2), 11))
    axes = figure.add_subplot()
    axes.set_facecolor(NO_LISTS)
    shown = np.ma.masked_where(~(has_lists[:, None] & has_lists[None, :]), similarity)
    most = _largest_between_two(similarity[None])
    image = axes.imshow(shown, cmap="viridis", vmin=0, vmax=most)
    _whole_ticks(axes, L, L)
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    _bar_of_shares(figure, image, [axes], most)
    set_title(figure, "How far layers choose the same tokens", subject)
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
    figure = blank_figure(7.2, 4.6)
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
    set_title(figure, "How long a choice of tokens lasts", subject)
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
    figure = blank_figure(max(cell * J + 1.9, 5.2), max(0.27 * L, 1.0) + 2.0)
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
    set_title(figure, f"The plan: {num_own} of {num_lists} lists are computed", subject)
    handles = [
        Patch(facecolor=GREEN, label="own: computed there"),
        Patch(facecolor=to_rgba(GREEN, _FAINT), label="4.1: copied from layer 4, list 1"),
    ]
    if dense_layers:
        handles.append(Patch(facecolor=NO_LISTS, edgecolor="0.4", label="dense: reads everything, no lists"))
    _legend_below(figure, handles)
    return figure


_PERCENT = FuncFormatter(lambda value, _: f"{value:.0%}")


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
