"""Compiles decode steps, prefills and their attention for an H200 without one, and fails beyond exact limits.

The limits are: no copy of a cache, of a buffer of labels or lists, or of a weight; no conditional or loop, which would
break up the CUDA graph; no more kernels and temporaries than written below; no kernel that spills a register. Run
scripts/check_h200_compile.sh, which brings the CUDA compiler's wheels. Nothing is timed.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import api
from hshare_jax.kernels.int8_rows import KVCacheDType, quantise_rows
from hshare_jax.kernels.tail import no_tail
from hshare_jax.mesh import Layout
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.kv_sharing import share_kv
from hshare_jax.prefill import CHUNKS, prefill
from scripts.bench.gpu_timing import LLAMA2_7B, LLAMA3_8B
from scripts.compiled_programs import Program, compile_program, one_device, place, step_arguments


def first_layers(config: ModelConfig, **changes: object) -> ModelConfig:
    """The first four layers of a model. Further layers add the same kernels, and time to compile."""
    return dataclasses.replace(config, num_layers=4, windows=(None,) * 4, **changes)


LLAMA2, LLAMA3 = first_layers(LLAMA2_7B), first_layers(LLAMA3_8B)
LONG = first_layers(LLAMA3_8B, max_positions=131_072)
SHARED_KV = share_kv(LLAMA3, "sandwich-top:3")  # layer 1 looks up: it reads the cache of a later layer
# name: (model, batch, slots, dtype of the cache)
MODELS: dict[str, tuple[ModelConfig, int, int, KVCacheDType]] = {
    "LLaMA2-7B": (LLAMA2, 8, 4096, "auto"),
    "LLaMA3-8B": (LLAMA3, 8, 4096, "auto"),
    "LLaMA3-8B, batch 1, 128k": (LONG, 1, 131_072, "auto"),  # lists chosen in chunks
    "LLaMA3-8B, 3 KV layers": (SHARED_KV, 8, 4096, "auto"),
    "LLaMA3-8B, int8 cache": (LLAMA3, 8, 4096, "int8"),
}
HSHARE = HShare(HShareSettings(num_sinks=16, num_critical=432, num_recent=64, min_length=0))
STEPS = {"dense": (None, None)} | {f"hshare, refresh={refresh}": (HSHARE, refresh) for refresh in (True, False, None)}
# The most kernels of a whole step and the most MiB of temporaries, for each model in the order of STEPS, counted with
# jax 0.10.2. A commit that changes a step changes these numbers too, and says why.
LIMITS = {
    "LLaMA2-7B": ((65, 2), (85, 2), (73, 6.5), (85, 2)),
    "LLaMA3-8B": ((65, 2.1), (93, 2.1), (73, 2.7), (93, 2.1)),
    "LLaMA3-8B, batch 1, 128k": ((73, 1.1), (107, 1.1), (83, 1.1), (107, 1.1)),
    "LLaMA3-8B, int8 cache": ((81, 2.1), (105, 2.1), (89, 2.7), (105, 2.1)),
    "LLaMA3-8B, 3 KV layers": ((62, 2.1), (88, 2.1), (69, 2.1), (88, 2.1)),
}
# The same limits for the sparse attention of one layer. They hold without a tail and with one, because a tail is no
# further kernel. name: ((model, batch, slots), limits)
ATTENTION = {
    "LLaMA2-7B, batch 32": ((LLAMA2_7B, 32, 4096), (2, 0.1)),  # one program reads a whole list
    "LLaMA3-8B": ((LLAMA3_8B, 8, 4096), (3, 0.6)),  # lists are split
}
# The same limits for a prefill of so many tokens that it is one chunk.
CHUNK = CHUNKS[-1]
PREFILLS = {
    "LLaMA3-8B": ((LLAMA3, 8, 4096), (54, 435)),
    "LLaMA3-8B, batch 1, 128k": ((LONG, 1, 131_072), (55, 55)),
}
# And for the attention of one layer in a prefill, with what each slot receives: (query heads, kv heads, head size),
# tokens, slots, window, dtype, whether the cache has 8 bits
PREFILL_ATTENTION = [
    ((32, 8, 128), CHUNK, 131_072, None, jnp.bfloat16, False),
    ((32, 8, 128), CHUNK, 4096, 1000, jnp.float32, False),
    ((14, 2, 64), CHUNKS[0], 4096, None, jnp.float16, False),
    ((8, 4, 256), CHUNK, 4096, 1000, jnp.bfloat16, False),
    ((8, 4, 80), CHUNKS[0], 4096, None, jnp.float32, False),
    ((32, 8, 128), CHUNK, 131_072, None, jnp.bfloat16, True),
    ((14, 2, 64), CHUNKS[0], 4096, None, jnp.float16, True),
    ((8, 4, 80), CHUNKS[0], 4096, 1000, jnp.float32, True),
]
TAIL_RANKS = {"attention": None, "attention with a tail": 2}


def compile_step(
    config: ModelConfig, method: Method | None, refresh: bool | None, batch: int, slots: int, cache: KVCacheDType,
    *, impl: str = "auto",
) -> Program:  # fmt: skip
    """Compiles a bfloat16 decode step by this implementation, to which the state is donated."""
    mesh = one_device()
    arguments = step_arguments(config, method, batch, slots, mesh, spread=False, kv_cache_dtype=cache)
    step = functools.partial(decode_step, config=config, refresh=refresh, impl=impl)
    return compile_program(step, arguments, mesh, donated=(2,), large=batch * slots)


def compile_attention(config: ModelConfig, rank: int | None, batch: int, slots: int) -> Program:
    """Compiles the sparse attention of one layer in bfloat16, with a tail of this rank unless it is None."""
    L, N, K, H = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    settings, dtype = HSHARE.settings, jnp.dtype(jnp.bfloat16)
    tail = None if rank is None else jax.eval_shape(lambda: no_tail(batch, N, H, rank, dtype))
    shapes = [(batch, N, H), (batch, K, slots, H), (batch, K, slots, H)]
    shapes += [(L, batch, K, settings.num_critical), (batch, L, K), (batch,), (batch,)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype if i < 3 else jnp.int32) for i, shape in enumerate(shapes)]

    def attend(q, keys, values, lists, source, lengths, recent_start, tail):
        return api.sparse_decode(
            q, keys, values, lists, source, 0, lengths, recent_start,
            num_sinks=settings.num_sinks, max_recent=settings.num_recent, tail=tail,
        )  # fmt: skip

    mesh = one_device()
    whole = [Layout(PartitionSpec())] * len(jax.tree.leaves((arrays, tail)))
    arguments = place((*arrays, tail), whole, mesh)
    return compile_program(attend, arguments, mesh, donated=(), large=batch * slots)


def compile_prefill(config: ModelConfig, batch: int, slots: int, *, impl: str = "auto") -> Program:
    """Compiles the prefill of one chunk in bfloat16 by this implementation, to which the state is donated."""
    mesh = one_device()
    params, _, state = step_arguments(config, None, batch, slots, mesh, spread=False)
    shapes = jax.ShapeDtypeStruct((batch, CHUNK), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens, lengths = place(shapes, ("B T", "B"), mesh)
    read = functools.partial(prefill, config=config, impl=impl)
    return compile_program(read, (params, tokens, lengths, state), mesh, donated=(3,), large=batch * slots)


def compile_prefill_attention(
    heads: tuple[int, int, int], T: int, slots: int, window: int | None, dtype, has_int8_cache: bool,
    *, impl: str = "auto",
) -> Program:  # fmt: skip
    """Compiles the attention of one layer and one row in a prefill, with what each slot receives."""
    (N, K, H), mesh, shape = heads, one_device(), jax.ShapeDtypeStruct
    rows = shape((1, K, slots, H), dtype)
    if has_int8_cache:
        rows = jax.eval_shape(quantise_rows, rows)
    arrays = shape((1, T, N, H), dtype), rows, rows, shape((1,), jnp.int32), shape((1, T), jnp.bool_)
    arguments = place(arrays, [Layout(PartitionSpec())] * len(jax.tree.leaves(arrays)), mesh)
    attend = functools.partial(api.prefill_attention_received, window=window, impl=impl)
    return compile_program(attend, arguments, mesh, donated=(), large=slots)


def compile_all() -> Iterator[tuple[str, str, int, Program, tuple[int, float]]]:
    """(model, program's name, number of layers, program, limits) of every program."""
    for name, ((config, batch, slots), limits) in ATTENTION.items():
        for what, rank in TAIL_RANKS.items():
            yield name, what, 1, compile_attention(config, rank, batch, slots), limits
    for name, ((config, *sizes), limits) in PREFILLS.items():
        yield name, f"prefill of {CHUNK} tokens", config.num_layers, compile_prefill(config, *sizes), limits
    for (N, K, H), T, slots, window, dtype, has_int8_cache in PREFILL_ATTENTION:
        program = compile_prefill_attention((N, K, H), T, slots, window, dtype, has_int8_cache)
        name = f"{N}/{K} heads of {H}, {jnp.dtype(dtype)}, window {window}{', int8 cache' * has_int8_cache}"
        yield name, f"prefill attention of {T} tokens over {slots} slots", 1, program, (2, 0.1)
    for name, (config, batch, slots, cache) in MODELS.items():
        for (step, (method, refresh)), limits in zip(STEPS.items(), LIMITS[name], strict=True):
            yield name, step, config.num_layers, compile_step(config, method, refresh, batch, slots, cache), limits


def main() -> int:
    """Compiles every program and returns 1 if any goes beyond a limit."""
    what = f"for an H200; four layers, batch 8 and 4096 slots unless told, budget {HSHARE.settings.budget}"
    print(f"jax {jax.__version__}, bfloat16, {what}\n")
    columns = ("model", "program", "kernels", "a layer", "temporaries", "conditionals and loops", "copies")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    failures = []
    for name, what, num_layers, program, (most_kernels, most_temporaries) in compile_all():
        kernels = program.num_kernels
        broken = sum(program.operations[operation] for operation in ("conditional", "while", "call"))
        print(
            f"| {name} | {what} | {kernels} | {kernels / num_layers:.1f} | {program.temporaries:.1f} MiB "
            f"| {broken} | {len(program.copies)} |",
            flush=True,
        )
        if program.copies or broken or kernels > most_kernels or program.temporaries > most_temporaries:
            failures.append(f"{name}, {what}: copies {program.copies}, operations {dict(program.operations)}")
    print("\n".join(["", *failures]) if failures else "\nwithin all limits; no kernel spills a register")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
