"""One measuring run on a GPU within nine minutes, the most important steps first; results are written as they come.

A worker process does the measuring (scripts/bench/measure_steps.py). This process watches it: it ends a worker that
hangs, starts another one after a crash, leaves out the unit that did not end, and keeps the summary up to date. A step
may use the time that earlier steps left over. `bash scripts/measure_on_gpu.sh` sets the environment and starts this.

    python -m scripts.bench.measure OUT            # on a GPU
    python -m scripts.bench.measure OUT --toy      # on any machine: tiny shapes through Pallas' interpreter
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.bench.results import LOG, SUMMARY, Lines, read_rows, summarise

ALL_UNITS = "list of units"  # the unit in which a worker lists a step's units
TICK = 0.1  # seconds between two looks at the worker
BROKEN_DEVICE = 3  # exit code of a worker after whose last unit the device computes nothing any more
GRACE = 10  # seconds by which a running unit may outlast its step


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of the run: how long it may take, and how long one unit of it may take before it counts as hung."""

    name: str
    seconds: float
    unit_seconds: float


# 525 seconds in all; with the last worker's end the run stays under nine minutes.
STEPS = (
    Step("versions", 20, 40),
    Step("conformance", 90, 30),
    Step("attention", 120, 50),
    Step("decode", 120, 110),
    Step("beside", 60, 40),
    Step("prefill", 60, 50),
    Step("generate", 55, 55),
)
GPT_FAST_SECONDS = 90  # taken from the other steps where GPT_FAST names a checkout


@dataclasses.dataclass(frozen=True)
class Worker:
    """A measuring process, and the file in which it reports its progress."""

    process: subprocess.Popen
    state: Path

    def unit(self) -> tuple[str, str, float] | None:
        """The step, the unit and the start time of what is being measured; None between two units."""
        begun = read_state(self.state)
        return None if not begun or begun[-1]["ended"] else tuple(begun[-1][key] for key in ("step", "unit", "began"))


def end(process: subprocess.Popen) -> None:
    """Ends a process that leads a group, and the processes that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read_state(path: Path) -> list[dict]:
    """The units that were begun, in order: {"step", "unit", "began", "ended", "failed"}."""
    units: list[dict] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the worker was cut off while it wrote
            continue
        if event["event"] == "begin":
            begun = {"step": event["step"], "unit": event["unit"], "began": event["time"]}
            units.append(begun | {"ended": False, "failed": False})
        elif units:
            units[-1] |= {"ended": True, "failed": event["event"] == "give up"}
    return units


class Run:
    """One measuring run: its folder, its deadlines and its notes."""

    def __init__(self, out: Path, seconds: float, *, toy: bool) -> None:
        self._out, self._toy, self._began = out, toy, time.time()
        self._state = Path(tempfile.mkdtemp(prefix="measure-")) / "state"
        self._notes: list[str] = []
        share = seconds / sum(step.seconds for step in STEPS)
        ends, end = {}, self._began
        for step in STEPS:
            end += step.seconds * share
            ends[step.name] = end
        self._ends = ends

    @property
    def _end(self) -> float:
        return self._ends[STEPS[-1].name]

    def measure(self) -> None:
        """Starts workers until all units have been begun or the time is over."""
        while time.time() < self._end:
            begun = len(read_state(self._state))
            with (self._out / LOG).open("ab") as log:
                worker = Worker(self._start(log), self._state)
                try:
                    why = self._watch(worker)
                finally:
                    end(worker.process)
            unit = worker.unit()
            if why is None and worker.process.returncode == 0:
                break
            why = why or f"the worker ended with code {worker.process.returncode}: {self._last_words()}"
            if unit is not None:
                self._give_up(*unit[:2], why)
            elif worker.process.returncode != BROKEN_DEVICE or len(read_state(self._state)) == begun:
                self._notes.append(why)  # another worker would end at the same place
                break
        self.summarise()

    def summarise(self) -> None:
        """Writes the summary."""
        took = f"the run took {time.time() - self._began:.0f} s; the log is {LOG}"
        summarise(self._out, [*self._notes, took])

    def _start(self, log) -> subprocess.Popen:
        command = [sys.executable, "-m", "scripts.bench.measure_steps", str(self._out), "--state", str(self._state)]
        command += ["--ends", json.dumps(self._ends), "--command", shlex.join(["python", *sys.orig_argv[1:]])]
        command += ["--toy"] if self._toy else []
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)

    def _watch(self, worker: Worker) -> str | None:
        """Waits for a worker's end; returns why it is to be ended before that, if it is."""
        limits, seen = {step.name: step.unit_seconds for step in STEPS}, len(read_state(self._state))
        while worker.process.poll() is None:
            time.sleep(TICK)
            begun, now = read_state(self._state), time.time()
            for unit in begun[seen:]:
                if unit["unit"] != ALL_UNITS:
                    print(f"{now - self._began:5.0f} s  {unit['step']}: {unit['unit']}", file=sys.stderr, flush=True)
            if len(begun) != seen:
                seen = len(begun)
                self.summarise()
            if now > self._end + GRACE:
                return "the run's time was over"
            if (unit := worker.unit()) is None:
                continue
            step, _, began = unit
            if now > began + limits[step]:
                return f"stopped after {limits[step]:g} s"
            if now > self._ends[step] + GRACE:
                return f"stopped {GRACE} s after the end of the step's time"
        return None

    def _give_up(self, step: str, unit: str, why: str) -> None:
        made = self._state.with_suffix(".made")
        lines = Lines(self._out, json.loads(made.read_text()) if made.exists() else {})
        lines.add(step, unit, {"error": why})
        with self._state.open("a") as file:
            file.write(json.dumps({"event": "give up"}) + "\n")

    def _last_words(self) -> str:
        lines = (self._out / LOG).read_text(errors="replace").strip().splitlines() or [""]
        return lines[-1][:200]


def measure_gpt_fast(out: Path, checkout: str, *, toy: bool) -> None:
    """Times gpt-fast in a separate process, which has the whole memory of the device."""
    command = [sys.executable, "-m", "scripts.bench.gpt_fast", checkout, "--out", str(out)] + (["--toy"] if toy else [])
    with (out / LOG).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        try:
            process.wait(GPT_FAST_SECONDS)
        except subprocess.TimeoutExpired:
            log.write(b"gpt-fast: stopped at its time limit\n")
        finally:
            end(process)


def main() -> None:
    """Measures, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results; it must not hold any yet")
    parser.add_argument("--seconds", type=float, default=525, help="of the whole run")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, on any machine")
    options = parser.parse_args()
    if read_rows(options.out):
        parser.error(f"{options.out} holds results already; name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    checkout = os.environ.get("GPT_FAST")
    run = Run(options.out, options.seconds - (GPT_FAST_SECONDS if checkout else 0), toy=options.toy)
    # A run that is cut off politely still ends its worker and writes its summary.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("measure: cut off"))
    try:
        run.measure()
        if checkout:
            measure_gpt_fast(options.out, checkout, toy=options.toy)
    finally:
        run.summarise()
    print((options.out / SUMMARY).read_text())


if __name__ == "__main__":
    main()
