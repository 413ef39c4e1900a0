"""Programs compiled for accelerators that this machine lacks, and what the compiled programs hold.

For GPUs the wheels of XLA's CUDA compiler must be there, for TPUs libtpu: scripts/with_compilers.sh brings them.
Nothing runs and nothing is timed. Autotuning, cuDNN and CUB cannot run without a GPU.
"""

import collections
import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.kernels.int8_rows import KVCacheDType
from hshare_jax.mesh import layouts, make_mesh
from hshare_jax.methods.base import Method
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts, parameter_shapes

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
HLO_TYPES = {
    "bfloat16": "bf16", "float32": "f32", "float16": "f16", "int32": "s32", "int8": "s8", "uint8": "u8", "bool": "pred",
}  # fmt: skip
FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple"}  # operations that run nothing
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast", "send", "recv",
)  # fmt: skip
_OPERATION = re.compile(r"= (?:\(.*?\)|\S+) ([a-z][a-z-]*)\(")


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled program of a step or of an operation, as one device runs it."""

    operations: collections.Counter  # how often each operation of the program runs
    collectives: collections.Counter  # how often devices exchange data, by the kind of the exchange
    num_pallas: int  # calls of Pallas kernels
    copies: list[str]  # for each copy of a large argument, the argument's shape
    arguments: int  # bytes
    in_place: int  # bytes of arguments whose memory the results take over
    temporaries: float  # MiB

    @property
    def num_kernels(self) -> int:
        """How many kernels the program starts. An exchange that is begun and awaited counts once."""
        return sum(count for name, count in self.operations.items() if not name.endswith("-done"))


def h200s(topology: str = "1x1x1") -> Sequence[Any]:
    """H200s to compile for: hosts x processes of a host x GPUs of a process."""
    importlib.import_module("jax_plugins.xla_cuda13")  # the import registers the compiler
    return topologies.get_topology_desc(platform="cuda", target_config=H200, topology=topology).devices


def tpus(topology: str) -> Sequence[Any]:
    """TPUs to compile for, such as "v6e:2x4"."""
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def one_device() -> Mesh:
    """A mesh of one H200."""
    return make_mesh(devices=h200s())


def place(tree: Any, takes: Any, mesh: Mesh) -> Any:
    """The shapes of a tree, each with its place on a mesh. `takes` is what `mesh.layouts` reads."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, layout.spec))
        for leaf, layout in zip(leaves, layouts(takes), strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def step_arguments(
    config: ModelConfig,
    method: Method | None,
    batch: int,
    slots: int,
    mesh: Mesh,
    *,
    spread: bool,
    kv_cache_dtype: KVCacheDType = "auto",
) -> tuple[dict, jax.ShapeDtypeStruct, DecodeState]:
    """The shapes that a bfloat16 decode step takes: parameters, tokens and state.

    Args:
        config: the model.
        method: how the step reads the cache; None decodes dense.
        batch, slots: rows, and the capacity of the cache.
        mesh: the devices.
        spread: whether the state says that its arrays lie in parts on the mesh; else one device holds them.
        kv_cache_dtype: as for `init_state`.
    """
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), parameter_shapes(config))
    how = {"method": method, "dtype": jnp.bfloat16, "mesh": mesh if spread else None}
    state = jax.eval_shape(lambda: init_state(config, batch, slots, **how, kv_cache_dtype=kv_cache_dtype))
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return place(params, parameter_layouts(params, mesh), mesh), place(tokens, "B", mesh), place(state, state, mesh)


def compile_program(
    function: Callable, arguments: tuple, mesh: Mesh, *, donated: tuple[int, ...], large: int
) -> Program:
    """Compiles a function of arrays.

    Args:
        function: traced.
        arguments: trees of shapes with their places on the mesh.
        mesh: the devices.
        donated: the arguments whose memory the results may take.
        large: arguments of at least so many numbers on a device count as large.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    shapes = {(leaf.sharding.shard_shape(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(arguments)}
    shapes = {f"{HLO_TYPES[kind]}[{','.join(map(str, shape))}]" for shape, kind in shapes if math.prod(shape) >= large}
    operations = collections.Counter(_OPERATION.findall(text[text.index("\nENTRY ") :]))
    everywhere = collections.Counter(_OPERATION.findall(text))
    collectives = {name: everywhere[name] + everywhere[f"{name}-start"] for name in COLLECTIVES}
    return Program(
        operations=collections.Counter({name: n for name, n in operations.items() if name not in FREE}),
        collectives=collections.Counter({name: n for name, n in collectives.items() if n}),
        num_pallas=text.count('custom_call_target="__gpu$xla.gpu.triton"'),
        copies=find_copies(text, shapes),
        arguments=memory.argument_size_in_bytes,
        in_place=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes / 2**20,
    )


def find_copies(text: str, shapes: Collection[str]) -> list[str]:
    """The shape of each copy that a program makes of arrays of these shapes.

    What does not count is a copy into a TPU's fast memory, S(1), and one inside a fusion that goes on computing with
    it, because neither is written to the device's memory.

    Args:
        text: the program in HLO.
        shapes: as HLO writes them, such as "bf16[16,8192]".
    """
    found = []
    for computation in text.split("\n\n"):
        lines = computation.splitlines()
        root = next((line for line in lines if line.lstrip().startswith("ROOT")), "")
        goes_on = computation.startswith("%fused") and not re.search(r" (copy|tuple)\(", root)
        made = [match for line in lines if (match := re.search(r"= ([a-z0-9]+\[[0-9,]*\])(\S*) copy\(", line))]
        found += [match[1] for match in made if match[1] in shapes and "S(1)" not in match[2] and not goes_on]
    return found
