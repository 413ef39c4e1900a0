"""The training step and the evaluation, each against its definition: schedule, decay, clipping, micro-batches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, SETTINGS, tiny_data, tiny_model

from hshare_jax.models.decoder import run_decoder, unembed
from hshare_jax.training.attention import causal_attend
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.start import new_model
from hshare_jax.training.step import (
    TrainState,
    data_mesh,
    decays,
    evaluate,
    init_state,
    learning_rate_schedule,
    place_batch,
    state_shapes,
    train_step,
)


def steps_of(config=CONFIG, settings=SETTINGS, *, count: int = 1) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after some steps on the first windows, and the metrics of each step."""
    mesh, found = data_mesh(settings), []
    state = init_state(tiny_model(config).params, settings, mesh)
    batch = place_batch(tiny_data().windows[: settings.batch_size], settings, mesh)
    for _ in range(count):
        state, metrics = train_step(state, batch, config=config, settings=settings, mesh=mesh)
        found.append({name: float(value) for name, value in metrics.items()})
    return state, found


def moments(state: TrainState) -> Any:
    """AdamW's mean of the gradients. After one step it is a tenth of the clipped gradient."""
    return next(
        part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )


def test_the_learning_rate_is_that_of_a_table_written_by_hand():
    settings = TrainingSettings(num_steps=7, warmup_steps=3, learning_rate=1.0, min_learning_rate_ratio=0.2)
    found = [float(np.asarray(learning_rate_schedule(settings)(step))) for step in range(8)]
    halves = 0.2 + 0.8 * (1 + np.cos(np.pi * np.array([0, 1, 2, 3, 4]) / 4)) / 2
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, *halves], rtol=1e-6)
    assert halves[[0, 2, 4]].tolist() == [1.0, 0.6000000000000001, 0.2]
    without = dataclasses.replace(settings, warmup_steps=0)
    assert float(np.asarray(learning_rate_schedule(without)(0))) == 1.0


def test_matrices_decay_and_norms_and_biases_do_not():
    config = dataclasses.replace(CONFIG, qkv_bias=True, mlp_bias=True, tie_embeddings=False)
    found = jax.tree.flatten_with_path(decays(new_model(config, None).params))[0]
    kinds = {(path[-1].key, decayed) for path, decayed in found}
    assert kinds == {
        ("embedding", True), ("unembedding", True), ("weight", True), ("scale", False), ("bias", False),
    }  # fmt: skip


def test_a_parameter_without_gradient_shrinks_by_the_decay_alone():
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5)
    unused = np.setdiff1d(np.arange(48), tiny_data().windows[:4])
    # Untied, because every row of a tied embedding has a gradient.
    config = dataclasses.replace(CONFIG, tie_embeddings=False)
    before = tiny_model(config).params
    state, (metrics,) = steps_of(config, settings)
    kept = 1 - metrics["learning_rate"] * 0.5
    np.testing.assert_allclose(state.params["embedding"][unused], before["embedding"][unused] * kept, rtol=1e-6)
    assert len(unused) > 20


def test_the_first_loss_is_the_models_own():
    windows, model = jnp.asarray(tiny_data().windows[:4]), tiny_model()
    positions = jnp.broadcast_to(jnp.arange(12)[None, :], (4, 12))
    attend = causal_attend(CONFIG)
    hidden, _ = run_decoder(model.params, windows[:, :-1], positions, attend, {}, config=CONFIG)
    logits = unembed(model.params, hidden, config=CONFIG)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
    _, (metrics,) = steps_of()
    np.testing.assert_allclose(metrics["loss"], -likelihood.mean(), rtol=1e-6)
    # Three windows, so that the last batch is not full.
    mean = evaluate(model.params, np.asarray(windows[:3]), config=CONFIG, settings=SETTINGS, mesh=data_mesh(SETTINGS))
    np.testing.assert_allclose(mean, -likelihood[:3].mean(), rtol=1e-6)


def test_micro_batches_equal_one_batch():
    one, (whole,) = steps_of(settings=dataclasses.replace(SETTINGS, accumulation_steps=1))
    four, (cut,) = steps_of(settings=dataclasses.replace(SETTINGS, accumulation_steps=4))
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_allclose(cut[name], whole[name], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), moments(one), moments(four))


def test_gradients_are_clipped_to_their_norm_over_all_parameters():
    norms = []
    for max_grad_norm in (0.0, 0.5):
        state, (metrics,) = steps_of(settings=dataclasses.replace(SETTINGS, max_grad_norm=max_grad_norm))
        squares = sum(float(jnp.square(10 * leaf).sum()) for leaf in jax.tree.leaves(moments(state)))
        norms.append((metrics["grad_norm"], squares**0.5))
    (before, kept), (same, clipped) = norms
    assert before > 0.5
    np.testing.assert_allclose([same, kept, clipped], [before, before, 0.5], rtol=1e-5)


def test_bfloat16_computes_beside_float32_masters():
    settings = dataclasses.replace(SETTINGS, compute_dtype="bfloat16")
    state, found = steps_of(settings=settings, count=3)
    exact = steps_of(count=3)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    assert state.params["embedding"].dtype == "float32"
    losses = [[metrics["loss"] for metrics in run] for run in (found, exact)]
    np.testing.assert_allclose(*losses, rtol=5e-3)  # bfloat16 keeps 8 bits
    assert losses[0] != losses[1]


def test_the_loss_of_a_text_falls_as_it_is_learnt_by_heart():
    settings = dataclasses.replace(SETTINGS, learning_rate=0.02, warmup_steps=0, num_steps=80)
    losses = [metrics["loss"] for metrics in steps_of(settings=settings, count=80)[1]]
    assert losses[0] > 3.5
    assert losses[-1] < 0.2


@pytest.mark.parametrize("kv_layer_map", [(0, 1, 1, 1), (0, 3, 2, 3)])
def test_layers_that_share_keys_and_values_train(kv_layer_map):
    config = dataclasses.replace(CONFIG, num_layers=4, windows=(None,) * 4, kv_layer_map=kv_layer_map)
    settings = dataclasses.replace(SETTINGS, learning_rate=0.01)
    before = tiny_model(config).params
    state, found = steps_of(config, settings, count=2)
    assert found[1]["loss"] < found[0]["loss"]
    still = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, state.params)
    assert not any(jax.tree.leaves(still)), "every parameter has a gradient"


def test_the_shapes_of_a_state_are_those_of_its_arrays():
    state = steps_of(count=0)[0]
    shapes = state_shapes(tiny_model().params, SETTINGS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(shapes)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)
    ]


def test_a_step_is_traced_once():
    settings = dataclasses.replace(SETTINGS, beta1=0.87)
    step: Any = train_step
    jax.clear_caches()  # another file may have compiled the same program
    before = step._cache_size()
    steps_of(settings=settings, count=4)
    assert step._cache_size() == before + 1
