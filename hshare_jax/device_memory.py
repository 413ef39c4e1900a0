"""What a model and a state take on each device, computed from shapes alone: neither weights nor devices are needed."""

import dataclasses

import jax
import jax.numpy as jnp

from hshare_jax.decode_state import init_state
from hshare_jax.errors import check_whole
from hshare_jax.kernels.int8_rows import KVCacheDType
from hshare_jax.mesh import AnyMesh, bytes_per_device, check_rows_divide, num_parts
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts, parameter_shapes
from hshare_jax.shapes import DATA, MODEL


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. A program needs more while it runs: temporaries, and whatever its compiler reserves."""

    weights: int
    cache: int  # keys, values, and the lengths of rows
    labels: int  # of keys, which critical tokens are chosen by
    lists: int  # lists of critical tokens, plan and tails; everything that a method carries except labels

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.cache + self.labels + self.lists


def device_memory(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    method: Method | None = None,
    dtype: jnp.dtype | type = jnp.bfloat16,
    kv_cache_dtype: KVCacheDType = "auto",
    mesh: AnyMesh | None = None,
) -> DeviceMemory:
    """The bytes of weights and of an empty state on each device.

    Args:
        config: the model. Its kv heads are repeated as `load_model` repeats them where there are more devices.
        batch_size, capacity, method: as for `init_state`.
        dtype: of weights, keys, values and labels of all bits. Weights in few bits are not counted here.
        kv_cache_dtype: as for `init_state`.
        mesh: the devices; None for one device. `jax.sharding.AbstractMesh((data, model), ("data", "model"))` stands
            for devices that this machine lacks.

    Raises:
        SettingError: a size that `init_state` refuses, or a mesh that cannot divide the model or the rows evenly.
    """
    sizes = (1, 1) if mesh is None else (mesh.shape[DATA], mesh.shape[MODEL])
    check_whole("batch_size", batch_size, 1)
    check_rows_divide("batch_size", batch_size, mesh)
    config = config.for_parts(num_parts(mesh))
    if mesh is not None and method is not None:
        method.check_mesh(config, mesh)
    params = parameter_shapes(config)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), params)
    weights = bytes_per_device(params, parameter_layouts(params, mesh), sizes)
    found = []

    def count() -> None:
        how = {"method": method, "dtype": dtype, "kv_cache_dtype": kv_cache_dtype}
        state = init_state(config, batch_size, capacity, **how)
        carried = state.method_state
        rest = dataclasses.replace(carried, labels=()) if isinstance(carried, SharedLists) else carried
        found.extend(
            0 if part is None else bytes_per_device(part, part, sizes) for part in (state.cache, carried, rest)
        )

    jax.eval_shape(count)  # traced, so that nothing is allocated
    cache, carried, lists = found
    return DeviceMemory(weights, cache, carried - lists, lists)
