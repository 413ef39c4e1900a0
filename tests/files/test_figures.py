"""Figures are written whole or not at all, and the same figure gives the same bytes."""

import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hshare_jax.files.figures import blank_figure, save, set_title


@pytest.fixture(scope="module")
def figure() -> Figure:
    made = blank_figure(6.0, 4.0)
    made.add_subplot().plot([1, 2], [3, 4])
    set_title(made, "a line", "a test")
    return made


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
