"""The masked softmax gives numbers for every mask."""

import jax.numpy as jnp
import numpy as np
import oracle

from hshare_jax.kernels.masked_softmax import softmax_over

F32 = 1e-6  # absolute, on weights of at most 1


def test_softmax_over_some_slots_leaves_the_others_at_zero():
    scores = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
    masks = [{1, 4, 6}, {7}]
    found = softmax_over(jnp.asarray([[s in mask for s in range(8)] for mask in masks]), jnp.asarray(scores))
    for b, mask in enumerate(masks):
        np.testing.assert_allclose(found[b], oracle.softmaxed(scores[b].astype(np.float64), mask), atol=F32, rtol=0)


def test_softmax_over_no_slot_is_finite():
    np.testing.assert_allclose(softmax_over(jnp.zeros((1, 8), bool), jnp.ones((1, 2, 8))), 1 / 8, atol=F32, rtol=0)
