"""Figures of results: a curve for each method, a panel for each context."""

import numpy as np
import pytest
from matplotlib.lines import Line2D
from result_lines import speed_line, text_line

from hshare_jax.evaluation.plots.results import DEFAULT, plot_quality, plot_speed


def points(line: Line2D) -> np.ndarray:
    return np.array(line.get_xydata(), np.float64)


def test_quality_is_a_curve_a_method_over_budgets_and_a_panel_a_context() -> None:
    lines = [
        text_line("dense", 64, 960, [[0.0, 0.0]]),
        text_line("quest", 128, 160.5, [[0.1, 0.3], [0.2, 0.2]]),
        text_line("quest", 64, 100, [[0.4]]),
        text_line(DEFAULT, 64, 90, 0.02),
        text_line(DEFAULT, 64, 110, 0.04),  # another window: their mean
        text_line("mine", 64, 300, [[0.5]], context=4096),
        text_line("h2o", 512, 1024, [[0.0]]),  # it read everything
        {"kind": "passkey", "budget": 64, "name": "quest", "found": [1]},
    ]
    figure = plot_quality(lines, subject="a model")
    short, long = figure.axes
    curves = {str(line.get_label()): line for line in short.get_lines()}
    assert set(curves) == {"quest", DEFAULT}
    np.testing.assert_allclose(points(curves["quest"]), [[100, 0.4], [160.5, 0.2]])
    np.testing.assert_allclose(points(curves[DEFAULT]), [[100, 0.03]])
    assert [str(line.get_label()) for line in long.get_lines()] == ["mine"]
    assert curves[DEFAULT].get_linewidth() > curves["quest"].get_linewidth()
    assert short.get_yscale() == long.get_yscale() == "log"
    assert "1,024 tokens" in short.get_title()
    assert "reads 960" in short.get_title()
    assert "dense" not in long.get_title()
    assert "KL divergence" in short.get_ylabel()
    assert "tokens read" in short.get_xlabel()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["mine", "quest", DEFAULT]  # from the farthest to the nearest
    assert [text.get_fontweight() for text in legend.get_texts()] == ["normal", "normal", "bold"]


def test_methods_of_a_whole_study_are_told_apart() -> None:
    names = [
        "exact_topk", "double_sparsity", "hshare 1-1-1", DEFAULT, "hshare 1/3-1-1", "hshare 1/8-1-1",
        "published 7/8-3/4-1/2", "published 3/4-3/4-1/2", "published 1/2-1/2-1/2", "streaming_llm", "h2o", "quest",
        "quest_window", "snapkv", "snapkv_fixed", "anchors 1/2-1-1", "anchors 1/3-1-1", "a stranger",
    ]  # fmt: skip
    figure = plot_quality([text_line(name, 64, 90, 0.1 * (i + 1)) for i, name in enumerate(names)])
    (axes,) = figure.axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert set(lines) == set(names)
    assert len({str(line.get_marker()) for line in lines.values()}) == len(names)
    boldest = max(lines, key=lambda name: lines[name].get_linewidth())
    assert boldest == DEFAULT


def test_values_that_nearly_agree_still_have_a_tick() -> None:
    figure = plot_quality([text_line("quest", 64, 90, 0.0300), text_line("h2o", 64, 95, 0.0301)])
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert [tick for tick in axes.get_yticks() if low < tick < high]


def test_speed_joins_times_with_divergences() -> None:
    lines = [
        text_line("quest", 64, 100, [[0.4]]),
        text_line("quest", 128, 100, [[0.1]]),
        text_line("h2o", 64, 100, [[0.3]]),  # not timed
        text_line(DEFAULT, 64, 90, 0.02),
        text_line(DEFAULT, 64, 90, 0.02, context=4096),  # not timed there
        speed_line("quest", 128, 2.5),
        speed_line("quest", 64, 2.0),
        speed_line("snapkv", 64, 1.0),  # of unknown divergence
        speed_line(DEFAULT, 64, 1.5),
        speed_line("dense", 64, 7.0),
        speed_line("quest", 64, 1.75, batch=1),
    ]
    figure = plot_speed(lines)
    one, eight = figure.axes
    curves = {str(line.get_label()): line for line in eight.get_lines()}
    np.testing.assert_allclose(points(curves["quest"]), [[2.0, 0.4], [2.5, 0.1]])
    np.testing.assert_allclose(points(curves[DEFAULT]), [[1.5, 0.02]])
    (dense,) = set(curves) - {"quest", DEFAULT}
    np.testing.assert_array_equal(curves[dense].get_xdata(), [7.0, 7.0])
    assert [text.get_text() for text in eight.texts] == ["64 tokens", "dense 7 ms"]
    np.testing.assert_allclose(points(one.get_lines()[0]), [[1.75, 0.4]])
    assert one.get_title().endswith("1 row")
    assert eight.get_title().endswith("8 rows")
    assert "(ms)" in one.get_xlabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["quest", DEFAULT]


def test_lines_without_anything_to_show_are_an_error() -> None:
    with pytest.raises(ValueError, match="no line has a divergence"):
        plot_quality([text_line("dense", 64, 960, 0.0)])
    with pytest.raises(ValueError, match="no method has both"):
        plot_speed([text_line("quest", 64, 90, 0.1), speed_line("quest", 128, 1.0)])
