"""What several tests of the command line read: a tiny model and a short text."""

from pathlib import Path

import pytest
from command_line import TEXT, save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")
