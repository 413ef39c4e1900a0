"""Compiles LLaMA3-70B's decode steps for several devices without one, and fails beyond exact limits.

The limits are: two all-reduces a layer, one for the embedding, one all-gather for the logits, and no other exchange; no
copy of a weight, a cache, or a buffer of labels or lists; a state that changes in place; on GPUs Pallas kernels; no
more kernels, temporaries and bytes than written below. Run scripts/check_many_devices.sh, which brings the compilers.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh

from hshare_jax.decode_step import decode_step
from hshare_jax.device_memory import DeviceMemory, device_memory
from hshare_jax.mesh import make_mesh
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import DATA, MODEL
from scripts.bench.gpu_timing import LLAMA3_8B
from scripts.compiled_programs import Program, compile_program, h200s, step_arguments, tpus

LLAMA3_70B = dataclasses.replace(
    LLAMA3_8B, width=8192, mlp_width=28_672, num_layers=80, num_heads=64, max_positions=131_072, windows=(None,) * 80
)
BATCH, SLOTS = 16, 32_768
HSHARE = HShare(HShareSettings(num_sinks=16, num_critical=432, num_recent=64, min_length=0))
STEPS = {"dense": (None, None)} | {f"hshare, refresh={refresh}": (HSHARE, refresh) for refresh in (True, False)}
# name: (topology, devices along "data", devices along "model")
GPUS = {"8 H200": ("1x1x8", 1, 8), "16 H200 on two hosts": ("2x1x8", 2, 8)}
TPUS = {"8 TPU v6e": ("v6e:2x4", 1, 8), "16 TPU v6e": ("v6e:4x4", 2, 8)}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that a step may need, counted with jax 0.10.2.

    A commit that changes a step changes these numbers too, and says why.
    """

    kernels_of_layer: float | None = None  # None on TPUs, where XLA alone decides on kernels
    kernels_besides: int = 13  # for embedding, logits and what all layers share
    # MiB of temporaries, for each row of a device's batch, or layer, or both
    mib_of_row: float = 0
    mib_of_layer: float = 0
    mib_of_row_and_layer: float = 0

    def kernels(self, num_layers: int) -> float:
        """The most kernels of a step."""
        return math.inf if self.kernels_of_layer is None else self.kernels_of_layer * num_layers + self.kernels_besides

    def temporaries(self, num_layers: int, rows: int) -> float:
        """The most MiB of temporaries, with so many rows on a device."""
        return (self.mib_of_row + self.mib_of_row_and_layer * num_layers) * rows + self.mib_of_layer * num_layers


# For each of STEPS. In a reuse step nothing reads the new labels, so XLA writes them last and keeps the new keys of all
# layers until then.
GPU_LIMITS = (
    Limits(kernels_of_layer=16, mib_of_row=0.3),
    Limits(kernels_of_layer=25, mib_of_row=0.3),
    Limits(kernels_of_layer=18.12, mib_of_row=0.3, mib_of_row_and_layer=0.065),
)
TPU_LIMITS = (Limits(mib_of_layer=2), Limits(mib_of_layer=2.6), Limits(mib_of_layer=2.6))
# The most GB on each device of weights, cache, labels, and lists with tails, for all 80 layers.
MOST_GB = {8: (17.7, 21.5, 0.84, 0.02), 16: (17.7, 10.8, 0.42, 0.01)}
# Numbers below which an argument is small: norms have 8192 for each layer.
SMALL = 10_000


def compile_step(config: ModelConfig, method: Method | None, refresh: bool | None, mesh: Mesh) -> Program:
    """Compiles a bfloat16 decode step, to which the state is donated."""
    arguments = step_arguments(config, method, BATCH, SLOTS, mesh, spread=True)
    step = functools.partial(decode_step, config=config, refresh=refresh)
    return compile_program(step, arguments, mesh, donated=(2,), large=SMALL)


def compile_all(num_layers: int, *, on_tpu: bool) -> Iterator[tuple[str, str, Mesh, Method | None, Program]]:
    """(machine, step, mesh, method, program) of every program."""
    config = dataclasses.replace(LLAMA3_70B, num_layers=num_layers, windows=(None,) * num_layers)
    for machine, (topology, data, model) in (TPUS if on_tpu else GPUS).items():
        mesh = make_mesh(data, model, (tpus if on_tpu else h200s)(topology))
        for step, (method, refresh) in STEPS.items():
            yield machine, step, mesh, method, compile_step(config, method, refresh, mesh)


def find_faults(program: Program, memory: DeviceMemory, num_layers: int, rows: int, limits: Limits) -> list[str]:
    """What a program does beyond the limits.

    Args:
        program: of a step.
        memory: what its arguments should take on a device.
        num_layers: of the model.
        rows: of a device's part of the batch.
        limits: of the step.
    """
    is_gpu = limits.kernels_of_layer is not None
    exchanges = {"all-reduce": 2 * num_layers + 1, "all-gather": 1}
    faults = [f"copies of {shape}" for shape in program.copies]
    if program.collectives != exchanges:
        faults.append(f"exchanges {dict(program.collectives)} instead of {exchanges}")
    if program.num_kernels > (most := limits.kernels(num_layers)):
        faults.append(f"{program.num_kernels} kernels, and {most:.0f} are allowed")
    if is_gpu and program.num_pallas < num_layers:
        faults.append(f"{program.num_pallas} Pallas kernels for {num_layers} layers")
    if program.temporaries > (most := limits.temporaries(num_layers, rows)):
        faults.append(f"{program.temporaries:.1f} MiB of temporaries, and {most:.1f} are allowed")
    # The tokens are arguments too. TPUs pad small arrays to whole tiles.
    slack = 4 * rows if is_gpu else memory.total // 1000
    if not 0 <= program.arguments - memory.total <= slack:
        faults.append(f"{program.arguments} bytes of arguments, and their shapes make {memory.total}")
    if program.in_place < memory.total - memory.weights:
        faults.append(f"{program.in_place} bytes change in place; the state has {memory.total - memory.weights}")
    return faults


def check_bytes() -> list[str]:
    """Prints what a device holds for all layers, and returns what is beyond the limits."""
    fields = [field.name for field in dataclasses.fields(DeviceMemory)]
    print(f"| all {LLAMA3_70B.num_layers} layers | {' | '.join(fields)} | sum |\n{'|---' * (len(fields) + 2)}|")
    faults = []
    for num_devices, limits in MOST_GB.items():
        mesh = AbstractMesh((num_devices // 8, 8), (DATA, MODEL))
        for step, method in (("dense", None), ("hshare", HSHARE)):
            memory = device_memory(LLAMA3_70B, BATCH, SLOTS, method=method, mesh=mesh)
            sizes = [size / 1e9 for size in dataclasses.astuple(memory)]
            told = " | ".join(f"{size:.3f} GB" for size in sizes)
            print(f"| {num_devices} devices, {step} | {told} | {memory.total / 1e9:.3f} GB |")
            faults += [
                f"{num_devices} devices, {step}: {size:.3f} GB of {name}, and {most} are allowed"
                for name, size, most in zip(fields, sizes, limits, strict=True)
                if size > most
            ]
    return faults


def main() -> int:
    """Compiles every program and returns 1 if any goes beyond a limit."""
    parser = argparse.ArgumentParser(prog="check_many_devices", description="See the module.")
    parser.add_argument("--tpu", action="store_true", help="compile for TPU v6e, where plain jnp decodes")
    parser.add_argument("--layers", type=int, default=8, help="compile so many of 80 layers (default: %(default)s)")
    options = parser.parse_args()
    print(
        f"jax {jax.__version__}, LLaMA3-70B, bfloat16, batch {BATCH}, {SLOTS} slots, budget {HSHARE.settings.budget}\n"
    )
    failures = check_bytes()
    columns = ("machine", "step", "kernels", "a layer", "Pallas", "exchanges", "temporaries", "copies", "compiled in")
    print(f"\n| {options.layers} layers: {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    config = dataclasses.replace(LLAMA3_70B, num_layers=options.layers, windows=(None,) * options.layers)
    limits = dict(zip(STEPS, TPU_LIMITS if options.tpu else GPU_LIMITS, strict=True))
    began = time.perf_counter()
    for machine, step, mesh, method, program in compile_all(options.layers, on_tpu=options.tpu):
        exchanges = ", ".join(f"{count} {name}" for name, count in program.collectives.items())
        print(
            f"| {machine} | {step} | {program.num_kernels} | {program.num_kernels / options.layers:.1f} "
            f"| {program.num_pallas} | {exchanges} | {program.temporaries:.1f} MiB | {len(program.copies)} "
            f"| {time.perf_counter() - began:.0f} s |",
            flush=True,
        )
        memory = device_memory(config, BATCH, SLOTS, method=method, mesh=mesh)
        faults = find_faults(program, memory, options.layers, BATCH // mesh.shape[DATA], limits[step])
        if not options.tpu and any(len({device.process_index for device in row}) > 1 for row in mesh.devices):
            faults.append("heads of one row of the batch are divided over hosts")
        failures += [f"{machine}, {step}: {fault}" for fault in faults]
        began = time.perf_counter()
    print("\n".join(["", *failures]) if failures else "\nwithin all limits")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
