"""Intervals: they hold the measured value, and methods are compared in pairs."""

import numpy as np
import pytest

from hshare_jax.evaluation.bootstrap import interval, mean_ratio


def test_intervals_hold_the_value_and_pair_their_arrays():
    rng = np.random.default_rng(0)
    base = rng.exponential(size=(8, 256))
    low, high = interval(np.mean, base)
    assert low < base.mean() < high
    # The mean of 64 independent blocks of 32 exponentials: 1 / sqrt(2048) is the standard error.
    assert (high - low) == pytest.approx(2 * 1.96 / np.sqrt(2048), rel=0.2)
    # Twice the same numbers: a ratio without spread, which unpaired draws would not give.
    assert interval(mean_ratio, 2 * base, base) == pytest.approx((2, 2))
