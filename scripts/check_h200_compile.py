"""Compiles whole decode steps, and attention with a tail, for an H200 without one, and fails beyond exact limits.

The limits are: no copy of a cache, of a buffer of labels or lists, or of a weight; no conditional or loop, which would
break up the CUDA graph; no more kernels and temporaries than written below; no kernel that spills a register. Run
scripts/check_h200_compile.sh, which brings the CUDA compiler's wheels. Nothing is timed. Autotuning, cuDNN and CUB
cannot run without a GPU.
"""

import collections
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import jax
import jax.numpy as jnp
import jax_plugins.xla_cuda13  # noqa: F401  # pyright: ignore[reportMissingImports]  (the import registers it)
from jax.experimental import topologies

from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels import api
from hshare_jax.kernels.tail import no_tail
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.models.kv_sharing import share_kv
from scripts.bench.gpu_timing import LLAMA2_7B, LLAMA3_8B

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4915200000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
LONG = dataclasses.replace(LLAMA3_8B, num_layers=4, max_positions=131_072, windows=(None,) * 4)
FOUR_LAYERS = dataclasses.replace(LLAMA3_8B, num_layers=4, windows=(None,) * 4)
SHARED_KV = share_kv(FOUR_LAYERS, "sandwich-top:3")  # layer 1 looks up: it reads the cache of a later layer
# name: (model, batch, slots)
MODELS = {
    "LLaMA2-7B": (LLAMA2_7B, 8, 4096),
    "LLaMA3-8B": (LLAMA3_8B, 8, 4096),
    "LLaMA3-8B, 4 layers, batch 1, 128k": (LONG, 1, 131_072),  # lists chosen in chunks
    "LLaMA3-8B, 4 layers, 3 KV layers": (SHARED_KV, 8, 4096),
}
HSHARE = HShare(HShareSettings(num_sinks=16, num_critical=432, num_recent=64, min_length=0))
STEPS = {"dense": (None, None)} | {f"hshare, refresh={refresh}": (HSHARE, refresh) for refresh in (True, False, None)}
# The most kernels of a whole step and the most MiB of temporaries, for each model in the order of STEPS, counted with
# jax 0.10.2. A commit that changes a step changes these numbers too, and says why.
LIMITS = {
    "LLaMA2-7B": ((457, 2), (617, 2), (524, 41), (617, 2)),
    "LLaMA3-8B": ((457, 2.1), (681, 2.1), (524, 11), (681, 2.1)),
    "LLaMA3-8B, 4 layers, batch 1, 128k": ((73, 1.1), (107, 1.1), (83, 1.1), (107, 1.1)),
    "LLaMA3-8B, 4 layers, 3 KV layers": ((63, 2.1), (88, 2.1), (69, 2.1), (88, 2.1)),
}
# The same limits for the sparse attention of one layer. They hold without a tail and with one, because a tail is no
# further kernel. name: ((model, batch, slots), limits)
ATTENTION = {
    "LLaMA2-7B, batch 32": ((LLAMA2_7B, 32, 4096), (2, 0.1)),  # one program reads a whole list
    "LLaMA3-8B": ((LLAMA3_8B, 8, 4096), (3, 0.6)),  # lists are split
}
TAIL_RANKS = {"attention": None, "attention with a tail": 2}
HLO_TYPES = {"bfloat16": "bf16", "int32": "s32", "uint8": "u8"}
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}  # operations that run nothing


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled program of a step or of an operation."""

    operations: collections.Counter  # how often each operation of the program runs
    copies: list[str]  # for each copy of a large argument, the argument's shape
    temporaries: float  # MiB


def compile_step(config: ModelConfig, method: Method | None, refresh: bool | None, batch: int, slots: int) -> Program:
    """Compiles a bfloat16 decode step, to which the state is donated."""
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), parameter_shapes(config))
    state = jax.eval_shape(lambda: init_state(config, batch, slots, method=method, dtype=jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = functools.partial(decode_step, config=config, refresh=refresh)
    return _compile(step, (params, tokens, state), donated=(2,), large=batch * slots)


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

    return _compile(attend, (*arrays, tail), donated=(), large=batch * slots)


def _compile(function: Callable, arguments: tuple, *, donated: tuple[int, ...], large: int) -> Program:
    """Compiles a function of arrays for an H200. Arguments of at least `large` numbers count as large."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if leaf.size >= large]
    shapes = {f"{HLO_TYPES[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]" for leaf in leaves}
    copies = [shape for shape in sorted(shapes) for _ in re.finditer(rf"= {re.escape(shape)}\S* copy\(", text)]
    entry = text[text.index("\nENTRY ") :]
    operations = collections.Counter(re.findall(r"= (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(", entry))
    operations = collections.Counter({name: n for name, n in operations.items() if name not in FREE})
    return Program(operations, copies, memory.temp_size_in_bytes / 2**20)


def compile_all() -> Iterator[tuple[str, str, int, Program, tuple[int, float]]]:
    """(model, program's name, number of layers, program, limits) of every program."""
    for name, ((config, batch, slots), limits) in ATTENTION.items():
        for what, rank in TAIL_RANKS.items():
            yield name, what, 1, compile_attention(config, rank, batch, slots), limits
    for name, (config, batch, slots) in MODELS.items():
        for (step, (method, refresh)), limits in zip(STEPS.items(), LIMITS[name], strict=True):
            yield name, step, config.num_layers, compile_step(config, method, refresh, batch, slots), limits


def main() -> int:
    """Compiles every program and returns 1 if any goes beyond a limit."""
    what = f"for an H200; batch 8 and 4096 slots unless told, budget {HSHARE.settings.budget}"
    print(f"jax {jax.__version__}, bfloat16, {what}\n")
    columns = ("model", "program", "kernels", "a layer", "temporaries", "conditionals and loops", "copies")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    failures = []
    for name, what, num_layers, program, (most_kernels, most_temporaries) in compile_all():
        kernels = sum(program.operations.values())
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
