"""The slots that sparse attention reads, and the weights on them, are those of the definition."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.reads import slots_to_read, weights_of_reads
from hshare_jax.shapes import EMPTY

F32 = 1e-6  # absolute, on weights of at most 1
B, N, K, S, H, NUM_SINKS = 3, 4, 2, 32, 8, 3
LENGTHS, STARTS = np.array([2, 9, S]), np.array([0, 6, S - 4])  # sinks under the recent range, a short row, a full one
LISTED = np.array([[EMPTY] * 3, [3, 5, EMPTY], [4, 11, 27]])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("J", [K, N])
def test_each_slot_is_read_once_with_the_weight_of_attention(J, window):
    rng = np.random.default_rng(1)
    q, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, N, H), (B, K, S, H)))
    listed, lengths, starts = (jnp.asarray(x) for x in (np.repeat(LISTED[:, None], J, axis=1), LENGTHS, STARTS))
    slots = slots_to_read(listed, lengths, starts, num_sinks=NUM_SINKS, max_recent=4, window=window)
    weights = np.asarray(weights_of_reads(jnp.asarray(q), jnp.asarray(keys), slots))
    for b, n in np.ndindex(B, N):
        seen = oracle.dense_reads(int(LENGTHS[b]), window)
        reads = oracle.shared_reads(LISTED[b].tolist(), NUM_SINKS, int(STARTS[b]), seen)
        places = np.asarray(slots[b, n * J // N])
        assert sorted(places[places != EMPTY].tolist()) == sorted(reads)
        scores = oracle.key_scores(q[b].astype(np.float64), keys[b].astype(np.float64))
        expected = np.where(places == EMPTY, 0, oracle.softmaxed(scores, reads)[n, places])
        np.testing.assert_allclose(weights[b, n], expected, atol=F32, rtol=0)
