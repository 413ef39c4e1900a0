"""The measuring run for a GPU works on any machine in miniature, and loses nothing when something goes wrong in it."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
STEPS = ("versions", "conformance", "attention", "decode", "beside", "prefill", "generate")
# Sides that only a GPU, another library or another jax has.
ELSEWHERE = ("cuDNN", "FlashAttention-2 (torch)", "flash_attn_with_kvcache", "lax.top_k, is_stable=False")


@pytest.fixture(scope="module")
def scripts() -> ModuleType:
    """The modules that watch a run. The repository's root, where the scripts lie, is not on the import path."""
    modules = ModuleType("scripts_of_a_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        for name in ("measure", "results", "conformance"):
            setattr(modules, name, importlib.import_module(f"scripts.bench.{name}"))
    return modules


def run(*command: str | Path) -> str:
    """The output of a command that succeeds."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_toy_run_measures_every_step(tmp_path: Path, scripts: ModuleType) -> None:
    printed = run("bash", "scripts/measure_on_gpu.sh", "--toy", tmp_path / "out")
    rows = scripts.results.read_rows(tmp_path / "out")
    assert tuple(dict.fromkeys(row["step"] for row in rows)) == STEPS
    failed = [row for row in rows if "error" in row and row.get("side") not in ELSEWHERE]
    assert not failed, (tmp_path / "out" / "log.txt").read_text()
    for row in rows:
        assert {"device", "versions", "command", "date"} <= set(row)
        assert {"bytes", "gb_per_second", "share_of_copy"} <= set(row) or "seconds" not in row or "bytes" not in row
    timed = {(row["step"], row["side"]) for row in rows if "seconds" in row}
    assert {("attention", "ours sparse"), ("decode", "dense"), ("beside", "XLA dense"), ("prefill", "ours")} <= timed
    assert {("generate", "decode"), ("attention", "ours sparse, best tiles"), ("decode", "HShare 1/2-1-1")} <= timed
    assert printed == (tmp_path / "out" / "summary.md").read_text() + "\n"
    assert all(f"\n## {step}\n" in printed for step in STEPS)


# A worker that measures three units; a unit that it cannot measure ends it in the way that the test asks for.
WORKER = """
import json, os, sys, time
from pathlib import Path
out, state, trouble = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
begun = [json.loads(line).get("unit") for line in state.read_text().splitlines()] if state.exists() else []
state.with_suffix(".made").write_text(json.dumps({"device": "none", "versions": "", "command": "", "date": ""}))
def write(path, line):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\\n")
for unit in ("one", "two", "three"):
    if unit in begun:
        continue
    write(state, {"event": "begin", "step": "conformance", "unit": unit, "time": time.time()})
    if unit == "two" and trouble == "crash":
        print("a last word", flush=True)
        os._exit(9)
    if unit == "two" and trouble == "hang":
        time.sleep(60)
    write(out / "results.jsonl", {"step": "conformance", "unit": unit, "seconds": 1, "device": "none", "versions": "",
                                  "command": "", "date": ""})
    write(state, {"event": "end"})
    if unit == "two" and trouble == "device":
        os._exit(3)
"""


@pytest.mark.parametrize(
    ("trouble", "why"),
    [("crash", "the worker ended with code 9: a last word"), ("hang", "stopped after 1 s"), ("device", None)],
)
def test_trouble_costs_one_unit_at_most(
    trouble: str, why: str | None, tmp_path: Path, scripts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = scripts.measure
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.setattr(measure, "STEPS", (measure.Step("conformance", 30, 1),))

    def start(self, log) -> subprocess.Popen:
        command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path), str(self._state), trouble]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)

    monkeypatch.setattr(measure.Run, "_start", start)
    measure.Run(tmp_path, 30, toy=True).measure()
    rows = scripts.results.read_rows(tmp_path)
    assert [row["unit"] for row in rows] == ["one", "two", "three"]
    assert [row.get("error") for row in rows] == [None, why, None]
    assert "| three |" in (tmp_path / "summary.md").read_text()


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path, scripts: ModuleType) -> None:
    lines = scripts.results.Lines(tmp_path, {"device": "d", "versions": "v", "command": "c", "date": "today"})
    lines.bandwidth = 2e9
    lines.add("attention", "llama2-b16-4k", {"side": "ours sparse", "bytes": 9e8, "seconds": 0.5})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"step": "attention", "un')
    (row,) = scripts.results.read_rows(tmp_path)
    assert (row["gb_per_second"], row["share_of_copy"]) == (1.8, 0.9)
    scripts.results.summarise(tmp_path, ["a note"])
    summary = (tmp_path / "summary.md").read_text()
    assert "share of copy bandwidth: at least 0.85 | 0.90 | yes |" in summary
    assert "- a note" in summary


def test_the_inputs_of_failing_cases_are_saved_while_there_is_room(
    tmp_path: Path, scripts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    conformance, path = scripts.conformance, tmp_path / "failing_cases.npz"
    monkeypatch.setattr(conformance, "MAX_SAVED_BYTES", 4000)
    arrays = {"q": np.arange(6, dtype=np.float32).reshape(2, 3), "lengths": np.array([1, 2])}
    assert conformance.save_inputs(path, "dense, heads 4/2", arrays)
    assert conformance.save_inputs(path, "other", arrays)
    assert not conformance.save_inputs(path, "large", {"q": np.zeros(2000)})
    with np.load(path) as found:
        assert set(found) == {f"{case}/{name}" for case in ("dense, heads 4-2", "other") for name in arrays}
        np.testing.assert_array_equal(found["other/q"], arrays["q"])


def test_a_case_that_computes_something_wrong_fails(scripts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    conformance = scripts.conformance
    attention, _, selection, *_ = conformance.cases(toy=True)

    def skewed(name: str, change):
        function = getattr(conformance.api, name)

        def call(*args, impl: str, **given):
            found = function(*args, impl=impl, **given)
            return found if impl == "reference" else change(found)

        monkeypatch.setattr(conformance.api, name, call)

    skewed("sparse_decode", lambda out: out + 1e-4)
    skewed("select_by_labels", lambda lists: lists.at[1, :, :, 0].set(0))
    for case in (attention, selection):
        row, arrays = conformance.check(case, "interpret")
        assert "error" in row
        assert arrays is not None


def test_packages_that_only_model_files_need_may_be_absent() -> None:
    code = """
        import sys
        for name in ("gguf", "orbax", "orbax.checkpoint"):
            sys.modules[name] = None
        from scripts.bench.stand_ins import stand_in
        print(sorted(stand_in()))
        import hshare_jax.generate, hshare_jax.models.pretrained
    """
    assert run(sys.executable, "-c", textwrap.dedent(code)).strip() == "['gguf', 'orbax.checkpoint']"


def test_the_state_of_a_worker_that_was_cut_off_is_read(tmp_path: Path, scripts: ModuleType) -> None:
    path = tmp_path / "state"
    assert scripts.measure.read_state(path) == []
    begin = {"event": "begin", "step": "decode", "unit": "a", "time": 1.0}
    path.write_text(json.dumps(begin) + '\n{"event": "en')
    (unit,) = scripts.measure.read_state(path)
    assert (unit["unit"], unit["ended"]) == ("a", False)
