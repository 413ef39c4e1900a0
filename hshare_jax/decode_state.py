"""The state of decoding: the KV cache, and beside it the lists of critical tokens with the plan that shares them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.config import HShareConfig
from hshare_jax.kernels.reference import EMPTY
from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.labels import Labels, make_labels
from hshare_jax.models.config import ModelConfig
from hshare_jax.share_plan import SharePlan, identity_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedLists:
    """Critical tokens of every layer in one buffer, and what is needed to choose them anew."""

    token_indices: Array  # [L, B, J, C] int32 slots, ascending, padded with EMPTY
    source: Array  # [B, L, J] int32, the share plan
    channels: Array  # [B, L, K, R] int32, label channels
    labels: tuple[Labels | None, ...]  # of each layer; None where none are scored
    recent_start: Array  # [B] int32, first slot of the recent range, set at the last refresh
    age: Array  # [B] int32, decode steps since the plan was found
    config: HShareConfig = dataclasses.field(metadata={"static": True})
    plan: SharePlan | None = dataclasses.field(metadata={"static": True})  # a constant plan, that `source` holds too
    has_fixed_channels: bool = dataclasses.field(metadata={"static": True})  # channels are given, not the prompt's


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that a decode step reads and writes. `shared` is None for dense decoding."""

    cache: KVCache
    shared: SharedLists | None


def init_state(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    hshare: HShareConfig | None = None,
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> DecodeState:
    """Returns an empty state.

    Args:
        config: the model.
        batch_size: B.
        capacity: tokens that each row must be able to hold, prompt and output together; rounds up to whole blocks.
        hshare: how to share critical tokens; None decodes dense.
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
    if hshare is None and (plan is not None or channels is not None):
        raise ValueError("a plan or channels were given without hshare: dense decoding uses neither")
    cache = init_cache(config, batch_size, capacity, jnp.dtype(dtype))
    return DecodeState(cache, None if hshare is None else _init_lists(config, hshare, plan, channels, cache))


def _init_lists(
    model: ModelConfig,
    config: HShareConfig,
    plan: SharePlan | None,
    channels: Array | np.ndarray | None,
    cache: KVCache,
) -> SharedLists:
    B = cache.lengths.shape[0]
    L, K, J, R = model.num_layers, model.num_kv_heads, config.num_lists(model), config.num_label_channels(model)
    source = identity_plan(B, L, J)
    if plan is not None:
        plan.check(model, config)
        source = jnp.tile(jnp.asarray(plan.source, jnp.int32), (B, 1, 1))
    first = jnp.tile(jnp.arange(R, dtype=jnp.int32), (L, K, 1))
    if channels is not None:
        first = check_channels(channels, model, R)
    is_scored = [layer >= config.dense_layers and (plan is None or plan.owns(layer)) for layer in range(L)]
    is_labelled = [config.scoring == "labels" and scored for scored in is_scored]
    return SharedLists(
        token_indices=jnp.full((L, B, J, config.num_critical), EMPTY, jnp.int32),
        source=source,
        channels=jnp.tile(first, (B, 1, 1, 1)),
        labels=tuple(
            _empty_labels(keys, R, config) if labelled else None
            for keys, labelled in zip(cache.keys, is_labelled, strict=True)
        ),
        recent_start=jnp.zeros((B,), jnp.int32),
        age=jnp.zeros((B,), jnp.int32),
        config=config,
        plan=plan,
        has_fixed_channels=channels is not None,
    )


def _empty_labels(keys: Array, num_channels: int, config: HShareConfig) -> Labels:
    codes, scales = _label_shapes(keys.shape, keys.dtype, num_channels, config.label_bits)
    return Labels(
        jnp.zeros(codes.shape, codes.dtype), None if scales is None else jnp.zeros(scales.shape, scales.dtype)
    )


@functools.cache  # eval_shape traces anew on every call
def _label_shapes(
    keys_shape: tuple[int, ...], dtype: jnp.dtype, num_channels: int, bits: int | None
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
    def make(keys: Array, channels: Array) -> tuple[Array, Array | None]:
        labels = make_labels(keys, channels, bits)
        return labels.codes, labels.scales

    channels = jax.ShapeDtypeStruct((*keys_shape[:2], num_channels), jnp.int32)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(keys_shape, dtype), channels)


def check_channels(channels: Array | np.ndarray, model: ModelConfig, num_channels: int) -> Int[Array, "L K R"]:
    """Returns the best `num_channels` of every kv head, ascending; ValueError where they cannot be this model's."""
    given = np.asarray(channels)
    expected = (model.num_layers, model.num_kv_heads)
    if given.shape[:2] != expected or given.ndim != 3 or given.shape[2] < num_channels:
        raise ValueError(
            f"channels has shape {list(given.shape)}; this model needs {list(expected)} heads with at least "
            f"label_channels={num_channels} channels each"
        )
    best = np.sort(given[:, :, :num_channels], axis=-1)
    if best.min() < 0 or best.max() >= model.head_dim or (np.diff(best, axis=-1) == 0).any():
        raise ValueError(f"channels must be different numbers in [0, head_dim={model.head_dim}) for every head")
    return jnp.asarray(best, jnp.int32)


def count_reads(state: DecodeState, model: ModelConfig) -> Float[Array, "B"]:
    """Returns the tokens that the last decode step read, the mean over layers and heads."""
    cache, shared = state.cache, state.shared
    lengths = cache.lengths
    all_of = [lengths if window is None else jnp.minimum(lengths, window) for window in model.windows]
    if shared is None:
        return jnp.stack(all_of).mean(axis=0, dtype=jnp.float32)
    config, L = shared.config, model.num_layers
    windows = jnp.asarray([cache.capacity if window is None else window for window in model.windows], jnp.int32)
    first = jnp.maximum(lengths[None, :] - windows[:, None], 0)  # [L, B]
    start = jnp.maximum(shared.recent_start[None, :], first)
    sinks = jnp.maximum(jnp.minimum(config.num_sinks, shared.recent_start)[None, :] - first, 0)
    J = shared.source.shape[2]
    rows = jnp.arange(lengths.shape[0])[:, None, None]
    listed = shared.token_indices[shared.source // J, rows, shared.source % J]  # [B, L, J, C]
    is_read = (listed != EMPTY) & (listed >= first.T[:, :, None, None])
    critical = is_read.sum(axis=-1, dtype=jnp.int32).mean(axis=-1, dtype=jnp.float32).T  # [L, B]
    is_dense = (jnp.arange(L)[:, None] < config.dense_layers) | (lengths < config.min_length)[None, :]
    return jnp.where(is_dense, jnp.stack(all_of), sinks + critical + lengths[None, :] - start).mean(axis=0)
