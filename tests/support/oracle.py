"""The definitions that the tests compare with, as slow plain NumPy in float64, one row at a time.

The definitions are written from the papers and share no code with the package. The letters are the package's: N query
heads, K kv heads, H head size, J lists, R label channels, T or S tokens of the row. A set of slots is a Python set.
"""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np


def attention(q, keys, values, reads):
    """Attention [N, H] of one query per head. Head n of q [N, H] reads the slots reads[n] of keys, values [K, S, H]."""
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


def attention_with_tail(q, keys, values, reads, seen, tail_keys, tail_values, terms):
    """Attention [N, H] where a tail stands for the slots that a head sees and does not read.

    Args:
        q, keys, values, reads: as `attention` takes them. A head that reads nothing must see nothing.
        seen: the slots that the query sees. Head n does not read those of them that are not in reads[n].
        tail_keys, tail_values: the virtual tokens [N, 1 + r, H] of each head.
        terms: for each head constant, of_total, of_mean, low, high, follow, and r shifts [N, 6 + r].
    """
    N, H = q.shape
    out = attention(q, keys, values, reads)
    for n in range(N):
        num_unread = len(seen - reads[n])
        if num_unread == 0:
            continue
        constant, of_total, of_mean, low, high, follow, *shifts = terms[n]
        scores = keys[n // (N // len(keys)), sorted(reads[n])] @ q[n] / np.sqrt(H)
        total = scores.max() + np.log(np.exp(scores - scores.max()).sum())
        tail_scores = [key @ q[n] / np.sqrt(H) for key in tail_keys[n]]
        estimate = constant + tail_scores[0] + of_total * total + of_mean * scores.mean()
        log_weight = np.log(num_unread) + min(max(estimate, low), high)
        value = tail_values[n, 0] + follow * out[n]
        for i, shift in enumerate(shifts, start=1):
            value = value + min(max(tail_scores[i] - shift, -2.5), 2.5) * tail_values[n, i]
        # Two groups of tokens share the softmax, by the weights exp(total) and exp(log_weight).
        peak = max(total, log_weight)
        weights = np.exp([total - peak, log_weight - peak])
        out[n] = (weights[0] * out[n] + weights[1] * value) / weights.sum()
    return out


def dense_reads(length, window=None):
    """The slots that the query at position length - 1 sees: all slots so far, or the last `window` slots."""
    return set(range(0 if window is None else max(0, length - window), length))


def shared_reads(listed, num_sinks, recent_start, seen):
    """The slots that a head reads: the sinks, the listed slots and the recent range, as far as they are seen."""
    return {slot for slot in seen if slot < num_sinks or slot in listed or slot >= recent_start}


def choose_channels(queries, keys, num_channels):
    """The label channels [K, R], ascending: for every kv head the channels of largest mean |q x k| over all pairs.

    Args:
        queries: all queries of a prompt [T, N, H]. The queries of a kv head's group count together.
        keys: all cached keys [K, S, H].
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
    """The values that each quantised row of x [..., R] is read back as: offset + step * code.

    Code 0 is the least channel of a row, and the highest code is the greatest channel.

    Args:
        x: rows that each hold the label channels of one token and head.
        bits: the bits of a code. None returns x.
        dtype: the dtype in which offset and step are kept.
    """
    x = np.asarray(x, np.float64)
    if bits is None:
        return x
    most = 2**bits - 1
    offset = x.min(axis=-1, keepdims=True).astype(dtype).astype(np.float64)
    step = ((x.max(axis=-1, keepdims=True) - offset) / most).astype(dtype).astype(np.float64)
    codes = np.clip(np.round((x - offset) / np.where(step > 0, step, 1)), 0, most)
    return offset + step * codes


def read_labels(codes, scales, bits, num_channels):
    """The labels [B, K, S, R] that codes and scales stand for, unpacked byte by byte as `Labels` documents it."""
    if bits is None:
        return np.moveaxis(np.asarray(codes, np.float64), 2, 3)
    codes, half = np.asarray(codes), -(-num_channels // 2)
    if bits == 4:
        codes = np.stack(
            [codes[:, :, r] % 16 if r < half else codes[:, :, r - half] // 16 for r in range(num_channels)], 2
        )
    offset, step = np.moveaxis(np.asarray(scales, np.float64), 2, 0)
    return np.moveaxis(offset[:, :, None] + step[:, :, None] * codes, 2, 3)


def label_scores(q, keys, channels, bits=None):
    """The scores [N, T]: q . k / sqrt(H) on the label channels of the head's kv head, with q and k quantised.

    The scale is 1 / sqrt(H), as in attention, so the softmax of the scores estimates the weights of attention.
    """
    K, T, _ = keys.shape
    N, H = q.shape
    labels = [quantised(keys[k][:, channels[k]], bits) for k in range(K)]
    scores = np.zeros((N, T))
    for n in range(N):
        k = n // (N // K)
        query = quantised(q[n, channels[k]], bits)
        scores[n] = labels[k] @ query / np.sqrt(H)
    return scores


def key_scores(q, keys):
    """The scores [N, T]: q . k / sqrt(H) on all channels."""
    N, H = q.shape
    return np.array([keys[n // (N // len(keys))] @ q[n] for n in range(N)]) / np.sqrt(H)


def softmaxed(scores, candidates):
    """The softmax [N, T] of each head's scores over the candidates. All other slots have weight 0."""
    weights, at = np.zeros(scores.shape), sorted(candidates)
    if at:
        weights[:, at] = np.exp(scores[:, at] - scores[:, at].max(axis=1, keepdims=True))
        weights[:, at] /= weights[:, at].sum(axis=1, keepdims=True)
    return weights


def list_masses(scores, seen, num_lists):
    """For each list the attention [T] to the seen slots, summed over the heads of the list. Scores are [N, T]."""
    weights = softmaxed(scores, seen)
    return [heads.sum(axis=0) for heads in np.split(weights, num_lists)]


def pooled(scores, candidates, num_lists):
    """The scores [J, T] by which lists choose.

    A list of several heads sums the softmax of each head over the candidates. A list of one head keeps the scores of
    the head.
    """
    N, T = scores.shape
    if num_lists == N:
        return scores
    return softmaxed(scores, candidates).reshape(num_lists, N // num_lists, T).sum(axis=1)


def dilated(scores, candidates):
    """Scores [T] in which each candidate has at least the score of the candidate right before it."""
    wide = np.array(scores, np.float64)
    for slot in candidates:
        if slot - 1 in candidates:
            wide[slot] = max(scores[slot], scores[slot - 1])
    return wide


def select(scores, candidates, num_critical):
    """The slots, ascending, of the highest scores [T] among the candidates. A tie goes to the lower slot."""
    return sorted(sorted(candidates, key=lambda slot: (-scores[slot], slot))[:num_critical])


@dataclasses.dataclass(frozen=True)
class Budget:
    """HShare's settings as plain numbers, for one model."""

    num_sinks: int
    num_critical: int
    num_recent: int
    num_lists: int  # lists of a layer
    num_channels: int = 1
    bits: int | None = None
    is_exact: bool = False  # scores use all channels of the keys
    num_probes: int | None = None  # None: every possible position is a probe
    interval: int = 1
    is_dilated: bool = False
    ratio: Fraction | None = None  # the share of a row's tokens that a head may read
    dense_layers: int = 0
    min_length: int = 0
    plan: str | None = None  # "units", "published" or "anchors"; None shares nothing
    layer_ratio: Fraction = Fraction(1)
    head_ratio: Fraction = Fraction(1)
    tail: bool = False
    tail_rank: int = 0
    pool: int = 1  # computed lists keep so many times their tokens, among which every list chooses

    @property
    def size(self):
        """How many tokens a head reads right after a refresh."""
        return self.num_sinks + self.num_critical + self.num_recent

    def candidates(self, length, window=None):
        """The slots that compete for the lists of the query at position length - 1."""
        low = self.num_sinks if window is None else max(self.num_sinks, length - window)
        return set(range(low, length - self.num_recent))

    def num_listed(self, length):
        """How many tokens a list may hold in a row of this length."""
        if self.ratio is None:
            return self.num_critical
        return min(max(math.floor(self.ratio * length) - self.num_sinks - self.num_recent, 0), self.num_critical)


def critical_tokens(scores, length, budget, window=None):
    """The J lists, or pools, of slots that the scores [N, T] of the query at position length - 1 choose."""
    candidates = budget.candidates(length, window)
    scores = pooled(scores, candidates, budget.num_lists)
    if budget.is_dilated and budget.interval > 1:
        scores = [dilated(of_list, candidates) for of_list in scores]
    return [select(of_list, candidates, budget.pool * budget.num_listed(length)) for of_list in scores]


def lists_in_pools(scores, pools, length, budget, window=None):
    """The J lists that the scores [N, T] choose, each in a pool: each list by the scores of its own heads."""
    lists = []
    for of_heads, pool in zip(np.split(scores, len(pools)), pools, strict=True):
        candidates = set(pool) & dense_reads(length, window)
        lists.append(select(pooled(of_heads, candidates, 1)[0], candidates, budget.num_listed(length)))
    return lists


def probe_positions(start, length, budget):
    """The positions of the probes of a row whose tokens [start, length) were just read: the last ones.

    A probe needs twice as many candidates as a list holds, so the first tokens of a row are no probes.
    """
    positions = list(range(max(start, budget.size + budget.num_critical - 1), length))
    return positions if budget.num_probes is None else positions[max(len(positions) - budget.num_probes, 0) :]


def tail_probe_positions(positions):
    """The last 64 probes of a row."""
    return positions[-64:]


def overlaps(lists, num_critical):
    """The mean overlap of critical tokens between layers [L, L], and between the lists of each layer [L, J, J].

    The critical tokens are given as lists[probe][l][j]. Overlaps are counted as whole numbers and divided last, so that
    equal overlaps are equal numbers.
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
    """The attention of list i's heads that the tokens of list j would catch [U, U], as the mean over probes.

    Args:
        lists: lists[probe][u], the slots of list u. The U lists are the lists of all layers.
        masses: masses[probe][u] [T], the attention summed over the heads of list u. None in dense layers, because they
            have no lists.
    """
    P, U = len(lists), len(lists[0])
    caught = np.zeros((U, U))
    for of_probe, mass in zip(lists, masses, strict=True):
        for i, j in itertools.product(range(U), repeat=2):
            caught[i, j] += 0 if mass[i] is None else sum(mass[i][slot] for slot in of_probe[j])
    return caught / P


def num_shared(ratio, num_units):
    """How many of `num_units` units copy. The number is rounded half up, and at least one unit computes."""
    return max(min(math.floor((1 - ratio) * num_units + Fraction(1, 2)), num_units - 1), 0)


def greedy_map(similarity, num_shared):
    """The unit that each unit copies, by HShare's Algorithm 1. Pairs are chosen first, then closed transitively."""
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
    """The unit that each unit copies, with `num_sources` sources that are chosen one by one.

    Unit i catches caught[i][j] with the best source j at or below i. The first unit is a source. Each further source is
    the unit with which all units together catch most. Ties go to the lower unit, both when a source is added and when
    a unit chooses the source that it copies.
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
    """The plan [L][J] of pairs (layer, list) in which no list copies another."""
    return [[(layer, j) for j in range(num_lists)] for layer in range(num_layers)]


def published_plan(of_layers, of_lists, budget):
    """The published plan [L][J] of pairs (layer, list). Layers copy first, then lists. Dense layers copy nothing.

    Args:
        of_layers: the similarity of layers [L, L].
        of_lists: the similarity of the lists of each layer [L, J, J].
        budget: holds the ratios.
    """
    L, J, dense = len(of_layers), budget.num_lists, budget.dense_layers
    sparse = np.asarray(of_layers)[dense:, dense:]
    layer_map = [*range(dense), *(dense + i for i in greedy_map(sparse, num_shared(budget.layer_ratio, L - dense)))]
    list_maps = [greedy_map(of_layer, num_shared(budget.head_ratio, J)) for of_layer in of_lists]
    return [[(source, j) for j in list_maps[source]] for source in layer_map]


def units_plan(caught, num_layers, budget):
    """The plan "units" [L][J] of pairs (layer, list), for caught masses [U, U]. A list may copy any lower list.

    The product of the two ratios is the share of lists that are computed. Lists of dense layers do not count.
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
    """The anchor that each unit copies. The first unit is an anchor, and the choice of the others catches most."""
    n = len(caught)

    def copies(chosen):
        return [max(a for a in (0, *chosen) if a <= i) for i in range(n)]

    choices = [copies(chosen) for chosen in itertools.combinations(range(1, n), num_anchors - 1)]
    return max(choices, key=lambda of: sum(caught[i][a] for i, a in enumerate(of)))


def anchor_plan(caught, num_layers, budget):
    """The plan "anchors" [L][J] of pairs (layer, list). A layer copies all lists from the nearest anchor below."""
    L, J, dense = num_layers, budget.num_lists, budget.dense_layers
    of_layers = np.array([[sum(caught[a * J + j][b * J + j] for j in range(J)) for b in range(L)] for a in range(L)])
    plan = identity(L, J)
    if np.max(caught) > 0 and dense < L:
        copied = anchors(of_layers[dense:, dense:], L - dense - num_shared(budget.layer_ratio, L - dense))
        for layer, anchor in enumerate(copied, start=dense):
            plan[layer] = [(dense + anchor, j) for j in range(J)]
    return plan
