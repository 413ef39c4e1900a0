"""Intervals of what was measured, by the bootstrap over blocks of neighbouring positions."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

BLOCK = 32  # neighbouring positions of a window that are drawn together, since they are not independent


def interval(
    statistic: Callable[..., float],
    *scores: Float[np.ndarray, "windows steps"],
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile interval of a statistic of one or more arrays of scores.

    The same blocks are drawn of all arrays, so that methods scored on the same positions are compared pair by pair.

    Args:
        statistic: called with as many arrays, each [blocks, BLOCK]; its value is a number.
        scores: of the same positions; a window's last steps that fill no block are left out, but a short window is one.
        draws: bootstrap samples.
        level: of the interval.
        seed: of the draws.
    """
    block = min(BLOCK, scores[0].shape[1])
    whole = scores[0].shape[1] // block * block
    blocks = [array[:, :whole].reshape(-1, block) for array in scores]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, len(blocks[0]), len(blocks[0]))
        found.append(statistic(*(array[drawn] for array in blocks)))
    low, high = np.percentile(found, [50 - 50 * level, 50 + 50 * level])
    return float(low), float(high)


def mean_ratio(scores: np.ndarray, base: np.ndarray) -> float:
    """Returns the ratio of means, a statistic for `interval`."""
    return float(scores.mean() / base.mean())
