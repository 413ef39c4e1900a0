"""The fit of a tail, written from its definition: slow plain NumPy in float64, one head of one row at a time.

A probe is a query of the prompt. It tells how the slots that a decode step reads relate to the slots that the step sees
and does not read, which are called the rest. The letters are the package's.
"""

import dataclasses

import numpy as np

NOTHING = -1e30  # the log of a weight that is nothing


@dataclasses.dataclass
class Probe:
    """What the query of one head finds in the slots that it reads, and in the rest."""

    query: np.ndarray  # [H]
    total: float  # the log of the sum of the exponentiated scores that are read
    mean: float  # the mean of these scores
    out: np.ndarray  # [H], the attention over what is read
    rest_total: float
    rest_out: np.ndarray  # [H]
    num_rest: int

    @property
    def share(self):
        """The part of the whole attention that belongs to the rest."""
        return np.exp(self.rest_total - np.logaddexp(self.total, self.rest_total))

    @property
    def density(self):
        """The log of the mean exponentiated score of the rest."""
        return self.rest_total - np.log(self.num_rest)


def attend(q, keys, values, slots):
    """The scores, the log of the sum of their exponentials, and the attention [H], over some slots of [T, H]."""
    scores = keys[slots] @ q / np.sqrt(len(q))
    total = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    return scores, total, np.exp(scores - total) @ values[slots]


def probe(q, keys, values, reads, seen):
    """The probe of a query [H] that reads and sees these slots of [T, H]. None if it reads all or nothing."""
    read, rest = sorted(reads & seen), sorted(seen - reads)
    if not read or not rest:
        return None
    scores, total, out = attend(q, keys, values, read)
    _, rest_total, rest_out = attend(q, keys, values, rest)
    return Probe(q, total, scores.mean(), out, rest_total, rest_out, len(rest))


def mean_middle_key(keys, num_sinks, num_recent, window):
    """The mean [H] of the keys [T, H] of a row inside its window, between sinks and recent tokens; zero without any."""
    first = num_sinks if window is None else max(num_sinks, len(keys) - window)
    middle = keys[first : max(len(keys) - num_recent, 0)]
    return middle.mean(axis=0) if len(middle) else np.zeros(keys.shape[1])


def ridge(features, targets, weights, penalty, has_constant):
    """The coefficients [F, ...], and the constant, that minimise sum of weights * error^2 + penalty * |coefficients|^2.

    The features are [P, F] and the targets [P, ...]. The constant is not penalised, and is 0 without `has_constant`.
    """
    F = features.shape[1]
    ones = np.full((len(features), 1), float(has_constant))
    root = np.sqrt(weights)[:, None]
    rows = np.concatenate([root * np.hstack([features, ones]), np.sqrt(penalty) * np.eye(F, F + 1)])
    wanted = np.concatenate([root * targets.reshape(len(targets), -1), np.zeros((F, targets[0].size))])
    found = np.linalg.lstsq(rows, wanted, rcond=None)[0].reshape(F + 1, *targets.shape[1:])
    return found[:F], found[F]


def no_tail(H, rank):
    """The keys, values and terms of a head that has no tail."""
    return np.zeros((1 + rank, H)), np.zeros((1 + rank, H)), np.array([0, 0, 0, NOTHING, NOTHING, 0, *[0] * rank])


def fit(probes, mean_key, rank):
    """One head's tail, in `oracle.attention_with_tail`'s words: keys [1 + r, H], values [1 + r, H], terms [6 + r].

    Args:
        probes: those of the head's row, in order. None for a probe that does not count.
        mean_key: from `mean_middle_key`.
        rank: r.
    """
    H = len(mean_key)
    probes = [one for one in probes if one is not None]
    shares = np.array([one.share for one in probes])
    if not (shares > np.finfo(np.float32).tiny).any():  # float32 holds no smaller share, only 0
        return no_tail(H, rank)
    key, weight_terms = fit_weight(probes, shares * (1 - shares) + 1e-4, mean_key)
    weights = shares / shares.sum()
    follow, value = fit_value(probes, weights)
    directions, shifts, moved = fit_directions(probes, weights, follow, value, rank)
    return np.stack([key, *directions]), np.stack([value, *moved]), np.array([*weight_terms, follow, *shifts])


def fit_weight(probes, weights, mean_key):
    """The first virtual token's key [H], and the terms constant, of_total, of_mean, low and high."""
    H = len(mean_key)
    weights = weights / weights.sum()
    density = np.array([one.density for one in probes])
    x = np.array([[one.query @ mean_key / np.sqrt(H), one.total, one.mean] for one in probes])
    centred = x - weights @ x
    scale = np.maximum(np.sqrt(weights @ centred**2), 0.03)
    guess = (x[:, 0] + x[:, 1]) / 2
    slopes, _ = ridge(centred / scale, density - guess, weights, 0.03, has_constant=True)
    c1, c2, c3 = slopes / scale + [0.5, 0.5, 0]
    constant = weights @ (density - x @ [c1, c2, c3])  # the mean error is zero
    return c1 * mean_key, [constant, c2, c3, density.min() - 0.3, density.max() + 0.3]


def fit_value(probes, weights):
    """How much the value of the rest follows the attention over what is read, and the first virtual token's value."""
    out, rest = (np.stack([getattr(one, name) for one in probes]) for name in ("out", "rest_out"))
    mean, rest_mean = weights @ out, weights @ rest
    together = sum(w * ((o - mean) @ (r - rest_mean)) for w, o, r in zip(weights, out, rest, strict=True))
    alone = sum(w * ((o - mean) @ (o - mean)) for w, o in zip(weights, out, strict=True))
    follow = min(max(together / max(alone, 1e-9), 0), 1)
    return follow, rest_mean - follow * mean


def fit_directions(probes, weights, follow, value, rank):
    """The keys, shifts and values of the r further virtual tokens."""
    if rank == 0:
        return [], [], []
    queries = np.stack([one.query for one in probes])
    mean = weights @ queries
    covariance = sum(w * np.outer(q - mean, q - mean) for w, q in zip(weights, queries, strict=True))
    variances, axes = np.linalg.eigh(covariance)
    best = np.argsort(-variances)[:rank]
    least = max(1e-6, 1e-5 * variances.max())
    directions = np.stack([axes[:, i] / np.sqrt(variances[i]) if variances[i] > least else 0 * mean for i in best])
    features = np.clip((queries - mean) @ directions.T, -2.5, 2.5)
    errors = np.stack([one.rest_out - value - follow * one.out for one in probes])
    moved, _ = ridge(features, errors, weights, 0.1, has_constant=False)
    return directions * np.sqrt(len(mean)), directions @ mean, moved
