"""Random calls and commands end in an answer or in one error; scripts/fuzz.py runs more of them."""

import importlib
from pathlib import Path

import pytest


def test_random_cases_end_in_an_answer_or_in_one_error(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))  # the root, where the scripts lie
    fuzz = importlib.import_module("scripts.fuzz")
    told: list[str] = []
    assert fuzz.run_cases(20, 40, show=told.append) == [], "\n".join(told)
