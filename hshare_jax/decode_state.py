"""The state of decoding: the KV cache, and what a sparse method carries from step to step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from hshare_jax.errors import SettingError, check_one_of
from hshare_jax.kernels.int8_rows import KV_CACHE_DTYPES, KVCacheDType
from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.mesh import by_parts, check_rows_divide, make_on, num_parts
from hshare_jax.methods.base import Method, MethodState, count_dense
from hshare_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from hshare_jax.models.pretrained import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a decode step reads and writes, except the parameters."""

    cache: KVCache
    method_state: MethodState | None  # None decodes dense
    # The devices that hold the arrays in parts; None where one device holds them.
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})


def init_state(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    method: Method | None = None,
    dtype: jnp.dtype | type = jnp.float32,
    kv_cache_dtype: KVCacheDType = "auto",
    mesh: Mesh | None = None,
) -> DecodeState:
    """An empty state.

    Args:
        config: the model.
        batch_size: B.
        capacity: tokens that each row must be able to hold, prompt and output together. It rounds up to whole blocks.
        method: how decode steps read the cache (`hshare_jax.methods`); None decodes dense.
        dtype: of labels and tails, and of keys and values unless they have 8 bits: float32, bfloat16 or float16.
        kv_cache_dtype: "auto" keeps keys and values in `dtype`; "int8" in 8 bits, with a scale for each token and head.
        mesh: the devices that the model was loaded on (`load_model`); None for one device. Rows lie along its axis
            "data", heads along its axis "model".

    Raises:
        SettingError: a size below 1, a capacity beyond the model's positions, another dtype, or a mesh that cannot
            divide rows or heads evenly.
        ValueError: a plan or channels of the method that are not for this model, or not for this mesh.
    """
    if batch_size < 1:
        raise SettingError("batch_size", batch_size, "must be at least 1")
    if not 1 <= capacity <= config.max_positions:
        rule = f"must lie between 1 and the model's max_positions={config.max_positions}"
        raise SettingError("capacity", capacity, rule)
    check_one_of("dtype", str(getattr(dtype, "__name__", dtype)), ("float32", "bfloat16", "float16"))
    check_one_of("kv_cache_dtype", kv_cache_dtype, KV_CACHE_DTYPES)
    check_rows_divide("batch_size", batch_size, mesh)
    check_parts(config, mesh)
    if mesh is not None and method is not None:
        method.check_mesh(config, mesh)
    sizes = config, batch_size, capacity, method, jnp.dtype(dtype), kv_cache_dtype
    return dataclasses.replace(make_on(mesh, _empty, *sizes), mesh=mesh)


def state_for(model: "Model", batch_size: int, capacity: int, *, method: Method | None = None) -> DecodeState:
    """`init_state` for a model: on its devices and in its dtypes."""
    how = {"dtype": jnp.dtype(model.dtype), "kv_cache_dtype": model.kv_cache_dtype, "mesh": model.mesh}
    return init_state(model.config, batch_size, capacity, method=method, **how)


def _empty(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    method: Method | None,
    dtype: jnp.dtype,
    kv_cache_dtype: KVCacheDType,
) -> DecodeState:
    cache = init_cache(config, batch_size, capacity, dtype, kv_cache_dtype)
    return DecodeState(cache, None if method is None else method.start(config, cache))


def check_parts(config: ModelConfig, mesh: Mesh | None) -> None:
    """Raises SettingError unless the mesh can divide the model's kv heads as they are."""
    parts = num_parts(mesh)
    if config.for_parts(parts) != config:
        rule = f"devices need as many kv heads, and this configuration has {config.num_kv_heads}"
        way_out = "take the configuration of the model that load_model returns for this mesh"
        raise SettingError("model", parts, rule, way_out)


def count_reads(state: DecodeState, config: ModelConfig) -> Float[Array, "B"]:
    """Tokens that the last decode step read, the mean over layers and heads."""

    def count(state: DecodeState, *, config: ModelConfig) -> Float[Array, "B"]:
        if state.method_state is None:
            return count_dense(state.cache, config).mean(axis=0, dtype=jnp.float32)
        return state.method_state.count_reads(state.cache, config)

    return on_parts(count, state, config, (), (), "B")


def on_parts(
    function: Callable[..., Any],
    state: DecodeState,
    config: ModelConfig,
    args: Sequence[Any],
    takes: Sequence[Any],
    returns: Any,
) -> Any:
    """The result of function(state, *args, config=config), computed by each device for its part (`mesh.by_parts`).

    Args:
        function: is given a state without a mesh, and the configuration of a part.
        state: its mesh says which devices there are; None calls the function directly.
        config: the model.
        args, takes, returns: further arguments, and how they and the result lie on the mesh, as for `by_parts`.
    """
    mesh, state = state.mesh, dataclasses.replace(state, mesh=None)
    if mesh is None:
        return function(state, *args, config=config)
    function = functools.partial(function, config=config.part(num_parts(mesh)))
    return by_parts(function, mesh, (state, *args), (state, *takes), returns)
