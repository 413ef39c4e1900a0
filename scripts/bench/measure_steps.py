"""The worker of a measuring run: runs the units of every step in order and writes a line for each measurement.

`scripts.bench.measure` starts it and watches it. A unit is the smallest thing that is left out after a crash.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path

from scripts.bench.stand_ins import stand_in

STAND_INS = stand_in()  # before the package is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from hshare_jax.methods.hshare.method import HShare  # noqa: E402
from hshare_jax.models.config import ModelConfig  # noqa: E402
from scripts.bench import attention, conformance, generate, prefill, selection, tune_kernels  # noqa: E402
from scripts.bench import gpu_timing as timing  # noqa: E402
from scripts.bench.measure import ALL_UNITS, BROKEN_DEVICE, STEPS, read_state  # noqa: E402
from scripts.bench.results import FAILED, Lines, Row, read_rows  # noqa: E402

Unit = tuple[str, Callable[[], Iterable[Row]]]  # its name, and what measures it
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "triton", "transformers", "nvidia-cudnn-cu13")
CELLS = (
    "llama2-b16-4k", "llama3-b16-4k", "llama2-b1-32k", "llama3-b1-32k", "llama2-b16-32k", "llama3-b16-32k",
    "llama2-b1-128k", "llama3-b1-128k", "llama2-b64-4k", "llama3-b64-4k", "llama2-b16-1k", "llama3-b16-1k",
)  # fmt: skip
FIRST = 3  # so many cells are measured and tuned before all others
SELECTIONS: tuple[selection.Size, ...] = (
    ((16, 32), 4096, 432), ((16, 8), 4096, 432), ((16, 8), 32_768, 432), ((16, 32), 8192, 128),
    ((16, 8), 8192, 128), ((16, 32), 4096, 88), ((16, 32), 32_768, 432), ((16, 8), 4096, 88),
    ((16, 32), 8192, 432), ((16, 32), 32_768, 88),
)  # fmt: skip
DECODE = ((4096, 16), (16_384, 8), (32_768, 1), (4096, 8), (4096, 1), (16_384, 1), (16_384, 16), (32_768, 8))
DECODE_STEPS, DECODE_REPEATS = 32, 5
EFFORT = timing.Effort(min_calls=8, min_seconds=0.01, samples=7)
LONG = timing.Effort(min_calls=1, min_seconds=0, samples=3)  # for calls that take a tenth of a second and more
NEW_TOKENS = 128


class Measurements:
    """The steps of a run, each a function that yields its units."""

    def __init__(self, lines: Lines, out: Path, *, toy: bool) -> None:
        self._lines, self._out, self._toy = lines, out, toy
        self._effort, self._impl = (timing.TOY, "interpret") if toy else (EFFORT, "pallas")
        self._make_params = functools.lru_cache(maxsize=1)(generate.random_params)
        self.steps: dict[str, Callable[[], Iterator[Unit]]] = {
            "versions": self._versions, "conformance": self._conformance, "attention": self._attention,
            "decode": self._decode, "beside": self._beside, "prefill": self._prefill, "generate": self._generate,
        }  # fmt: skip

    def _params(self, config: ModelConfig) -> dict:
        """Random weights, kept until another model's are asked for; they do not depend on the number of positions."""
        return self._make_params(dataclasses.replace(config, max_positions=1))

    # --- the machine

    def _versions(self) -> Iterator[Unit]:
        """Copy bandwidth, the rate of matrix products, and what is installed."""
        yield "machine", self._machine

    def _machine(self) -> Iterator[Row]:
        effort = timing.TOY if self._toy else timing.QUICK
        self._lines.bandwidth = timing.copy_bandwidth(effort)
        size = 2 * effort.copy_bytes
        yield {"side": "copy", "bytes": size, "seconds": size / self._lines.bandwidth}
        size = 256 if self._toy else 8192
        rate = timing.matrix_rate(size, effort)
        yield {"side": f"bf16 product of {size}^3", "seconds": 2 * size**3 / rate, "note": f"{rate / 1e12:.1f} TFLOP/s"}
        yield {"side": "packages", "note": _versions()}
        for package, why in STAND_INS.items():
            yield {"side": package, "note": f"absent, a stand-in serves: {why}"}
        query = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        yield {"side": "nvidia-smi", "note": _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")}

    # --- correctness

    def _conformance(self) -> Iterator[Unit]:
        """Every case of the kernels' conformance, against the reference."""
        for case in conformance.cases(toy=self._toy):
            yield case.name, functools.partial(self._check, case)

    def _check(self, case: conformance.Case) -> Iterator[Row]:
        row, arrays = conformance.check(case, self._impl)
        if "error" in row and arrays:
            saved = conformance.save_inputs(self._out / FAILED, case.name, arrays)
            row["error"] += "; its inputs are saved" if saved else "; its inputs are too large to be saved"
        yield row

    # --- kernels

    def _attention(self) -> Iterator[Unit]:
        """Our attention and selection, and the layouts near those that tiling.py chooses."""
        cells, sizes = self._cells(), self._sizes()
        first, rest = cells[:FIRST], cells[FIRST:]
        for cell in first:
            yield cell.name, functools.partial(self._ours, cell)
        for cell in first:
            yield f"tiles {cell.name}", functools.partial(self._tune, "attention", cell)
        for size in sizes[:FIRST]:
            yield _size_name(size), functools.partial(self._select, size)
        for cell in first:
            yield f"selection tiles {cell.name}", functools.partial(self._tune, "selection", cell)
        for cell in first[:2]:
            yield f"dense tiles {cell.name}", functools.partial(self._tune, "dense", cell)
        for cell in rest:
            yield cell.name, functools.partial(self._ours, cell)
        for size in sizes[FIRST:]:
            yield _size_name(size), functools.partial(self._select, size)
        for cell in rest:
            yield f"tiles {cell.name}", functools.partial(self._tune, "attention", cell)

    def _beside(self) -> Iterator[Unit]:
        """Other implementations on the same cells."""
        cells, sizes = self._cells(), self._sizes()
        for cell in cells[:FIRST]:
            yield cell.name, functools.partial(self._others, cell)
        for size in sizes[:FIRST]:
            yield _size_name(size), functools.partial(self._select_otherwise, size)
        for cell in cells[FIRST:]:
            yield cell.name, functools.partial(self._others, cell)
        for size in sizes[FIRST:]:
            yield _size_name(size), functools.partial(self._select_otherwise, size)

    def _cells(self) -> list[attention.Cell]:
        return list(attention.TOY_CELLS[:1]) if self._toy else [attention.cells()[name] for name in CELLS]

    def _sizes(self) -> tuple[selection.Size, ...]:
        return selection.TOY_SIZES[:1] if self._toy else SELECTIONS

    def _ours(self, cell: attention.Cell) -> Iterator[Row]:
        if lack := attention.lacks_memory(cell):
            yield {"error": lack}
            return
        q, data = attention.make_cell(cell, toy=self._toy)
        yield from attention.measure(attention.our_sides(cell, q, data, self._effort, self._impl), cell)

    def _others(self, cell: attention.Cell) -> Iterator[Row]:
        if lack := attention.lacks_memory(cell):
            yield {"error": lack}
            return
        q, data = attention.make_cell(cell, toy=self._toy)
        sides = attention.other_sides(cell, q, data, self._effort)
        checkout, function = os.environ.get("HSHARE_PUBLISHED"), os.environ.get("HSHARE_PUBLISHED_FUNCTION")
        if checkout and function:
            published = attention.load_published(Path(checkout), function)
            sides.append(attention.published_side(published, cell, q, data, self._effort))
        yield from attention.measure(sides, cell)
        if not (checkout and function):
            yield {
                "side": attention.PUBLISHED,
                "note": "left out: HSHARE_PUBLISHED and HSHARE_PUBLISHED_FUNCTION name no checkout and kernel",
            }

    def _tune(self, kernel: str, cell: attention.Cell) -> Iterator[Row]:
        if lack := attention.lacks_memory(cell):
            yield {"error": lack}
            return
        q, data = attention.make_cell(cell, toy=self._toy)
        effort = timing.TOY if self._toy else timing.QUICK
        make = functools.partial(tune_kernels.chain_of, kernel, cell)
        most = 1 if self._toy else None
        try:
            found = tune_kernels.tune_nearby(kernel, cell, lambda tiles: make(tiles, q, data, effort, self._impl), most)
            told, is_right = tune_kernels.check_layout(kernel, cell, found["best_tiles"], q, data, self._impl)
        except timing.FAILURES as error:
            yield {"error": timing.reason(error)}
            return
        size = {
            "attention": cell.attention_bytes(sum(cell.counts), cell.counts[1]),
            "dense": cell.attention_bytes(cell.S),
            "selection": cell.label_bytes + data[0].lists.nbytes,
        }[kernel]
        now = {"side": f"{kernel} now", "bytes": size, "note": found["now"]}
        yield now | ({"error": "cannot run"} if found["now_seconds"] is None else {"seconds": found["now_seconds"]})
        # Beside the rows of our other sides, for the table of targets.
        sides = {
            "attention": "ours sparse, best tiles",
            "dense": "ours dense, best tiles",
            "selection": "selection best",
        }
        best = {"unit": cell.name, "side": sides[kernel], "bytes": size}
        if is_right:
            yield best | {"seconds": found["best_seconds"], "note": f"{found['best']}, {told}"}
        else:
            yield best | {"error": f"{found['best']} computes something else: {told}"}
        yield {"side": f"{kernel} layouts", "note": f"{found['failed']} cannot run", "layouts": found["seconds"]}

    def _select(self, size: selection.Size) -> Iterator[Row]:
        data = selection.make_size(size, self._effort, toy=self._toy)
        if isinstance(data, str):
            yield {"error": data}
            return
        yield from _noted(selection.measure(selection.our_sides(size, data, self._effort, self._impl), size))

    def _select_otherwise(self, size: selection.Size) -> Iterator[Row]:
        data = selection.make_size(size, self._effort, toy=self._toy)
        if isinstance(data, str):
            yield {"error": data}
            return
        yield from _noted(selection.measure(selection.their_sides(size, data, self._effort), size))

    # --- whole models

    def _decode(self) -> Iterator[Unit]:
        """Whole decode steps, dense and sparse; the programs of several sizes of a model are compiled together."""
        models = {"toy": generate.TOY} if self._toy else timing.MODELS
        groups = (((256, 1),),) if self._toy else (DECODE[:FIRST], DECODE[FIRST:])
        for sizes, (name, config) in itertools.product(groups, models.items()):
            config = generate.with_positions(config, max(context for context, _ in sizes))
            steps: dict[tuple[int, int], dict[str, generate.Steps]] = {}
            for size in sizes:
                count = 2 if self._toy else DECODE_STEPS
                steps[size] = generate.steps_of_size(config, size, steps=count, impl=self._impl)
            unit = f"compile {name} {', '.join(map(_batch_name, sizes))}"
            yield unit, functools.partial(self._compile_steps, config, list(steps.values()))
            for size in sizes:
                yield f"{name} {_batch_name(size)}", functools.partial(self._decode_size, config, size, steps[size])

    def _compile_steps(self, config: ModelConfig, steps: list[dict[str, generate.Steps]]) -> Iterator[Row]:
        began = time.perf_counter()
        jax.block_until_ready(self._params(config))
        made = time.perf_counter()
        count = generate.compile_programs(each for of_size in steps for each in of_size.values())
        took = time.perf_counter() - made
        yield {"note": f"weights made in {made - began:.1f} s, {count} programs compiled in {took:.1f} s"}

    def _decode_size(
        self, config: ModelConfig, size: tuple[int, int], steps: dict[str, generate.Steps]
    ) -> Iterator[Row]:
        params, dense, repeats = self._params(config), None, 1 if self._toy else DECODE_REPEATS
        assert self._lines.bandwidth is not None
        for side, timed in steps.items():
            row: Row = {"side": side} | generate.measure_side(timed, params, repeats, self._lines.bandwidth)
            if "seconds" in row:
                dense = row["seconds"] if side == "dense" else dense
                ratio = "" if dense is None else f", dense / this {dense / row['seconds']:.2f}"
                row["note"] = f"{size[1] / row['seconds']:.1f} tokens/s, {row['reads']:.0f} tokens read{ratio}"
            yield row

    def _prefill(self) -> Iterator[Unit]:
        """Prefill attention of one layer, and prefill by a whole model."""
        tokens = (512,) if self._toy else (4096, 32_768)
        config = generate.with_positions(generate.TOY if self._toy else timing.LLAMA3_8B, max(tokens))
        for count in tokens:
            yield f"attention {_k(count)}", functools.partial(self._prefill_attention, config, count)
        for count, method in itertools.product(tokens, (None, generate.sides(4096)["HShare 1/2-1-1"])):
            side = "dense" if method is None else "HShare"
            yield f"model {_k(count)} {side}", functools.partial(self._prefill_model, config, count, method)

    def _prefill_attention(self, config: ModelConfig, tokens: int) -> Iterator[Row]:
        effort = self._effort if self._toy or tokens <= prefill.LONG_PROMPT else LONG
        for row in prefill.measure_attention(config, tokens, effort):
            yield row | _rate(row)

    def _prefill_model(self, config: ModelConfig, tokens: int, method: HShare | None) -> Iterator[Row]:
        row = prefill.measure_model(config, self._params(config), tokens, method)
        yield row | _rate(row)

    def _generate(self) -> Iterator[Unit]:
        """LLaMA3-8B's shape end to end."""
        name = "toy" if self._toy else "LLaMA3-8B"
        sizes = ((128, 2),) if self._toy else ((4096, 8), (4096, 16), (16_384, 8))
        longest = max(context for context, _ in sizes) + 2 * NEW_TOKENS
        config = generate.with_positions(generate.TOY if self._toy else timing.LLAMA3_8B, longest)
        for size in sizes:
            for side, method in list(generate.sides(size[0]).items())[:2]:
                unit = f"generate {name} {_batch_name(size)} {side}"
                yield unit, functools.partial(self._generate_size, config, size, method)

    def _generate_size(self, config: ModelConfig, size: tuple[int, int], method: HShare | None) -> Iterator[Row]:
        params = self._params(config)
        if lack := timing.lacks_memory(1.1 * generate.state_bytes(config, size, method)):
            yield {"error": lack}
            return
        new_tokens = 4 if self._toy else NEW_TOKENS
        try:
            found = generate.end_to_end(config, params, size, method, new_tokens)
        except timing.FAILURES as error:
            yield {"error": timing.reason(error)}
            return
        for side, row in found.items():
            yield {"side": side, "note": f"{row['tokens_per_second']:.1f} tokens/s"} | row


def _noted(rows: Iterable[Row]) -> Iterator[Row]:
    for row in rows:
        yield row | ({"note": f"{row['differing']} rows differ from lax.top_k"} if "differing" in row else {})


def _rate(row: Row) -> Row:
    if "seconds" not in row:
        return {}
    seconds = row["seconds"]
    return {"note": f"{row['operations'] / seconds / 1e12:.1f} TFLOP/s, {row['tokens'] / seconds:.0f} tokens/s"}


def _k(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def _batch_name(size: tuple[int, int]) -> str:
    context, batch = size
    return f"b{batch} {_k(context)}"


def _size_name(size: selection.Size) -> str:
    (B, J), num_slots, k = size
    return f"selection {B}x{J} {_k(num_slots)} k={k}"


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return timing.reason(error)


@dataclasses.dataclass(frozen=True)
class State:
    """The file in which the worker says which unit it is at."""

    path: Path

    def begin(self, step: str, unit: str) -> None:
        """A unit begins."""
        self._write({"event": "begin", "step": step, "unit": unit, "time": time.time()})

    def end(self) -> None:
        """The unit has ended."""
        self._write({"event": "end"})

    def _write(self, event: dict) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")


def run_steps(measurements: Measurements, lines: Lines, state: State, ends: dict[str, float]) -> None:
    """Runs all units that were not begun before; those for which no time is left say so."""
    begun = {(unit["step"], unit["unit"]): unit["failed"] for unit in read_state(state.path)}
    parent = os.getppid()
    for step in STEPS:
        if begun.get((step.name, ALL_UNITS)):
            continue  # they could not even be listed
        state.begin(step.name, ALL_UNITS)
        units = list(measurements.steps[step.name]())
        state.end()
        for name, run in units:
            if (step.name, name) in begun:
                continue
            if os.getppid() != parent:
                sys.exit("the process that watches this one is gone")
            state.begin(step.name, name)
            if time.time() > ends[step.name]:
                lines.add(step.name, name, {"note": "left out: the step's time was over"})
                state.end()
                continue
            print(f"{time.strftime('%H:%M:%S')} {step.name}: {name}", flush=True)
            failed = False
            for row in run():
                lines.add(step.name, name, row)
                failed = failed or "error" in row
            state.end()
            if failed:
                check_device()


def check_device() -> None:
    """Ends the process if the device computes nothing any more, as after an illegal memory access."""
    try:
        assert float(jnp.ones((8,)).sum()) == 8
    except RuntimeError as error:
        print(f"the device is broken: {timing.reason(error)}", flush=True)
        sys.exit(BROKEN_DEVICE)


def main() -> None:
    """Runs the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--state", type=Path, required=True, help="file of the units that were begun")
    parser.add_argument("--ends", type=json.loads, required=True, help="JSON: when each step's time is over")
    parser.add_argument("--command", required=True, help="the command that results name")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    device = jax.devices()[0]
    if not options.toy and device.platform not in ("gpu", "cuda"):
        sys.exit(f"jax's device is {device.device_kind}; without a GPU use --toy")
    made = {
        "device": device.device_kind, "versions": _versions(), "command": options.command, "date": str(date.today()),
    }  # fmt: skip
    options.state.with_suffix(".made").write_text(json.dumps(made))
    lines = Lines(options.out, made)
    for row in read_rows(options.out):  # a worker before this one may have measured it
        if row.get("side") == "copy":
            lines.bandwidth = row["bytes"] / row["seconds"]
    if lines.bandwidth is None and read_state(options.state):
        lines.bandwidth = timing.copy_bandwidth(timing.TOY if options.toy else timing.QUICK)
    run_steps(Measurements(lines, options.out, toy=options.toy), lines, State(options.state), options.ends)


if __name__ == "__main__":
    main()
