"""A command that is killed loses nothing; scripts/kill.py kills more of them."""

import importlib
from pathlib import Path

import pytest


def test_a_killed_command_loses_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))  # the root, where the scripts lie
    kill = importlib.import_module("scripts.kill")
    told: list[str] = []
    kills, failures = kill.kill_randomly(["convert --overwrite"], 1, 0, show=told.append)
    assert (kills, failures) == (1, 0), "\n".join(told)
