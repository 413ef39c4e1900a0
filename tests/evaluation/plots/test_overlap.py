"""Figures of overlaps and of a plan hold the numbers that they were given."""

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hshare_jax.evaluation.plots.overlap import (
    plot_head_similarity,
    plot_layer_similarity,
    plot_plan,
    plot_step_similarity,
)
from hshare_jax.methods.hshare.share_plan import SharePlan

RNG = np.random.default_rng(3)


def squares(num_layers: int, n: int) -> np.ndarray:
    """Symmetric similarities with ones on the diagonal; layer 0 has no lists."""
    half = RNG.uniform(0.1, 0.55, (num_layers, n, n)).astype(np.float32)
    found = (half + half.swapaxes(1, 2)) / 2
    found[:, range(n), range(n)] = 1
    found[0] = 0
    return found


def texts(figure: Figure) -> str:
    """All texts of a figure, one a line."""
    figure.draw_without_rendering()
    return "\n".join(found.get_text() for found in figure.findobj(lambda artist: hasattr(artist, "get_text")))  # pyright: ignore[reportAttributeAccessIssue]


def points(line: Line2D) -> np.ndarray:
    return np.array(line.get_xydata(), np.float64)


def test_the_lists_of_every_layer_have_a_square_of_one_scale() -> None:
    similarity = squares(6, 3)
    similarity[3, 1, 2] = similarity[3, 2, 1] = 0.6
    figure = plot_head_similarity(similarity, subject="a model, 700 tokens")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == [f"layer {layer}" for layer in range(1, 6)]
    for layer, panel in enumerate(panels, start=1):
        (image,) = panel.get_images()
        np.testing.assert_array_equal(image.get_array(), similarity[layer])
        assert image.get_clim() == (0, 0.6)  # up to the greatest of two different lists
        assert f"{similarity[layer, 2, 0]:.2f}" in [text.get_text() for text in panel.texts]
    assert "in common" in bar.get_ylabel()
    assert "a model, 700 tokens" in texts(figure)


def test_many_lists_have_no_numbers_and_one_list_has_a_figure_too() -> None:
    figure = plot_head_similarity(squares(3, 12))
    assert not any(panel.texts for panel in figure.axes)
    (panel, _) = plot_head_similarity(squares(2, 1)).axes
    assert panel.get_images()[0].get_clim() == (0, 1)


def test_layers_without_lists_are_masked() -> None:
    similarity = squares(2, 5)[1]
    similarity[0] = similarity[:, 0] = 0
    figure = plot_layer_similarity(similarity)
    axes, bar = figure.axes
    shown = axes.get_images()[0].get_array()
    assert isinstance(shown, np.ma.MaskedArray)
    np.testing.assert_array_equal(shown.mask, similarity == 0)
    np.testing.assert_array_equal(shown[1:, 1:].filled(-1), similarity[1:, 1:])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "layer")
    assert "dense" in texts(figure)


@pytest.mark.parametrize("D", [1, 2, 5])
def test_steps_have_a_line_a_layer_and_their_mean(D: int) -> None:
    overlap = RNG.uniform(0.2, 1, (D, 4)).astype(np.float32)
    overlap[:, 0] = 0
    axes, bar = plot_step_similarity(overlap).axes
    *layers, mean = axes.get_lines()
    assert [line.get_label() for line in layers] == ["layer 1", "layer 2", "layer 3"]
    assert len({to_hex(line.get_color()) for line in layers}) == 3
    for layer, line in enumerate(layers, start=1):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, D + 1))
        np.testing.assert_array_equal(line.get_ydata(), overlap[:, layer])
    np.testing.assert_allclose(points(mean)[:, 1], overlap[:, 1:].mean(axis=1), rtol=1e-6)
    assert mean.get_linewidth() > 2 * layers[0].get_linewidth()
    assert "decode steps" in axes.get_xlabel()
    assert bar.get_ylabel() == "layer"


def test_a_plan_shows_what_is_computed_copied_and_dense() -> None:
    plan = SharePlan(((0, 1), (2, 3), (2, 5), (2, 7)))
    figure = plot_plan(plan, 1)
    axes, _ = figure.axes
    shown = axes.get_images()[0].get_array()
    assert isinstance(shown, np.ma.MaskedArray)
    np.testing.assert_array_equal(shown.filled(-1), [[-1, -1], [1, 1], [1, 2], [1, 3]])
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    own = dict.fromkeys([(0, 1), (1, 1), (1, 2), (1, 3)], "own")
    assert cells == own | {(0, 2): "1.0", (0, 3): "1.0"}  # (list, layer)
    said = texts(figure)
    assert "4 of 6 lists are computed" in said
    assert "dense" in said
    assert "dense" not in texts(plot_plan(SharePlan(((0, 0), (2, 2))), 0))


@pytest.mark.parametrize("draw", [plot_head_similarity, plot_layer_similarity, plot_step_similarity])
def test_without_lists_there_is_no_figure(draw: Any) -> None:
    shape = (2, 2, 2) if draw is plot_head_similarity else (2, 2)
    with pytest.raises(ValueError, match="no layer has lists"):
        draw(np.zeros(shape, np.float32))


def test_without_steps_there_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no steps"):
        plot_step_similarity(np.zeros((0, 2), np.float32))
