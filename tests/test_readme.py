"""The Python code of README.md and docs/library.md runs as it stands, block after block."""

import contextlib
import io
import re
from pathlib import Path

import pytest
from first_layers import first_layers

from hshare_jax.models.pretrained import Model

ROOT = Path(__file__).parent.parent


def blocks_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


@pytest.fixture(scope="module")
def first_lines() -> tuple[dict[str, object], str]:
    """The names that the first block of the README defines, and what it prints."""
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(blocks_of("README.md")[0], "README.md", "exec"), namespace)
    return namespace, printed.getvalue()


def test_the_first_lines_of_the_readme_answer(first_lines: tuple[dict[str, object], str]) -> None:
    assert "blue" in first_lines[1]  # the answer lists the primary colours


def test_the_documented_code_runs(first_lines, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the code writes files
    (_, *of_readme), (load, *of_library) = blocks_of("README.md"), blocks_of("docs/library.md")
    assert (len(of_readme), len(of_library)) == (2, 4)
    namespace = dict(first_lines[0])
    model = namespace["model"]
    assert isinstance(model, Model)
    small = first_layers(model, 6)  # six of thirty, because compiling all takes minutes
    monkeypatch.setattr("hshare_jax.models.pretrained.load_model", lambda name: small)
    for block in [load, *of_readme, *of_library]:
        exec(compile(block, "README.md and docs/library.md", "exec"), namespace)
    assert namespace["model"] is small
    assert "StreamingLLM" in capsys.readouterr().out
    assert callable(namespace["log_likelihood"])
