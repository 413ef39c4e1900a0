"""The README's Python code runs as it stands, block after block."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_readme_code_runs(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # it writes files
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "blue" in printed  # the primary colours
    assert "StreamingLLM" in printed
    scores = namespace["log_likelihood"]
    assert callable(scores)
