"""Figures: they hold what they were given, and are written whole or not at all."""

import json
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from result_lines import EVAL, STUDY, eval_line, speed_line, text_line, write

from hshare_jax.evaluation.plots.overlap import (
    plot_head_similarity,
    plot_layer_similarity,
    plot_plan,
    plot_step_similarity,
)
from hshare_jax.evaluation.plots.results import DEFAULT, plot_quality, plot_speed, read_results
from hshare_jax.files.figures import save
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan

RNG = np.random.default_rng(3)


def squares(num_layers: int, n: int) -> np.ndarray:
    """Returns symmetric similarities with ones on the diagonal; layer 0 has none."""
    half = RNG.uniform(0.1, 0.55, (num_layers, n, n)).astype(np.float32)
    found = (half + half.swapaxes(1, 2)) / 2
    found[:, range(n), range(n)] = 1
    found[0] = 0
    return found


def texts(figure: Figure) -> str:
    """Returns all that a figure says, a line each."""
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


def test_results_of_studies_and_evaluations_become_one(tmp_path: Path) -> None:
    line = text_line("quest", 64, 100, [[0.4]])
    passkey = {"kind": "passkey", "budget": 64, "name": "quest", "found": [1]}
    study = write(tmp_path / "study.jsonl", STUDY, line | {"recall": 0.9, "settings": "Quest()"}, passkey, end='{"kin')
    published = EVAL | {"settings": EVAL["settings"] | {"plan": "published", "refresh_interval": "2"}}
    files = [
        study,
        write(tmp_path / "eval.jsonl", EVAL, eval_line("hshare", 0.02), eval_line("h2o", 0.2)),
        write(tmp_path / "more.jsonl", EVAL | {"data": ["b.txt"]}, eval_line("hshare", 0.04, "b.txt:0")),
        write(tmp_path / "published.jsonl", published, eval_line("hshare", 0.5)),
        write(tmp_path / "plan.jsonl", EVAL | {"plan_file": "made/plan.json"}, eval_line("hshare", 0.6)),
        write(tmp_path / "task.jsonl", {"model": "tiny", "task": "gsm8k"}, {"task": "gsm8k", "scores": {}}),
    ]
    lines, model = read_results(files)
    assert model == "tiny"
    of_eval = {"kind": "text", "context": 512, "budget": 128, "reads": 140.0}
    assert lines == [
        line,
        of_eval | {"name": f"hshare {HShareSettings().sharing_ratio}", "divergence": 0.02},
        of_eval | {"name": "h2o", "divergence": 0.2},
        of_eval | {"name": f"hshare {HShareSettings().sharing_ratio}", "divergence": 0.04},
        of_eval | {"name": "published 1/2-1-1/2", "divergence": 0.5},
        of_eval | {"name": "hshare plan.json", "divergence": 0.6},
    ]
    curves = {str(line.get_label()): line for line in plot_quality(lines).axes[0].get_lines()}
    np.testing.assert_allclose(points(curves[DEFAULT]), [[140, 0.03]])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "does not begin with a line that names the model"),
        ([{"text": "a story"}], "does not begin with a line that names the model"),
        ([STUDY, {"kind": "text", "context": 1024}], "has a line without 'budget'"),
        ([STUDY | {"model": "other"}], "first.jsonl and .*second.jsonl both hold .* differ in model, tiny and other"),
        ([STUDY | {"identity": "1"}], "first.jsonl and .*second.jsonl both hold .* differ in identity, None and 1"),
        (
            [STUDY | {"steps": 64}, text_line("h2o", 64, 100, [[0.4]])],
            "both hold results of 1024 tokens, but differ in steps, 256 and 64; plot them apart",
        ),
        (
            [
                EVAL | {"context": "1024", "settings": EVAL["settings"] | {"num_critical": "24"}},
                eval_line("quest", 0.3),
            ],
            "both hold quest at 64 of 1024 tokens, but differ in what made them, a study and hshare-jax eval",
        ),
    ],
)
def test_results_that_cannot_stand_together_are_refused(
    lines: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    first = write(tmp_path / "first.jsonl", STUDY, text_line("quest", 64, 90, [[0.3]]))
    with pytest.raises(ValueError, match=message):
        read_results([first, write(tmp_path / "second.jsonl", *lines)])


def test_runs_of_other_settings_share_the_methods_that_have_no_use_for_them(tmp_path: Path) -> None:
    other = EVAL | {"settings": EVAL["settings"] | {"layer_ratio": "1/3"}, "plan_file": "p", "plan_file_sha256": "0"}
    files = [
        write(tmp_path / "a.jsonl", EVAL, eval_line("hshare", 0.02), eval_line("h2o", 0.2)),
        write(tmp_path / "b.jsonl", other, eval_line("hshare", 0.03), eval_line("h2o", 0.4), eval_line("dense", 0.0)),
    ]
    lines, _ = read_results(files)
    assert [line["name"] for line in lines] == [DEFAULT, "h2o", "hshare p", "h2o", "dense"]
    budget = EVAL | {"settings": EVAL["settings"] | {"dense_layers": "2"}}
    with pytest.raises(ValueError, match=r"both hold h2o at .* differ in dense_layers"):
        read_results([files[0], write(tmp_path / "c.jsonl", budget, eval_line("h2o", 0.2))])


def test_a_study_of_several_models_is_no_results_file(tmp_path: Path) -> None:
    path = write(tmp_path / "models.jsonl", {"model": {"layers": 4}}, {"kind": "loss"})
    with pytest.raises(ValueError, match="does not begin with a line that names the model"):
        read_results([path])


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text(json.dumps(STUDY) + "\nIt is a truth\n")
    with pytest.raises(ValueError, match=r"prose.jsonl:2 is not JSON"):
        read_results([path])


@pytest.fixture(scope="module")
def figure() -> Figure:
    return plot_quality([text_line("quest", 64, 100, 0.4), text_line("h2o", 64, 90, 0.5)])


def test_png_and_svg_are_whole_and_the_same_every_time(figure: Figure, tmp_path: Path) -> None:
    png, svg = tmp_path / "new" / "a.png", tmp_path / "new" / "a.SVG"
    for path in (png, svg):
        save(figure, path)
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 500
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    first = svg.read_bytes()
    save(figure, svg)
    assert svg.read_bytes() == first
    assert sorted(path.name for path in png.parent.iterdir()) == ["a.SVG", "a.png"]


def test_a_failure_leaves_what_was_there(figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"before")

    def fail(draft: Path, **_: object) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save(figure, path)
    assert [found.name for found in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("name", ["a.pdf", "a", "png"])
def test_other_suffixes_are_refused(name: str, figure: Figure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} must end in .png or .svg"):
        save(figure, tmp_path / name)
    assert not list(tmp_path.iterdir())
