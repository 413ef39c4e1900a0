"""The loss and its gradients, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hshare_jax.training import loss as loss_module
from hshare_jax.training.loss import sum_of_losses


@pytest.mark.parametrize("chunk", [1 << 24, 3 * 23, 23])  # logits of all rows at once, of three, of one
def test_the_loss_and_its_gradients_are_those_of_the_definition(monkeypatch, chunk):
    monkeypatch.setattr(loss_module, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    weight, hidden = rng.normal(size=(23, 8)), rng.normal(size=(10, 8))
    targets = np.array([3, 22, 0, -1, 5, 5, 9, -1, 1, 2])
    logits = hidden @ weight.T
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    counts = targets >= 0
    expected = -np.log(probabilities[counts, targets[counts]]).sum()
    to_logits = np.where(counts[:, None], probabilities - np.eye(23)[targets], 0)
    arrays = jnp.asarray(weight, jnp.float32), jnp.asarray(hidden, jnp.float32)
    np.testing.assert_allclose(sum_of_losses(*arrays, jnp.asarray(targets)), expected, rtol=1e-6)
    found, gradients = jax.value_and_grad(lambda *a: 3 * sum_of_losses(*a, jnp.asarray(targets)), (0, 1))(*arrays)
    np.testing.assert_allclose(found, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], 3 * to_logits.T @ hidden, atol=1e-5)
    np.testing.assert_allclose(gradients[1], 3 * to_logits @ weight, atol=1e-5)
