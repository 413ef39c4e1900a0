"""Timing of jitted steps on a GPU: seconds a call, copy bandwidth, and the models, limits and tables of the benches.

One program holds many calls, and each call reads other data. All data together are several times as large as the
second-level cache, so every call meets cold data, as within a model. Programs follow one another without waiting, so a
launch costs as little as in a captured graph. No overhead is subtracted.
"""

import dataclasses
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.files.atomic import whole_file
from hshare_jax.models.config import ModelConfig, RopeConfig

COLD_BYTES = 200 * 10**6  # bytes of all data sets together; the second-level cache of an H200 holds 50 MB
# The errors of a side that cannot run; RuntimeError comes from XLA, cuDNN and torch.
FAILURES = (ValueError, NotImplementedError, RuntimeError)
LLAMA3_8B = ModelConfig(
    vocab_size=128_256, width=4096, mlp_width=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_positions=8192, windows=(None,) * 32, rope=RopeConfig(theta=500_000.0),
)  # fmt: skip
LLAMA2_7B = dataclasses.replace(
    LLAMA3_8B, vocab_size=32_000, mlp_width=11_008, num_kv_heads=32, rope=RopeConfig(theta=10_000.0)
)
MODELS = {"LLaMA2-7B": LLAMA2_7B, "LLaMA3-8B": LLAMA3_8B}
BF16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a measurement takes."""

    min_calls: int = 16  # calls in one program
    min_seconds: float = 0.02  # length of one sample; at most 32 programs make up a sample
    samples: int = 11  # their median is the result
    copy_bytes: int = 2**31  # size of the buffer that bandwidth is measured on


FULL = Effort()
QUICK = Effort(min_calls=8, min_seconds=0.005, samples=5)
TOY = Effort(min_calls=2, min_seconds=0, samples=2, copy_bytes=2**24)


class Chain:
    """Many calls of one step in one program: compiled first, perhaps beside others, and timed later.

    A call is `carry, kept = step(carry, item)`. The items of `data` are taken in turn, several times over.

    Args:
        step: traced. The next carry has the carry's shape and must depend on all of the step's work. The calls then
            form a chain, in which XLA can hoist nothing and drop nothing. A step whose work cannot be chained returns
            it as `kept`, and `data` then holds at least `min_calls` items, because XLA merges equal calls. Every other
            step returns None as `kept`.
        carry: the first call's carry; it is copied, not donated.
        data: one pytree of arrays for each call.
        effort: how long to measure.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], tuple[Any, Any]],
        carry: Any,
        data: Sequence[Any],
        effort: Effort = FULL,
    ) -> None:
        self._carry, self._data, self._effort = carry, data, effort
        self._rounds = -(-effort.min_calls // len(data))
        self._compiled: Callable[[Any, Any], tuple[Any, Any]] | None = None

        def program(carry: Any, data: Sequence[Any]) -> tuple[Any, list[Any]]:
            kept = []
            for item in [item for _ in range(self._rounds) for item in data]:
                carry, keep = step(carry, item)
                kept.append(keep)
            return carry, kept

        self._program = jax.jit(program, donate_argnums=0)

    def compile(self) -> None:
        """Compiles the program. Errors come from XLA."""
        if self._compiled is None:
            self._compiled = self._program.lower(self._carry, self._data).compile()

    def seconds(self) -> float:
        """The median seconds of one call."""
        self.compile()
        carry, _ = self._run(jax.tree.map(jnp.copy, self._carry), 1)
        carry, _ = self._run(carry, 1)  # XLA records a command buffer on the first runs
        carry, once = self._run(carry, 1)
        programs = max(1, min(32, round(self._effort.min_seconds / once)))
        times = []
        for _ in range(self._effort.samples):
            carry, seconds = self._run(carry, programs)
            times.append(seconds)
        return statistics.median(times) / (programs * self._rounds * len(self._data))

    def _run(self, carry: Any, programs: int) -> tuple[Any, float]:
        assert self._compiled is not None
        began, kept = time.perf_counter(), None
        for _ in range(programs):
            carry, kept = self._compiled(carry, self._data)
        jax.block_until_ready((carry, kept))
        return carry, time.perf_counter() - began


class Compiles(Protocol):
    """A program that can be compiled before it is timed, as a `Chain` can."""

    def compile(self) -> None:
        """Compiles the program, once."""
        ...


def compile_together(programs: Iterable[Compiles]) -> None:
    """Compiles programs on all cores at once; an error is raised later, when its program is timed."""

    def compile_or_leave(program: Compiles) -> None:
        try:
            program.compile()
        except FAILURES:
            return  # the program compiles again when it is timed, and raises then

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_or_leave, programs))


def seconds_per_call(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Sequence[Any], effort: Effort = FULL
) -> float:
    """The median seconds of one call of a step. See `Chain` for the arguments."""
    return Chain(step, carry, data, effort).seconds()


def torch_seconds_per_call(
    call: Callable[..., object], data: Sequence[tuple[Array, ...]], effort: Effort = FULL
) -> float:
    """The median seconds of `call(*tensors)` in one CUDA graph; the tensors share the arrays' memory.

    Raises:
        RuntimeError: torch is not installed, or has no CUDA.
    """
    try:
        import torch
    except ImportError as error:
        raise RuntimeError("torch is not installed") from error
    if not torch.cuda.is_available():
        raise RuntimeError("torch has no CUDA here")
    tensors = [tuple(torch.from_dlpack(array) for array in jax.block_until_ready(item)) for item in data]
    rounds = -(-effort.min_calls // len(data))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for item in tensors * 2:  # compiles, and allocates what may not be allocated while a graph is captured
            call(*item)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for item in tensors * rounds:
                call(*item)
    times = []
    for _ in range(effort.samples + 1):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e-3)
    return statistics.median(times[1:]) / (rounds * len(data))


def copy_bandwidth(effort: Effort = FULL) -> float:
    """Bytes per second, read and written, of x + 1 over a large buffer."""
    x = jnp.zeros((effort.copy_bytes // 4,), jnp.float32)
    # One call a program: XLA would fuse several into x + n.
    add = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(effort.samples + 1):
        began = time.perf_counter()
        for _ in range(8):
            x = add(x)
        x.block_until_ready()
        times.append((time.perf_counter() - began) / 8)
    return 2 * x.nbytes / statistics.median(times[1:])


def matrix_rate(size: int, effort: Effort = FULL) -> float:
    """Floating-point operations per second of a bfloat16 product of two square random matrices."""
    a, b = (random_array(seed, shape=(size, size), dtype=BF16, scale=size**-0.5) for seed in (1, 2))
    return 2 * size**3 / seconds_per_call(lambda a, b: (a @ b, None), a, [b], effort)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def random_array(seed: int | Array, *, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 1) -> Array:
    """An array made on the device: random bits of an unsigned dtype, zeros of a signed one, else normal * scale."""
    key = jax.random.key(seed, impl="rbg")
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.zeros(shape, dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return jax.random.bits(key, shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def num_data_sets(touched: float) -> int:
    """How many data sets keep the cache cold, where a call touches so many bytes of a set."""
    return max(2, -(-COLD_BYTES // max(int(touched), 1)))


def lacks_memory(needed: float) -> str | None:
    """Why so many more bytes do not fit on the device; None where they fit, or where the device does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats is None or "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return None if needed <= free else f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def reason(error: Exception) -> str:
    """An error's name and first line, fit for a cell of a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")


def heading() -> str:
    """Date, device, versions and the command line."""
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{date.today()}, {jax.devices()[0].device_kind}, {versions}\n\n    {command()}\n"


def command() -> str:
    """The command that started this process."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_json(path: Path, rows: list[dict]) -> None:
    """Writes the rows. A reader never sees half a file."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(rows, indent=1) + "\n")
