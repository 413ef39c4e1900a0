"""The definitions that the tests compare with: slow, plain NumPy in float64, one row at a time.

Written from the papers and shares nothing with the package. Letters as there: N query heads, K kv heads, H head size, J
lists, R label channels, T or S tokens of the row. A set of slots is a Python set.
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np


def attention(q, keys, values, reads):
    """Returns [N, H]: head n of q [N, H] attends to the slots reads[n] of keys and values [K, S, H]."""
    N, H = q.shape
    group = N // keys.shape[0]
    out = np.zeros((N, H))
    for n in range(N):
        slots = sorted(reads[n])
        if not slots:  # position 0 of a layer that looks up
            continue
        scores = keys[n // group, slots] @ q[n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[n] = weights @ values[n // group, slots] / weights.sum()
    return out


def dense_reads(length, window=None):
    """Returns the slots that the query at position length - 1 sees: all up to its own, or the last `window`."""
    return set(range(0 if window is None else max(0, length - window), length))


def shared_reads(listed, num_sinks, recent_start, seen):
    """Returns the slots, of those that are seen, of a head that reads the sinks, its list and what is recent."""
    return {slot for slot in seen if slot < num_sinks or slot in listed or slot >= recent_start}


def choose_channels(queries, keys, num_channels):
    """Returns [K, R] ascending: of every kv head, the channels of the largest mean |q x k| over all pairs.

    Args:
        queries: [T, N, H], all of a prompt; those of a kv head's group count together.
        keys: [K, S, H], all that are cached.
        num_channels: R.
    """
    K, _, H = keys.shape
    group = queries.shape[1] // K
    chosen = []
    for k in range(K):
        of_group = queries[:, k * group : (k + 1) * group].reshape(-1, H)
        mean = np.mean([np.abs(q * keys[k]).mean(axis=0) for q in of_group], axis=0)
        chosen.append(sorted(np.argsort(-mean, kind="stable")[:num_channels]))
    return np.array(chosen)


def quantised(x, bits, dtype: type = np.float64):
    """Returns x [R] as it is read back: offset + step * code, from the least (code 0) to the greatest channel.

    Args:
        x: the label channels of one token and head.
        bits: of a code; None keeps x.
        dtype: what offset and step are kept in.
    """
    x = np.asarray(x, np.float64)
    if bits is None:
        return x
    most = 2**bits - 1
    offset = float(dtype(x.min()))
    step = float(dtype((x.max() - offset) / most))
    codes = np.clip(np.round((x - offset) / step), 0, most) if step > 0 else np.zeros(len(x))
    return offset + step * codes


def label_scores(q, keys, channels, bits=None):
    """Returns [N, T]: q . k / sqrt(H) on the label channels of the head's kv head, both of them quantised.

    The scale is that of attention, not of the few channels: so the softmax of scores estimates attention's weights.
    """
    K, T, _ = keys.shape
    N, H = q.shape
    labels = [[quantised(keys[k, t, channels[k]], bits) for t in range(T)] for k in range(K)]
    scores = np.zeros((N, T))
    for n in range(N):
        k = n // (N // K)
        query = quantised(q[n, channels[k]], bits)
        scores[n] = [np.dot(query, labels[k][t]) / np.sqrt(H) for t in range(T)]
    return scores


def key_scores(q, keys):
    """Returns [N, T]: q . k / sqrt(H) on all channels."""
    N, H = q.shape
    return np.array([keys[n // (N // len(keys))] @ q[n] for n in range(N)]) / np.sqrt(H)


def softmaxed(scores, candidates):
    """Returns [N, T]: the softmax of each head over the candidates, 0 elsewhere."""
    weights, at = np.zeros(scores.shape), sorted(candidates)
    if at:
        weights[:, at] = np.exp(scores[:, at] - scores[:, at].max(axis=1, keepdims=True))
        weights[:, at] /= weights[:, at].sum(axis=1, keepdims=True)
    return weights


def list_masses(scores, seen, num_lists):
    """Returns for each list [T]: what its heads, of scores [N, T], attend to of what is seen, summed over them."""
    weights = softmaxed(scores, seen)
    return [heads.sum(axis=0) for heads in np.split(weights, num_lists)]


def pooled(scores, candidates, num_lists):
    """Returns [J, T]: a list's score is the sum over its heads of the softmax over the candidates."""
    N, T = scores.shape
    if num_lists == N:
        return scores
    return softmaxed(scores, candidates).reshape(num_lists, N // num_lists, T).sum(axis=1)


def dilated(scores, candidates):
    """Returns scores [T] in which a candidate is worth what the candidate right before it is, if that is more."""
    wide = np.array(scores, np.float64)
    for slot in candidates:
        if slot - 1 in candidates:
            wide[slot] = max(scores[slot], scores[slot - 1])
    return wide


def select(scores, candidates, num_critical):
    """Returns the ascending slots of the highest scores [T] among the candidates; a tie goes to the lower slot."""
    return sorted(sorted(candidates, key=lambda slot: (-scores[slot], slot))[:num_critical])


@dataclasses.dataclass(frozen=True)
class Budget:
    """HShare's settings as plain numbers, for one model."""

    num_sinks: int
    num_critical: int
    num_recent: int
    num_lists: int  # of a layer
    num_channels: int = 1
    bits: int | None = None
    is_exact: bool = False  # scores on all channels of the keys
    num_probes: int | None = None  # None: every position that can be one
    interval: int = 1
    is_dilated: bool = False
    ratio: Fraction | None = None  # of a row, how much it may read
    dense_layers: int = 0
    min_length: int = 0
    plan: str | None = None  # "units", "published", "anchors", or None: nothing is shared
    layer_ratio: Fraction = Fraction(1)
    head_ratio: Fraction = Fraction(1)

    @property
    def size(self):
        """Returns the tokens that a head reads right after a refresh."""
        return self.num_sinks + self.num_critical + self.num_recent

    def candidates(self, length, window=None):
        """Returns the slots that compete for the lists of the query at position length - 1."""
        low = self.num_sinks if window is None else max(self.num_sinks, length - window)
        return set(range(low, length - self.num_recent))

    def num_listed(self, length):
        """Returns how many tokens a list of a row of this length may hold."""
        if self.ratio is None:
            return self.num_critical
        return min(max(math.floor(self.ratio * length) - self.num_sinks - self.num_recent, 0), self.num_critical)


def critical_tokens(scores, length, budget, window=None):
    """Returns J lists of slots, chosen by the scores [N, T] of the query at position length - 1."""
    candidates = budget.candidates(length, window)
    scores = pooled(scores, candidates, budget.num_lists)
    if budget.is_dilated and budget.interval > 1:
        scores = [dilated(of_list, candidates) for of_list in scores]
    return [select(of_list, candidates, budget.num_listed(length)) for of_list in scores]


def probe_positions(start, length, budget):
    """Returns the probes of a row whose tokens [start, length) were just read: spread from the first full budget on."""
    first = max(start, budget.size + budget.num_critical - 1)
    count = max(length - first, 0)
    used = count if budget.num_probes is None else min(count, budget.num_probes)
    if used < 2:
        return [first] * used
    return [first + i * (count - 1) // (used - 1) for i in range(used)]


def overlaps(lists, num_critical):
    """Returns (of layers [L, L], of lists [L, J, J]): the mean overlap of critical tokens, for lists[probe][l][j].

    Overlaps are counted as whole numbers and divided last, so that equal overlaps are equal numbers.
    """
    P, L, J = len(lists), len(lists[0]), len(lists[0][0])
    layers, heads = np.zeros((L, L), int), np.zeros((L, J, J), int)
    for probe in lists:
        for a, b in itertools.product(range(L), repeat=2):
            layers[a, b] += sum(len(set(probe[a][j]) & set(probe[b][j])) for j in range(J))
        for layer, i, j in itertools.product(range(L), range(J), range(J)):
            heads[layer, i, j] += len(set(probe[layer][i]) & set(probe[layer][j]))
    return layers / (num_critical * P * J), heads / (num_critical * P)


def caught_masses(lists, masses):
    """Returns [U, U]: how much of the attention of list i's heads the tokens of list j would catch, mean over probes.

    Args:
        lists: lists[probe][u], slots of the lists of all layers.
        masses: masses[probe][u], [T]: the attention of the heads of list u, summed over them; None for dense layers,
            which have no lists.
    """
    P, U = len(lists), len(lists[0])
    caught = np.zeros((U, U))
    for of_probe, mass in zip(lists, masses, strict=True):
        for i, j in itertools.product(range(U), repeat=2):
            caught[i, j] += 0 if mass[i] is None else sum(mass[i][slot] for slot in of_probe[j])
    return caught / P


def num_shared(ratio, num_units):
    """Returns how many of so many units copy: rounded half up, and one always computes."""
    return max(min(math.floor((1 - ratio) * num_units + Fraction(1, 2)), num_units - 1), 0)


def greedy_map(similarity, num_shared):
    """Returns which unit each unit copies, by HShare's Algorithm 1: choose the pairs, then close them transitively."""
    n = len(similarity)
    left = {(i, j): float(similarity[i][j]) for i in range(n) for j in range(i)}
    copies = list(range(n))
    for _ in range(num_shared):
        if not left or max(left.values()) <= 0:
            break
        i, j = min(left, key=lambda pair: (-left[pair], pair))
        copies[i] = j
        left = {pair: value for pair, value in left.items() if i not in pair}
    for i in range(n):
        while copies[i] != copies[copies[i]]:
            copies[i] = copies[copies[i]]
    return copies


def facility_location(caught, num_sources):
    """Returns which unit each unit copies: of so many sources, each the one that then lets all units catch most.

    A unit catches caught[i][j] with the best source j at or below it. The first unit is a source; ties go to the lower
    unit, of sources to add as of sources to copy.
    """
    n = len(caught)
    most = [[float(value) for value in row] for row in caught]

    def worth(sources):
        return sum(max([most[i][j] for j in sources if j <= i], default=0.0) for i in range(n))

    sources = {0}
    while len(sources) < min(num_sources, n):
        sources.add(min(set(range(n)) - sources, key=lambda unit: (-worth(sources | {unit}), unit)))
    return [i if i in sources else min((j for j in sources if j < i), key=lambda j: (-most[i][j], j)) for i in range(n)]


def identity(num_layers, num_lists):
    """Returns the plan [L][J] of pairs (layer, list) in which every list is its own source."""
    return [[(layer, j) for j in range(num_lists)] for layer in range(num_layers)]


def published_plan(of_layers, of_lists, budget):
    """Returns source [L][J] of pairs (layer, list): first the layer is copied, then the list. Dense layers: their own.

    Args:
        of_layers: [L, L], how similar layers are.
        of_lists: [L, J, J], how similar the lists of a layer are.
        budget: with the ratios.
    """
    L, J, dense = len(of_layers), budget.num_lists, budget.dense_layers
    sparse = np.asarray(of_layers)[dense:, dense:]
    layer_map = [*range(dense), *(dense + i for i in greedy_map(sparse, num_shared(budget.layer_ratio, L - dense)))]
    list_maps = [greedy_map(of_layer, num_shared(budget.head_ratio, J)) for of_layer in of_lists]
    return [[(source, j) for j in list_maps[source]] for source in layer_map]


def units_plan(caught, num_layers, budget):
    """Returns source [L][J] of pairs (layer, list), in which a list copies any lower one, for caught masses [U, U].

    The two ratios together say how many of all lists of layers that are not dense are computed.
    """
    L, J, dense = num_layers, budget.num_lists, budget.dense_layers
    units = [(layer, j) for layer in range(dense, L) for j in range(J)]
    plan = identity(L, J)
    if np.max(caught) > 0 and units:
        at = [layer * J + j for layer, j in units]
        computed = len(units) - num_shared(budget.layer_ratio * budget.head_ratio, len(units))
        copies = facility_location(np.asarray(caught)[np.ix_(at, at)], computed)
        for (layer, j), source in zip(units, copies, strict=True):
            plan[layer][j] = units[source]
    return plan


def anchors(caught, num_anchors):
    """Returns which unit each copies: the choice of so many anchors, the first unit among them, that catches most."""
    n = len(caught)

    def copies(chosen):
        return [max(a for a in (0, *chosen) if a <= i) for i in range(n)]

    choices = [copies(chosen) for chosen in itertools.combinations(range(1, n), num_anchors - 1)]
    return max(choices, key=lambda of: sum(caught[i][a] for i, a in enumerate(of)))


def anchor_plan(caught, num_layers, budget):
    """Returns the plan [L][J] of pairs (layer, list) in which layers copy all their lists from an anchor below."""
    L, J, dense = num_layers, budget.num_lists, budget.dense_layers
    of_layers = np.array([[sum(caught[a * J + j][b * J + j] for j in range(J)) for b in range(L)] for a in range(L)])
    plan = identity(L, J)
    if np.max(caught) > 0 and dense < L:
        copied = anchors(of_layers[dense:, dense:], L - dense - num_shared(budget.layer_ratio, L - dense))
        for layer, anchor in enumerate(copied, start=dense):
            plan[layer] = [(dense + anchor, j) for j in range(J)]
    return plan
