#!/usr/bin/env python3
"""Compiles the decode step for an H200 without one, counts what XLA made of it, and fails where a buffer is copied.

Needs the CUDA compiler's wheels: run scripts/check_h200_compile.sh, which brings them. Nothing is timed; autotuning,
cuDNN and CUB cannot run here.
"""

import dataclasses
import functools
import re
import sys

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
LAYERS, BATCH, CAPACITY = 4, 8, 4096  # layers are alike, so a few tell
HLO_TYPES = {"bfloat16": "bf16", "int32": "s32", "uint8": "u8"}


def compile_step(config: ModelConfig, hshare: HShareConfig | None, refresh: bool | None) -> tuple[str, set[str]]:
    """Returns the HLO of a donated bfloat16 decode step, and the HLO shapes of the state's large arrays."""
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
    shapes = {
        f"{HLO_TYPES[str(leaf.dtype)]}[{','.join(map(str, leaf.shape))}]"
        for leaf in jax.tree.leaves(state)
        if leaf.ndim == 4
    }
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    print(f"  temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB", end="")
    return text, shapes


def main() -> int:
    """Compiles every variant of the step and returns 1 if any copies a buffer of the state."""
    config = dataclasses.replace(LLAMA3_8B, num_layers=LAYERS, windows=(None,) * LAYERS)
    hshare = HShareConfig(num_sinks=16, num_critical=432, num_recent=64)
    print(
        f"jax {jax.__version__}, {LAYERS} layers of LLaMA3-8B, batch {BATCH}, {CAPACITY} slots, bfloat16, for an H200"
    )
    failures = 0
    for settings, refresh in ((None, None), (hshare, True), (hshare, False), (hshare, None)):
        print(f"{'dense' if settings is None else f'hshare refresh={refresh}'}:", end="")
        text, shapes = compile_step(config, settings, refresh)
        copies = [s for s in shapes for _ in re.finditer(rf"= {re.escape(s)}\S* copy\(", text)]
        aliased = text.split("input_output_alias={", 1)[1].split("entry_computation_layout", 1)[0].count("may-alias")
        print(f", buffers aliased {aliased}, copies of the state {len(copies)} {sorted(set(copies)) or ''}")
        failures += len(copies)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
