"""The command line called as a function."""

import pytest

from hshare_jax.cli import main as cli


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Returns (exit status, standard output, standard error)."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err
