"""The state of decoding: the KV cache, and beside it what a sparse method carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.methods.base import Method, MethodState, count_dense
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists, init_lists
from hshare_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that a decode step reads and writes. `method_state` is None for dense decoding, for HShare `SharedLists`."""

    cache: KVCache
    method_state: MethodState | None


def init_state(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    method: HShareSettings | Method | None = None,
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> DecodeState:
    """Returns an empty state.

    Args:
        config: the model.
        batch_size: B.
        capacity: tokens that each row must be able to hold, prompt and output together; rounds up to whole blocks.
        method: how to share critical tokens, or another method of `hshare_jax.methods`; None decodes dense.
        plan: how lists are shared, known beforehand; None finds a plan for each prompt after its prefill.
        channels: label channels of every kv head, the best first, at least as many as labels keep; None takes those of
            each prompt.
        dtype: of keys, values and labels.

    Raises:
        ValueError: a size below 1, a capacity beyond the model's positions, a dtype that is no float, or a plan or
            channels that are not for this model and these settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 1 <= capacity <= config.max_positions:
        raise ValueError(f"capacity={capacity} must lie between 1 and the model's max_positions={config.max_positions}")
    name = str(getattr(dtype, "__name__", dtype))
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name} must be float32, bfloat16 or float16")
    cache = init_cache(config, batch_size, capacity, jnp.dtype(dtype))
    return DecodeState(cache, start_method(method, config, cache, plan=plan, channels=channels))


def start_method(
    method: HShareSettings | Method | None,
    config: ModelConfig,
    cache: KVCache,
    *,
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
) -> MethodState | None:
    """Returns what a method carries beside an empty cache; arguments and errors are those of `init_state`."""
    if not isinstance(method, HShareSettings) and (plan is not None or channels is not None):
        name = "dense decoding" if method is None else type(method).__name__
        raise ValueError(f"a plan or channels were given, but method={method!r}: {name} uses neither")
    if isinstance(method, HShareSettings):
        return init_lists(config, method, plan, channels, cache)
    return None if method is None else method.start(config, cache)


def for_decoding(state: DecodeState) -> DecodeState:
    """Returns a state for loops that only decode: one program then serves all layer and head ratios and kinds of plan.

    Plans that are found from prompts are data, and so decode steps do not read how one was found; those settings are
    the defaults from here on. A prefill onto this state would find its plan by them.
    """

    def forget(node: object) -> object:
        return dataclasses.replace(node, config=node.config.for_decoding()) if isinstance(node, SharedLists) else node

    return jax.tree.map(forget, state, is_leaf=lambda node: isinstance(node, SharedLists))


def count_reads(state: DecodeState, model: ModelConfig) -> Float[Array, "B"]:
    """Returns the tokens that the last decode step read, the mean over layers and heads."""
    if state.method_state is None:
        return count_dense(state.cache, model).mean(axis=0, dtype=jnp.float32)
    return state.method_state.count_reads(state.cache, model)
