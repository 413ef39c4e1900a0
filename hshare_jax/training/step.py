"""One optimiser step and one evaluation, data-parallel: every device has all parameters and a part of the windows.

Parameters and optimiser state are float32. The forward and backward pass run in `TrainingConfig.compute_dtype`, with
softmax, norms and logits in float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from hshare_jax.models.config import ModelConfig
from hshare_jax.training.config import TrainingConfig
from hshare_jax.training.loss import sum_of_window_losses

DATA = "data"  # the mesh axis that windows are spread over


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes; a checkpoint is this."""

    params: dict[str, Any]
    opt_state: Any
    step: Any  # int32 [], steps done; jax describes arrays by things that are none, hence Any


def learning_rate_schedule(settings: TrainingConfig) -> optax.Schedule:
    """Returns the learning rate of step i, from 0: linear to its peak at `warmup_steps`, then a cosine.

    # learning_rate 1, 3 warm-up steps of 5:  1/4, 1/2, 3/4 | 1, and half-way to the minimum
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, settings.num_steps, end_value=peak * settings.min_learning_rate_ratio
    )


def make_optimizer(settings: TrainingConfig) -> optax.GradientTransformation:
    """Returns AdamW on gradients clipped by their global norm; only matrices decay (arXiv 1711.05101)."""
    adamw = optax.adamw(
        learning_rate_schedule(settings), settings.beta1, settings.beta2, weight_decay=settings.weight_decay,
        mask=decays,
    )  # fmt: skip
    if settings.max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def decays(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree of which parameters weight decay shrinks: matrices, and neither norms nor biases."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def data_mesh(settings: TrainingConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of all devices, or of those given; ValueError where micro-batches do not divide among them."""
    devices = jax.devices() if devices is None else devices
    size = settings.batch_size // settings.accumulation_steps
    if size % len(devices):
        raise ValueError(
            f"batch_size={settings.batch_size} in accumulation_steps={settings.accumulation_steps} makes micro-batches "
            f"of {size}, which {len(devices)} devices cannot share evenly; change either"
        )
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns a copy of every array on every device; the originals stay as they are when the copies are donated."""
    return jax.device_put(tree, NamedSharding(mesh, P()), may_alias=False)


def init_state(params: dict[str, Any], settings: TrainingConfig, mesh: Mesh) -> TrainState:
    """Returns the state before the first step, its parameters float32 copies."""
    masters = replicate(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), mesh)
    opt_state = make_optimizer(settings).init(masters)
    return replicate(TrainState(masters, opt_state, jnp.int32(0)), mesh)


def state_shapes(params: dict[str, Any], settings: TrainingConfig) -> TrainState:
    """Returns the tree of `init_state`, a ShapeDtypeStruct at every leaf; nothing is allocated."""
    masters = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    opt_state = jax.eval_shape(make_optimizer(settings).init, masters)
    return TrainState(masters, opt_state, jax.ShapeDtypeStruct((), jnp.int32))


def place_batch(windows: Int[np.ndarray, "B T1"], settings: TrainingConfig, mesh: Mesh) -> Int[Array, "A b T1"]:
    """Returns a step's windows in micro-batches, each spread over the devices."""
    cut = windows.reshape(settings.accumulation_steps, -1, windows.shape[1])
    return jax.device_put(cut, NamedSharding(mesh, P(None, DATA)))


@functools.partial(jax.jit, static_argnames=("model", "settings", "mesh"), donate_argnames="state")
def train_step(
    state: TrainState, windows: Int[Array, "A b T1"], *, model: ModelConfig, settings: TrainingConfig, mesh: Mesh
) -> tuple[TrainState, dict[str, Array]]:
    """Returns (the state after one optimiser step, its `loss` (nats per token), `grad_norm` and `learning_rate`).

    Args:
        state: of `init_state`; it is donated. The loss is that of its parameters.
        windows: of `place_batch`.
        model: the decoder.
        settings: the run's.
        mesh: of `data_mesh`.
    """

    def mean_loss(params: dict[str, Any], windows: Array) -> Array:
        count = windows.shape[0] * (windows.shape[1] - 1)
        return _sum_of_losses(params, windows, None, model, settings) / count

    def step(state: TrainState, windows: Array) -> tuple[TrainState, dict[str, Array]]:
        loss_and_gradients = jax.value_and_grad(mean_loss)
        if settings.accumulation_steps == 1:
            found = loss_and_gradients(state.params, windows[0])
        else:

            def add(total: Any, part: Array) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, loss_and_gradients(state.params, part)), None

            nothing = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
            total, _ = lax.scan(add, nothing, windows)
            found = jax.tree.map(lambda leaf: leaf / settings.accumulation_steps, total)
        loss, gradients = lax.pmean(found, DATA)
        updates, opt_state = make_optimizer(settings).update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(learning_rate_schedule(settings)(state.step), jnp.float32),
        }
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    # check_vma would have every loop inside the decoder say what varies over devices; pmean above makes all equal.
    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(None, DATA)), out_specs=P(), check_vma=False)
    return spread(state, windows)


@functools.partial(jax.jit, static_argnames=("model", "settings", "mesh"))
def eval_step(
    params: dict[str, Any],
    windows: Int[Array, "b T1"],
    is_real: Bool[Array, "b"],
    *,
    model: ModelConfig,
    settings: TrainingConfig,
    mesh: Mesh,
) -> Float[Array, ""]:
    """Returns the summed loss (nats) of the windows that are real; arguments are those of `train_step`."""

    def step(params: dict[str, Any], windows: Array, is_real: Array) -> Array:
        return lax.psum(_sum_of_losses(params, windows, is_real, model, settings), DATA)

    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA), P(DATA)), out_specs=P(), check_vma=False)
    return spread(params, windows, is_real)


def evaluate(
    params: dict[str, Any],
    windows: Int[np.ndarray, "E T1"],
    *,
    model: ModelConfig,
    settings: TrainingConfig,
    mesh: Mesh,
) -> float:
    """Returns the mean loss (nats per token) of windows, taken in batches of a micro-batch's size."""
    size, total = settings.batch_size // settings.accumulation_steps, 0.0
    spread = NamedSharding(mesh, P(DATA))
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        is_real = np.arange(size) < len(batch)
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        placed = jax.device_put((padded, is_real), spread)
        total += float(eval_step(params, *placed, model=model, settings=settings, mesh=mesh))
    return total / (len(windows) * (windows.shape[1] - 1))


def _sum_of_losses(
    params: dict[str, Any], windows: Array, is_real: Array | None, model: ModelConfig, settings: TrainingConfig
) -> Float[Array, ""]:
    """Returns `sum_of_window_losses` in the dtype to compute in."""
    params = jax.tree.map(lambda leaf: leaf.astype(settings.compute_dtype), params)
    return sum_of_window_losses(params, windows, is_real, config=model)
