"""The Python code of README.md and docs/library.md runs as it stands, block after block."""

import re
from pathlib import Path

from first_layers import first_layers

from hshare_jax.models.pretrained import Model

ROOT = Path(__file__).parent.parent


def blocks_of(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)


def test_the_documented_code_runs(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes files
    (first, *of_readme), (load, *of_library) = blocks_of("README.md"), blocks_of("docs/library.md")
    assert (len(of_readme), len(of_library)) == (2, 4)
    namespace: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), namespace)
    assert "blue" in capsys.readouterr().out  # the primary colours
    model = namespace["model"]
    assert isinstance(model, Model)
    small = first_layers(model, 6)  # of thirty: compiling them takes minutes
    monkeypatch.setattr("hshare_jax.models.pretrained.load_model", lambda name: small)
    for block in [load, *of_readme, *of_library]:
        exec(compile(block, "README.md and docs/library.md", "exec"), namespace)
    assert namespace["model"] is small
    assert "StreamingLLM" in capsys.readouterr().out
    assert callable(namespace["log_likelihood"])
