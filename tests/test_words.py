"""One word for one thing: old names of things that have been renamed occur nowhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hshare_jax", "models", "kernels", "scripts", "tests", "docs", "examples")
SUFFIXES = (".py", ".md", ".sh", ".toml", ".cff")

GONE = {
    # an old word, and the word that replaced it
    r"class Selection\b|import Selection\b|[`:|] ?\"?Selection\b|\bSelection[].`|]": "Method or MethodState",
    r"[Ss]elector": "method",
    r"\bHShareConfig\b": "HShareSettings",
    r"\bSamplingConfig\b": "SamplingParams",
    r"\bTrainingConfig\b": "TrainingSettings",
    r"\bmodel: [\"']?ModelConfig\b": "config: ModelConfig",
    r"\bconfig: [\"']?(HShare|Training)Settings\b": "settings",
    r"\bhshare: [\"']?HShareSettings\b": "settings: HShareSettings",
    r"\bconfig=HShareSettings\b": "settings=HShareSettings",
    r"\bconfig = (hshare_jax\.)?HShareSettings\b": "settings = HShareSettings",
    r"\bfor_decoding\b": "nothing: a state holds nothing that only finds a plan",
    r"\bfor_measuring\b": "nothing: what only finds a plan is PlanSearch",
    r"--plan[ =](units|published|anchors)": "--plan-kind",
    r"\bas_usage_error\b": "usage_error",
    r"\btell_short\b": "notes_on_short_texts",
    r"\bshared_decode\b": "sparse_decode",
}


def _files() -> list[Path]:
    """The text files of the repository. Folders are walked where they lie, not through the symlinks."""
    links = {ROOT / "hshare_jax" / name for name in ("models", "kernels")}
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in ROOT.iterdir() if path.suffix in SUFFIXES]
    return sorted(path for path in found if path != Path(__file__) and not links & set(path.parents))


@pytest.mark.parametrize("old", GONE)
def test_an_old_word_occurs_nowhere(old: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(old, line)
    ]
    assert not found, f"say {GONE[old]} instead in\n" + "\n".join(found)


def test_no_file_is_named_by_an_old_word() -> None:
    assert not [path for path in _files() if re.search("selector", path.name)]


def test_the_search_covers_the_repository() -> None:
    assert len(_files()) > 150
    assert any(path.name == "README.md" for path in _files())
    assert any(path.name == "api.py" for path in _files())
