"""One optimiser step and one evaluation, data-parallel: each device has all parameters and a part of the windows.

Parameters and optimiser state are float32. The forward and backward pass run in `TrainingSettings.compute_dtype`, with
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from hshare_jax.errors import SettingError
from hshare_jax.mesh import make_mesh
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import DATA
from hshare_jax.training.loss import sum_of_window_losses
from hshare_jax.training.settings import TrainingSettings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training step changes, and the arrays of a checkpoint.

    The fields are `Any`, because in the tree of `state_shapes` their leaves are ShapeDtypeStructs.
    """

    params: dict[str, Any]
    opt_state: Any
    step: Any  # int32 [], the number of steps done


def learning_rate_schedule(settings: TrainingSettings) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0. It rises linearly, then falls as a cosine.

    # learning_rate 1, 3 warm-up steps of 5:  1/4, 1/2, 3/4 | 1, and half-way to the minimum
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    return optax.warmup_cosine_decay_schedule(
        peak / (warmup + 1), peak, warmup, settings.num_steps, end_value=peak * settings.min_learning_rate_ratio
    )


def make_optimizer(settings: TrainingSettings) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients that are clipped by their global norm. Only matrices decay."""
    adamw = optax.adamw(
        learning_rate_schedule(settings), settings.beta1, settings.beta2, weight_decay=settings.weight_decay,
        mask=decays,
    )  # fmt: skip
    if settings.max_grad_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw)


def decays(params: dict[str, Any]) -> dict[str, Any]:
    """Whether weight decay shrinks each parameter, as a tree: True for matrices, False for norms and biases."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def data_mesh(settings: TrainingSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of the given ones, over whose axis "data" windows are spread.

    Raises:
        SettingError: the windows of a micro-batch cannot be divided evenly among the devices.
    """
    devices = jax.devices() if devices is None else devices
    size = settings.batch_size // settings.accumulation_steps
    if size % len(devices):
        raise SettingError(
            "batch_size", settings.batch_size,
            f"in {{accumulation_steps}} makes micro-batches of {size}, which {len(devices)} devices cannot share "
            "evenly; change either",
            others={"accumulation_steps": settings.accumulation_steps},
        )  # fmt: skip
    return make_mesh(data=len(devices), devices=devices)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies every array to every device. Donating a copy leaves the original as it is."""
    return jax.device_put(tree, NamedSharding(mesh, P()), may_alias=False)


def init_state(params: dict[str, Any], settings: TrainingSettings, mesh: Mesh) -> TrainState:
    """The state before the first step. Its parameters are float32 copies of `params`."""
    masters = replicate(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), mesh)
    opt_state = make_optimizer(settings).init(masters)
    return replicate(TrainState(masters, opt_state, jnp.int32(0)), mesh)


def state_shapes(params: dict[str, Any], settings: TrainingSettings) -> TrainState:
    """The tree of `init_state` with a ShapeDtypeStruct at every leaf. Nothing is allocated."""
    masters = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)
    opt_state = jax.eval_shape(make_optimizer(settings).init, masters)
    return TrainState(masters, opt_state, jax.ShapeDtypeStruct((), jnp.int32))


def place_batch(windows: Int[np.ndarray, "B T1"], settings: TrainingSettings, mesh: Mesh) -> Int[Array, "A b T1"]:
    """Cuts the windows of a step into micro-batches and spreads each micro-batch over the devices."""
    cut = windows.reshape(settings.accumulation_steps, -1, windows.shape[1])
    return jax.device_put(cut, NamedSharding(mesh, P(None, DATA)))


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"), donate_argnames="state")
def train_step(
    state: TrainState, windows: Int[Array, "A b T1"], *, config: ModelConfig, settings: TrainingSettings, mesh: Mesh
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser step.

    Args:
        state: the state before the step, from `init_state` or from the step before. It is donated.
        windows: the windows of the step, from `place_batch`.
        config: the model's configuration.
        settings: the settings of the run.
        mesh: the devices, from `data_mesh`.

    Returns:
        The state after the step, and the step's metrics: `loss` (nats per token, of the parameters before the step),
        `grad_norm` (before clipping) and `learning_rate`.
    """

    def mean_loss(params: dict[str, Any], windows: Array) -> Array:
        count = windows.shape[0] * (windows.shape[1] - 1)
        return _sum_of_losses(params, windows, None, config, settings) / count

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

    # check_vma is off, because with it every loop inside the decoder would have to declare which values vary over
    # devices. pmean above makes the results equal on all devices.
    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(None, DATA)), out_specs=P(), check_vma=False)
    return spread(state, windows)


@functools.partial(jax.jit, static_argnames=("config", "settings", "mesh"))
def eval_step(
    params: dict[str, Any],
    windows: Int[Array, "b T1"],
    is_real: Bool[Array, "b"],
    *,
    config: ModelConfig,
    settings: TrainingSettings,
    mesh: Mesh,
) -> Float[Array, ""]:
    """The summed loss (nats) of the windows that are real. See `train_step` for the arguments."""

    def step(params: dict[str, Any], windows: Array, is_real: Array) -> Array:
        return lax.psum(_sum_of_losses(params, windows, is_real, config, settings), DATA)

    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(DATA), P(DATA)), out_specs=P(), check_vma=False)
    return spread(params, windows, is_real)


def evaluate(
    params: dict[str, Any],
    windows: Int[np.ndarray, "E T1"],
    *,
    config: ModelConfig,
    settings: TrainingSettings,
    mesh: Mesh,
) -> float:
    """The mean loss (nats per token) of windows, evaluated in batches of the size of a micro-batch."""
    size, total = settings.batch_size // settings.accumulation_steps, 0.0
    spread = NamedSharding(mesh, P(DATA))
    for start in range(0, len(windows), size):
        batch = windows[start : start + size]
        is_real = np.arange(size) < len(batch)
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
        placed = jax.device_put((padded, is_real), spread)
        total += float(eval_step(params, *placed, config=config, settings=settings, mesh=mesh))
    return total / (len(windows) * (windows.shape[1] - 1))


def _sum_of_losses(
    params: dict[str, Any], windows: Array, is_real: Array | None, config: ModelConfig, settings: TrainingSettings
) -> Float[Array, ""]:
    """`sum_of_window_losses`, computed in `compute_dtype`."""
    params = jax.tree.map(lambda leaf: leaf.astype(settings.compute_dtype), params)
    return sum_of_window_losses(params, windows, is_real, config=config)
