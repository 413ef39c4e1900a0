"""The README's Python code runs as it stands, block after block."""

import re
from pathlib import Path

from first_layers import first_layers

from hshare_jax.models.pretrained import Model

README = Path(__file__).parent.parent / "README.md"


def test_readme_code_runs(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes files
    first, *others = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(others) == 4
    namespace: dict[str, object] = {}
    exec(compile(first, "README.md", "exec"), namespace)
    assert "blue" in capsys.readouterr().out  # the primary colours
    model = namespace["model"]
    assert isinstance(model, Model)
    namespace["model"] = first_layers(model, 6)  # of thirty: compiling them takes minutes
    for block in others:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "StreamingLLM" in capsys.readouterr().out
    assert callable(namespace["log_likelihood"])
