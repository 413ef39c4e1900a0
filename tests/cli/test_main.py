"""The command line as a whole: where it prints, one line for a failure, and its help."""

import io
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from command_line import TINY, call
from random_weights import random_params

from hshare_jax.cli import main as cli
from hshare_jax.cli.main import COMMANDS
from hshare_jax.models import pretrained


@pytest.mark.parametrize("status_of_jax", ["RESOURCE_EXHAUSTED", "INTERNAL: Error dispatching computation"])
def test_a_device_without_memory_is_a_failure(
    status_of_jax: str, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise RuntimeError(f"{status_of_jax}: Out of memory allocating 5 bytes.")

    monkeypatch.setattr(pretrained.ModelFiles, "load", load)
    status, _, err = call(["generate", "hi", "--model", tiny], capsys)
    assert status == 1
    assert err.startswith(f"hshare-jax: error: out of memory, take fewer or shorter texts at once: {status_of_jax}")


def test_a_damaged_model_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    status, out, err = call(["generate", "a", "--model", str(tmp_path / "model.gguf")], capsys)
    assert (status, out) == (1, "")
    assert "model.gguf" in err


def test_help_lists_every_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = call(["--help"], capsys)
    assert status == 0
    lines = [line.strip() for line in out.splitlines()]
    for name, help in COMMANDS.items():
        assert any(line.startswith(name) and line.endswith(help) for line in lines)


def test_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"], capsys) == (0, f"hshare-jax {version('hshare-jax')}\n", "")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_what_standard_output_cannot_hold_is_replaced(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pretrained.Model(TINY, random_params(TINY), None, (), "t\u00efny", "")
    pretrained.save_model(model, tmp_path / "model")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert cli.main(["info", str(tmp_path / "model")]) == 0
    assert written.getvalue().splitlines()[0].split()[1] == "t\u00efny".encode(encoding, "replace")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see hshare-jax --help)"),
        (["generat", "a"], "invalid choice: 'generat' (choose from"),
        (["--verbose", "generate", "a"], "unrecognized arguments: --verbose"),
        (["convert", "no model", "--", "--"], "error: "),  # newer Pythons take the second -- for DIR
        (["generate", "-n", "many"], "'many' is not a whole number (see hshare-jax generate --help)"),
    ],
)
def test_a_mistake_is_one_line_that_points_to_the_help(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(arguments, capsys)
    assert (status, out) == (2, "")
    assert err.startswith("hshare-jax: error: ")
    assert message in err
    assert err.count("\n") == 1
