"""Compiles the Triton kernels for an H200 without one, and fails where one spills a register or a cache is copied.

The kernels go through jax-triton as they would on a GPU. Then ptxas, which comes with Triton, assembles the PTX of each
kernel for sm_90a and tells what it needs. Nothing runs and nothing is timed. Run scripts/check_triton.sh, which brings
the packages. With --if-installed, as scripts/check_h200_compile.sh calls it, missing packages are told and no failure.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hshare_jax.kernels import api, triton_library
from hshare_jax.kernels.int8_rows import quantise_rows
from hshare_jax.kernels.labels import make_labels
from hshare_jax.kernels.tail import no_tail
from hshare_jax.mesh import Layout
from scripts.check_h200_compile import (
    CHUNK,
    HSHARE,
    LLAMA2,
    LLAMA3,
    PREFILL_ATTENTION,
    STEPS,
    compile_prefill,
    compile_prefill_attention,
    compile_step,
)
from scripts.compiled_programs import Program, compile_program, one_device, place

DUMP = tempfile.TemporaryDirectory()
os.environ["JAX_TRITON_DUMP_DIR"] = DUMP.name  # jax-triton reads it when it is imported, with the first kernel
PTXAS = Path(sysconfig.get_paths()["purelib"], "triton", "backends", "nvidia", "bin", "ptxas")
SHARED_MEMORY = 232_448  # bytes that a program may have on an H200
ARCHITECTURE = "sm_90a"


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a layer's attention and selection."""

    B: int
    N: int
    K: int
    J: int
    H: int
    S: int
    dtype: str = "bfloat16"
    is_int8: bool = False
    window: int | None = None
    bits: int | None = 4
    dilate: bool = True
    C: int = 432


CASES = {
    "LLaMA2-7B, batch 32": Case(32, 32, 32, 32, 128, 4096),  # one program reads a whole list
    "LLaMA2-7B": Case(8, 32, 32, 32, 128, 4096),
    "LLaMA3-8B": Case(8, 32, 8, 8, 128, 4096),  # lists are split
    "LLaMA3-8B, a list per query head, window": Case(8, 32, 8, 32, 128, 4096, window=1000),
    "LLaMA3-8B, batch 1, 128k": Case(1, 32, 8, 8, 128, 131_072),  # lists are chosen in chunks
    "LLaMA3-8B, batch 1, 128k, 4096 critical": Case(1, 32, 8, 8, 128, 131_072, C=4096),  # the best in several blocks
    "LLaMA3-8B, int8 cache, 8-bit labels": Case(8, 32, 8, 8, 128, 4096, is_int8=True, bits=8),
    "LLaMA3-8B, float16, int8 cache": Case(8, 32, 8, 8, 128, 4096, dtype="float16", is_int8=True),
    "LLaMA3-8B, float32, labels not quantised": Case(8, 32, 8, 8, 128, 4096, dtype="float32", bits=None),
    "LLaMA3-8B, float32, int8 cache": Case(8, 32, 8, 8, 128, 4096, dtype="float32", is_int8=True),
    "14/2 heads of 80": Case(4, 14, 2, 2, 80, 4096),
    "8/4 heads of 256": Case(4, 8, 4, 4, 256, 4096, dtype="float16"),
}
OPERATIONS = ("dense", "sparse", "sparse with a tail", "split", "select by labels", "select by keys")


def compile_operation(case: Case, operation: str) -> Program:
    """Compiles one of OPERATIONS for one layer."""
    shape, dtype, settings = jax.ShapeDtypeStruct, jnp.dtype(case.dtype), HSHARE.settings
    B, N, K, J, H, S, C, layers = case.B, case.N, case.K, case.J, case.H, case.S, case.C, 32
    q, rows, numbers = shape((B, N, H), dtype), shape((B, K, S, H), dtype), shape((B,), jnp.int32)
    if case.is_int8:
        rows = jax.eval_shape(quantise_rows, rows)
    lists, source = shape((layers, B, J, C), jnp.int32), shape((B, layers, J), jnp.int32)
    ranges = {"num_sinks": settings.num_sinks, "window": case.window, "impl": "triton"}
    sparse = functools.partial(api.sparse_decode, layer=3, max_recent=settings.num_recent, **ranges)
    choice = {"dilate": case.dilate, "impl": "triton"}
    named = {"lists": lists, "source": source, "lengths": numbers, "recent_start": numbers}
    attended = {"q": q, "keys": rows, "values": rows}
    chosen = {"lists": lists, "source": source, "is_due": shape((B,), jnp.bool_), "first": numbers, "last": numbers}
    chosen["num_allowed"] = numbers
    match operation:
        case "dense":
            function = functools.partial(api.dense_decode, window=case.window, impl="triton")
            arrays = attended | {"lengths": numbers}
        case "sparse":
            function, arrays = sparse, attended | named
        case "sparse with a tail":
            function = sparse
            arrays = attended | named | {"tail": jax.eval_shape(lambda: no_tail(B, N, H, 2, dtype))}
        case "split":
            function = functools.partial(api.split_decode, **ranges)
            arrays = attended | {"listed": shape((B, J, C), jnp.int32), "lengths": numbers, "recent_start": numbers}
        case "select by labels":
            channels = shape((B, K, H // 4), jnp.int32)
            keys = shape((B, K, S, H), dtype)
            labels = jax.eval_shape(functools.partial(make_labels, bits=case.bits), keys, channels)
            function = functools.partial(api.select_by_labels, layer=3, **choice)
            arrays = chosen | {"query": shape((B, N, H // 4), jnp.float32), "labels": labels}
        case _:
            function = functools.partial(api.select_by_keys, layer=3, **choice)
            arrays = chosen | {"q": q, "keys": rows}

    changed, others = ({"lists": arrays.pop("lists")}, arrays) if "select" in operation else ({}, arrays)
    mesh = one_device()
    takes = [Layout(PartitionSpec())] * len(jax.tree.leaves((changed, others)))
    arguments = place((changed, others), takes, mesh)
    return compile_program(lambda a, b: function(**a, **b), arguments, mesh, donated=(0,), large=B * S)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas and Triton say of a kernel."""

    name: str
    registers: int
    spilled: int  # bytes
    shared: int  # bytes


def assemble(folder: Path) -> Kernel:
    """The kernel that jax-triton left in a folder, assembled for an H200."""
    (ptx,) = folder.glob("*.ptx")
    command = [str(PTXAS), "-v", f"-arch={ARCHITECTURE}", str(ptx), "-o", os.devnull]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,), spills = re.findall(r"Used (\d+) registers", told), re.findall(r"(\d+) bytes spill", told)
    (shared,) = re.findall(r"shared_mem_bytes: (\d+)", ptx.with_suffix(".compile_info").read_text(encoding="utf-8"))
    assert len(spills) == 2, told  # stores and loads
    return Kernel(ptx.stem, int(registers), sum(map(int, spills)), int(shared))


def compile_all() -> Iterator[tuple[str, str, Program]]:
    """(sizes, what, program) of every program."""
    for name, case in CASES.items():
        for operation in OPERATIONS:
            yield name, operation, compile_operation(case, operation)
    for (N, K, H), *sizes in PREFILL_ATTENTION:
        T, slots, window, dtype, has_int8_cache = sizes
        program = compile_prefill_attention((N, K, H), *sizes, impl="triton")
        name = f"{N}/{K} heads of {H}, {jnp.dtype(dtype)}, window {window}{', int8 cache' * has_int8_cache}"
        yield name, f"prefill attention of {T} tokens over {slots} slots", program
    for name, config in (("LLaMA2-7B", LLAMA2), ("LLaMA3-8B", LLAMA3)):
        yield f"{name}, four layers", f"prefill of {CHUNK} tokens", compile_prefill(config, 8, 4096, impl="triton")
        for step, (method, refresh) in STEPS.items():
            program = compile_step(config, method, refresh, 8, 4096, "auto", impl="triton")
            yield f"{name}, four layers", step, program


def main() -> int:
    """Compiles every program and returns 1 if a kernel spills, needs too much memory, or a program copies a cache."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jax-triton", "triton"))
    print(f"{versions}; kernels in Triton for {ARCHITECTURE}\n")
    columns = ("sizes", "program", "launches", "of Triton", "copies", "Triton kernels: registers, shared memory")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    failures, known, count = [], set(), 0
    for name, what, program in compile_all():
        new = sorted(set(Path(DUMP.name).iterdir()) - known)
        known |= set(new)
        kernels = [assemble(folder) for folder in new]
        count += len(kernels)
        told = "; ".join(f"{kernel.name}: {kernel.registers}, {kernel.shared / 1024:.1f} KiB" for kernel in kernels)
        copies, calls = len(program.copies), program.operations["custom-call"]
        print(f"| {name} | {what} | {program.num_kernels} | {calls} | {copies} | {told or 'as above'} |", flush=True)
        failures += [
            f"{name}, {what}: {kernel}" for kernel in kernels if kernel.spilled or kernel.shared > SHARED_MEMORY
        ]
        failures += [f"{name}, {what}: copies {program.copies}"] if program.copies else []
        if not calls:
            failures.append(f"{name}, {what}: holds no Triton kernel")
    print("\n".join(["", *failures]) if failures else f"\n{count} kernels; none spills a register, nothing is copied")
    return 1 if failures else 0


if __name__ == "__main__":
    if obstacle := triton_library.obstacle():
        print(
            f"\nNOT CHECKED: the Triton kernels, which {obstacle}. They need Python 3.12 or newer and the extra "
            "`triton`. scripts/check_triton.sh brings both into an environment of its own.",
            flush=True,
        )
        sys.exit("--if-installed" not in sys.argv)
    sys.exit(main())
