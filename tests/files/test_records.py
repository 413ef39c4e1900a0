"""Results files: a run that was killed at any moment and then resumed writes the same bytes as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from hshare_jax.files.records import Records

STUDY = {"task": "count", "model": "none", "limit": None}
LINES = [{"id": f"item {i}", "method": m, "text": "ü\n" * i, "scores": {"x": i / 3}} for i in range(4) for m in "ab"]
KEYS = ("id", "method")


def write_all(path: Path, study=STUDY) -> bytes:
    records = Records(path, study, keys=KEYS)
    for line in LINES:
        records.append(line)
    return path.read_bytes()


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    return write_all(tmp_path / "whole.jsonl")


def test_a_file_is_a_line_for_the_study_and_one_for_each_item(whole: bytes) -> None:
    lines = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    assert lines == [{"results": "hshare_jax", **STUDY}, *LINES]


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_is_completed_to_the_same_bytes(share: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(whole[: round(share * len(whole))])
    assert write_all(path) == whole


def test_a_finished_item_is_not_written_twice(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    records = Records(path, STUDY, keys=KEYS)
    assert {"id": "item 2", "method": "b"} in records
    assert {"id": "item 9", "method": "b"} not in records
    assert records.lines == LINES
    assert write_all(path) == whole


def test_another_study_is_refused_and_the_file_kept(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.jsonl"
    with pytest.raises(ValueError, match="holds results for limit=None, and this run has limit=3; name another file"):
        Records(path, {**STUDY, "limit": 3}, keys=KEYS)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prose\n", "other.txt is no results file"),
        ("my only copy", "other.txt is no results file"),
        (json.dumps({"x": 1}) + "\n", "other.txt is no results file"),
        (json.dumps({"results": "hshare_jax", **STUDY}) + "\n{\n", ":2 is not JSON"),
        (json.dumps({"results": "hshare_jax", **STUDY}) + "\n[1]\n", ":2 is not a JSON object"),
        (
            json.dumps({"results": "hshare_jax", **STUDY}) + '\n{"id": ["a"], "method": "a"}\n',
            r":2 .*id=\['a'\] must be",
        ),
        (json.dumps({"results": "hshare_jax", **STUDY}) + '\n{"id": "a"}\n', ":2 names no item: it has no method"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_and_kept(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Records(path, STUDY, keys=KEYS)
    assert path.read_text() == text


WRITER = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
import test_records
while True:  # again and again from the start, so that the kill can come at any moment
    test_records.write_all(Path({path!r}))
    Path({path!r}).unlink()
"""


@pytest.mark.parametrize("wait", [0.0, 0.007, 0.013])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(wait: float, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "killed.jsonl"
    code = WRITER.format(paths=[str(Path(__file__).parent)], path=str(path))
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    while not path.exists():
        assert child.poll() is None
        time.sleep(0.001)
    time.sleep(wait)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert write_all(path) == whole


def test_a_first_line_without_results_gives_way_to_another_study(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "begun.jsonl"
    Records(path, {**STUDY, "limit": 3}, keys=KEYS)
    assert not path.exists(), "nothing is written before the first result"
    path.write_bytes(json.dumps({"results": "hshare_jax", **STUDY, "limit": 3}).encode() + b"\n" + whole[-20:-1])
    assert write_all(path) == whole


def test_of_two_runs_on_one_file_the_second_to_write_ends_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    one, other = Records(path, STUDY, keys=KEYS), Records(path, STUDY, keys=KEYS)
    one.append(LINES[0])
    with pytest.raises(ValueError, match=r"another run has written to .*shared.jsonl: let it end"):
        other.append(LINES[1])
    one.append(LINES[2])
    assert Records(path, STUDY, keys=KEYS).lines == [LINES[0], LINES[2]]


def test_reading_leaves_the_line_that_a_run_is_writing(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "running.jsonl"
    path.write_bytes(whole[:-5])
    assert Records(path, STUDY, keys=KEYS).lines == LINES[:-1]
    assert path.read_bytes() == whole[:-5]


def test_what_differs_is_named_setting_by_setting(tmp_path: Path) -> None:
    path = tmp_path / "settings.jsonl"
    Records(path, {"settings": {"a": 1, "b": 2}}, keys=("id",)).append({"id": 1})
    with pytest.raises(ValueError, match="holds results for b=2, and this run has b=3;"):
        Records(path, {"settings": {"a": 1, "b": 3}}, keys=("id",))
    with pytest.raises(ValueError, match="holds results for no such setting, and this run has c=None;"):
        Records(path, {"settings": {"a": 1, "b": 2}, "c": None}, keys=("id",))
