"""Times jitted steps on a GPU honestly, for the scripts beside it: seconds a call, copy bandwidth, and what they share.

Many calls are unrolled in one program, each on data of its own, until these are several times the second-level cache;
programs follow one another without waiting. So a call meets cold data, as within a model, and launches cost what they
do in a captured graph. Nothing is subtracted.
"""

import dataclasses
import functools
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.files.atomic import whole_file
from hshare_jax.models.config import ModelConfig, RopeConfig

COLD_BYTES = 200 * 10**6  # of all data sets together: an H200's second-level cache holds 50 MB
FAILURES = (ValueError, NotImplementedError, RuntimeError)  # of a side that cannot run; RuntimeError: XLA, cuDNN, torch
LLAMA3_8B = ModelConfig(
    vocab_size=128_256, width=4096, mlp_width=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_positions=8192, windows=(None,) * 32, rope=RopeConfig(theta=500_000.0),
)  # fmt: skip
LLAMA2_7B = dataclasses.replace(
    LLAMA3_8B, vocab_size=32_000, mlp_width=11_008, num_kv_heads=32, rope=RopeConfig(theta=10_000.0)
)
MODELS = {"LLaMA2-7B": LLAMA2_7B, "LLaMA3-8B": LLAMA3_8B}


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long a measurement goes on."""

    min_calls: int = 16  # in one program
    min_seconds: float = 0.02  # of one sample, by as many programs as that takes, at most 32
    samples: int = 11  # of which the median counts
    copy_bytes: int = 2**31  # of the buffer that bandwidth is measured on


FULL = Effort()
QUICK = Effort(min_calls=8, min_seconds=0.005, samples=5)
TOY = Effort(min_calls=2, min_seconds=0, samples=2, copy_bytes=2**24)


def seconds_per_call(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, data: Sequence[Any], effort: Effort = FULL
) -> float:
    """Returns the median seconds of `carry, kept = step(carry, item)`, item after item, several times over.

    Args:
        step: traced. Its next carry, of the same shape, must depend on all of its work, so that calls form a chain in
            which nothing is hoisted or dead. Work that cannot be chained is returned as `kept` (then the data must be
            at least `min_calls` sets, since equal calls would be merged); else None.
        carry: what the first call is given; it stays as it is.
        data: one pytree of arrays a call.
        effort: how long.
    """
    rounds = -(-effort.min_calls // len(data))

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry: Any, data: Sequence[Any]) -> tuple[Any, list[Any]]:
        kept = []
        for item in [item for _ in range(rounds) for item in data]:
            carry, keep = step(carry, item)
            kept.append(keep)
        return carry, kept

    def run(carry: Any, programs: int) -> tuple[Any, float]:
        began, kept = time.perf_counter(), None
        for _ in range(programs):
            carry, kept = program(carry, data)
        jax.block_until_ready((carry, kept))
        return carry, time.perf_counter() - began

    carry, _ = run(jax.tree.map(jnp.copy, carry), 1)  # compiles
    carry, _ = run(carry, 1)  # a command buffer is recorded on the first runs
    carry, once = run(carry, 1)
    programs = max(1, min(32, round(effort.min_seconds / once)))
    times = []
    for _ in range(effort.samples):
        carry, seconds = run(carry, programs)
        times.append(seconds)
    return statistics.median(times) / (programs * rounds * len(data))


def torch_seconds_per_call(
    call: Callable[..., object], data: Sequence[tuple[Array, ...]], effort: Effort = FULL
) -> float:
    """Returns the median seconds of `call(*tensors)` for torch tensors that are these very arrays, as one CUDA graph.

    Raises:
        RuntimeError: no torch here, or none with CUDA.
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
    """Returns bytes per second, read and written, of x + 1 over a large buffer."""
    x = jnp.zeros((effort.copy_bytes // 4,), jnp.float32)
    # A single program of several would be fused into x + n.
    add = jax.jit(lambda x: x + 1)
    times = []
    for _ in range(effort.samples + 1):
        began = time.perf_counter()
        for _ in range(8):
            x = add(x)
        x.block_until_ready()
        times.append((time.perf_counter() - began) / 8)
    return 2 * x.nbytes / statistics.median(times[1:])


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "scale"))
def random_array(seed: int | Array, *, shape: tuple[int, ...], dtype: jnp.dtype, scale: float = 1) -> Array:
    """Returns random bits of an unsigned dtype, zeros of a signed one, or normal numbers * scale; on the device."""
    key = jax.random.key(seed, impl="rbg")
    if jnp.issubdtype(dtype, jnp.signedinteger):
        return jnp.zeros(shape, dtype)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return jax.random.bits(key, shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def num_data_sets(touched: float) -> int:
    """Returns how many data sets are needed where a call touches so many bytes of one."""
    return max(2, -(-COLD_BYTES // max(int(touched), 1)))


def lacks_memory(needed: float) -> str | None:
    """Returns the reason why so many bytes do not fit beside what is there; None where they do or nobody knows."""
    stats = jax.devices()[0].memory_stats()
    if stats is None or "bytes_limit" not in stats:
        return None
    free = stats["bytes_limit"] - stats["bytes_in_use"]
    return None if needed <= free else f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def reason(error: Exception) -> str:
    """Returns an error's name and first line, fit for a table's cell."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")


def heading() -> str:
    """Returns date, device, versions and the command line."""
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    return f"{date.today()}, {jax.devices()[0].device_kind}, {versions}\n\n    {command()}\n"


def command() -> str:
    """The command that this process was started with."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_json(path: Path, rows: list[dict]) -> None:
    """Writes the rows; a reader never sees half of them."""
    with whole_file(path) as draft:
        draft.write_text(json.dumps(rows, indent=1) + "\n")
