#!/usr/bin/env python3
"""Compiles whole decode steps for an H200 without one, counts what XLA made of them, and fails beyond exact limits.

The limits: no copy of a cache, label or list buffer or of a weight; no conditional or loop, which would break up the
CUDA graph; no more kernels a layer and temporaries than written here; no register spilled in any kernel. Needs the CUDA
compiler's wheels: run scripts/check_h200_compile.sh, which brings them. Nothing is timed; autotuning, cuDNN and CUB
cannot run here.
"""

import collections
import dataclasses
import functools
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_gpu_fail_ptx_compilation_on_register_spilling=true"

import jax
import jax.numpy as jnp
import jax_plugins.xla_cuda13  # noqa: F401  # pyright: ignore[reportMissingImports]  (registers the compiler)
from jax.experimental import topologies

from hshare_jax.config import HShareConfig
from hshare_jax.decode import decode_step
from hshare_jax.decode_state import init_state
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import parameter_shapes

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
LLAMA3_8B = ModelConfig(
    vocab_size=128_256, width=4096, mlp_width=14_336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
    max_positions=8192, windows=(None,) * 32, rope=RopeConfig(theta=500_000.0),
)  # fmt: skip
LLAMA2_7B = dataclasses.replace(
    LLAMA3_8B, vocab_size=32_000, mlp_width=11_008, num_kv_heads=32, rope=RopeConfig(theta=10_000.0)
)
MODELS = {"LLaMA2-7B": LLAMA2_7B, "LLaMA3-8B": LLAMA3_8B}
BATCH, CAPACITY = 8, 4096
HSHARE = HShareConfig(num_sinks=16, num_critical=432, num_recent=64)
# step: (settings, refresh, the most kernels a layer, the most MiB of temporaries)
STEPS = {
    "dense": (None, None, 99, 999),
    "hshare, refresh=True": (HSHARE, True, 99, 999),
    "hshare, refresh=False": (HSHARE, False, 99, 999),
    "hshare, refresh=None": (HSHARE, None, 99, 999),
}
HLO_TYPES = {"bfloat16": "bf16", "int32": "s32", "uint8": "u8"}
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}  # of the operations, those that run nothing


@dataclasses.dataclass(frozen=True)
class Program:
    """What XLA made of a step."""

    operations: collections.Counter  # that run, of the whole program
    copies: list[str]  # shapes of the state's and the weights' large arrays, one for each copy
    temporaries: float  # MiB


def compile_step(config: ModelConfig, hshare: HShareConfig | None, refresh: bool | None) -> Program:
    """Compiles a donated bfloat16 decode step."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(array: jax.ShapeDtypeStruct, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=replicated)

    params = jax.tree.map(lambda leaf: place(leaf, jnp.dtype(jnp.bfloat16)), parameter_shapes(config))
    state = jax.eval_shape(lambda: init_state(config, BATCH, CAPACITY, hshare=hshare, dtype=jnp.bfloat16))
    state = jax.tree.map(place, state)
    tokens = place(jax.ShapeDtypeStruct((BATCH,), jnp.int32))
    step = functools.partial(decode_step, config=config, refresh=refresh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(step, donate_argnums=(2,)).lower(params, tokens, state).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    large = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.size >= BATCH * CAPACITY]
    shapes = {f"{HLO_TYPES[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]" for leaf in large}
    copies = [shape for shape in sorted(shapes) for _ in re.finditer(rf"= {re.escape(shape)}\S* copy\(", text)]
    entry = text[text.index("\nENTRY ") :]
    operations = collections.Counter(re.findall(r"= (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(", entry))
    operations = collections.Counter({name: n for name, n in operations.items() if name not in FREE})
    return Program(operations, copies, memory.temp_size_in_bytes / 2**20)


def main() -> int:
    """Compiles every step and returns 1 if any goes beyond a limit."""
    print(f"jax {jax.__version__}, batch {BATCH}, {CAPACITY} slots, bfloat16, for an H200; budget {HSHARE.budget}\n")
    columns = ("model", "step", "kernels", "a layer", "temporaries", "conditionals and loops", "copies")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    failures = []
    for name, config in MODELS.items():
        for step, (settings, refresh, most_kernels, most_temporaries) in STEPS.items():
            program = compile_step(config, settings, refresh)
            kernels = sum(program.operations.values())
            broken = sum(program.operations[operation] for operation in ("conditional", "while", "call"))
            a_layer = kernels / config.num_layers
            print(
                f"| {name} | {step} | {kernels} | {a_layer:.1f} | {program.temporaries:.1f} MiB | {broken} "
                f"| {len(program.copies)} |",
                flush=True,
            )
            if program.copies or broken or a_layer > most_kernels or program.temporaries > most_temporaries:
                failures.append(f"{name}, {step}: copies {program.copies}, operations {dict(program.operations)}")
    print("\n".join(["", *failures]) if failures else "\nwithin all limits; no kernel spills a register")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
