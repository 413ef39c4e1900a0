"""Intervals of measured values, by the bootstrap over blocks of neighbouring positions."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

DRAWS, LEVEL = 2000, 0.95  # bootstrap samples, and the share of them inside an interval
BLOCK = 32  # neighbouring positions of a window that are drawn together, because they depend on one another


def interval(statistic: Callable[..., float], *scores: Float[np.ndarray, "windows steps"]) -> tuple[float, float]:
    """The percentile interval of a statistic of one or more arrays of scores.

    Each draw takes the same blocks of all arrays, so methods scored on the same positions are compared in pairs. The
    draws are written out, because `scipy.stats.bootstrap` draws single values along an axis: to draw blocks with it, an
    array of indices and as many lines would be needed.

    Args:
        statistic: called with one array [blocks, BLOCK] for each array of scores; returns a number.
        scores: arrays over the same positions. The last steps of a window that fill no block are left out; a window
            shorter than a block is one block.
    """
    block = min(BLOCK, scores[0].shape[1])
    whole = scores[0].shape[1] // block * block
    blocks = [array[:, :whole].reshape(-1, block) for array in scores]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(blocks[0]), len(blocks[0]))
        found.append(statistic(*(array[drawn] for array in blocks)))
    low, high = np.percentile(found, [50 - 50 * LEVEL, 50 + 50 * LEVEL])
    return float(low), float(high)


def mean_ratio(scores: np.ndarray, base: np.ndarray) -> float:
    """The ratio of two means, a statistic for `interval`."""
    return float(scores.mean() / base.mean())
