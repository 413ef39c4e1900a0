"""Figures: colours, an empty page, a title, and files of PNG or SVG that are written whole.

matplotlib comes with the extra `eval`, so it is imported only where a figure is made or written.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.files.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

# Okabe and Ito's colours: colour-blind readers can tell them apart. Yellow is left out because it is faint on white.
BLACK, BLUE, SKY, GREEN = "#000000", "#0072B2", "#56B4E9", "#009E73"
ORANGE, VERMILION, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#7F7F7F"


def blank_figure(width: float, height: float) -> "Figure":
    """An empty white figure, its size given in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def set_title(figure: "Figure", what: str, subject: str) -> None:
    """Writes a title: a line for what the figure shows, and below it, unless empty, what was measured."""
    figure.suptitle(f"{what}\n{subject}" if subject else what, fontsize=11, wrap=True)


def save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG or SVG, whichever the path's suffix names. On an error nothing is written.

    The same figure gives the same bytes.

    Raises:
        ValueError: the path has another suffix.
    """
    import matplotlib

    path = Path(path)
    check_suffix(path)
    with whole_file(path) as draft, matplotlib.rc_context({"svg.hashsalt": "hshare_jax"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(draft, format=path.suffix.lower()[1:], dpi=150, metadata=metadata)


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a file that `save` cannot write."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}: figures are written as PNG or SVG")
