"""Figures of how alike critical tokens are between lists, layers and steps, and a figure of a plan."""

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

NO_LISTS = "#d9d9d9"  # the colour of layers that read everything
_FAINT = 0.55  # the opacity of a list that copies


def plot_head_similarity(similarity: Float[np.ndarray, "L J J"], *, subject: str = "") -> Figure:
    """A square for each layer with lists: the share of critical tokens that every two lists have in common.

    Args:
        similarity: `Patterns.head_overlap`; zero in layers without lists.
        subject: the model and the text, for the title.

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
    """A square: the share of critical tokens that every two layers have in common. Layers without lists are grey.

    Args:
        similarity: `Patterns.layer_overlap`; zero in layers without lists.
        subject: the model and the text, for the title.

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
    """Curves: the share of a list's tokens that are chosen again 1, 2, ... D steps later, for each layer and the mean.

    Args:
        overlap: `Patterns.step_overlap`; zero in layers without lists.
        subject: the model and the text, for the title.

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
    """A plan as a grid of layers and lists. Each list has the colour of the layer whose list it reads.

    A list that is computed says "own". A list that copies is fainter and names its source: "4.1" is list 1 of layer 4.

    Args:
        plan: the plan.
        dense_layers: how many first layers have no lists.
        subject: the prompt or texts that the plan was found for, for the title.
    """
    source, is_own = np.array(plan.source), plan.is_computed
    L, J = source.shape
    is_dense = np.arange(L) < dense_layers
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
    """The layers that are not all zero."""
    layers = np.flatnonzero(of_layers.reshape(len(of_layers), -1).max(axis=1) > 0).tolist()
    if not layers:
        raise ValueError("no layer has lists: all are zero")
    return layers


def _num_columns(num_panels: int) -> int:
    """The number of panels in a row, so that the page is somewhat wider than high and few places stay empty."""
    candidates = range(max(round(num_panels**0.5), 1), round((2.2 * num_panels) ** 0.5) + 1)
    return min(candidates, key=lambda columns: (-num_panels % columns, -columns))


def _largest_between_two(similarity: Float[np.ndarray, "M n n"]) -> float:
    """The end of the colour scale: the greatest similarity of two different lists or layers, rounded up to a tenth.

    Each is at 1 with itself. A scale up to 1 would leave all other values in the darkest colours.
    """
    between = similarity[:, ~np.eye(similarity.shape[1], dtype=bool)]
    return float(np.clip(np.ceil(round(float(between.max()) * 10, 4)) / 10, 0.1, 1)) if between.any() else 1.0


def _bar_of_shares(figure: Figure, image: AxesImage, panels: list[Axes], most: float) -> None:
    bar = figure.colorbar(image, ax=panels, extend="max" if most < 1 else "neither", aspect=30)
    bar.set_label("share of critical tokens in common (1 with itself)")


def _ink(value: float, *, opacity: float = 1.0) -> str:
    """Black or white, whichever is easier to read on viridis at `value` in [0, 1], drawn over white."""
    r, g, b, _ = colormaps["viridis"](value)
    lightness = (0.299 * r + 0.587 * g + 0.114 * b) * opacity + 1 - opacity
    return "black" if lightness > 0.5 else "white"


def _whole_ticks(axes: Axes, width: int, height: int, *, is_labelled: tuple[bool, bool] = (True, True)) -> None:
    """Puts ticks at whole numbers: at every one, or at equal distances where there are more than 32."""
    for axis, count, labelled in zip((axes.xaxis, axes.yaxis), (width, height), is_labelled, strict=True):
        every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, count) if count / step <= 32 or step == count)
        axis.set_ticks(range(0, count, every) if labelled else [])
        axis.set_tick_params(labelsize=8)


def _legend_below(figure: Figure, handles: list[Patch]) -> None:
    figure.legend(handles=handles, loc="outside lower center", fontsize=9, frameon=False)
