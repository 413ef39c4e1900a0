"""Writing of the studies' reports: below a mark in a Markdown file, with the command that makes them."""

import argparse
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import jax

from hshare_jax.files.atomic import whole_file


def command(options: argparse.Namespace) -> str:
    """The command that was given, with XLA's flags, with files by their names, and without --report-only."""
    values = [value for entry in vars(options).values() for value in (entry if isinstance(entry, list) else [entry])]
    paths = {value for value in values if isinstance(value, Path)}

    def shorten(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        is_path = Path(value) in paths or Path(value).exists()  # a model may be a name or a path
        return option + equals + (Path(value).name or value if is_path else value)

    flags = f"XLA_FLAGS={shlex.quote(os.environ['XLA_FLAGS'])} " if "XLA_FLAGS" in os.environ else ""
    words = [shorten(word) for word in sys.orig_argv[1:] if word != "--report-only"]
    return f"{flags}python {shlex.join(words)}"


def made_with(model: str) -> str:
    """Date, model, dtype, versions and device, for a report's heading."""
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{date.today()}, {model}, float32, {versions}, {jax.devices()[0].device_kind}"


def write_report(path: Path | None, mark: str, text: str) -> None:
    """Writes `text` below the mark of a Markdown file, and keeps the text above the mark; None prints `text`."""
    if path is None:
        sys.stdout.write(text)
        return
    above = path.read_text(encoding="utf-8").partition(mark)[0] if path.exists() else ""
    with whole_file(path) as draft:
        draft.write_text(f"{above}{mark}\n\n{text}", encoding="utf-8")
