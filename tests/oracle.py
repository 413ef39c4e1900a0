"""The definitions that the tests compare with: slow, plain NumPy in float64, one row at a time.

Written from the papers and shares nothing with the package. Letters as there: N query heads, K kv heads, H head size, J
lists, R label channels, T or S tokens of the row. A set of slots is a Python set.
"""

import dataclasses
import itertools

import numpy as np


def attention(q, keys, values, reads):
    """Returns [N, H]: head n of q [N, H] attends to the slots reads[n] of keys and values [K, S, H]."""
    N, H = q.shape
    group = N // keys.shape[0]
    out = np.zeros((N, H))
    for n in range(N):
        slots = sorted(reads[n])
        scores = np.array([np.dot(q[n], keys[n // group, s]) for s in slots]) / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[n] = weights @ values[n // group, slots] / weights.sum()
    return out


def dense_reads(length, window=None):
    """Returns the slots that the query at position length - 1 sees: all up to its own, or the last `window`."""
    return set(range(0 if window is None else max(0, length - window), length))


def shared_reads(listed, num_sinks, recent_start, length, window=None):
    """Returns the slots of a head that reads the sinks, its list and the range [recent_start, length)."""
    slots = set(range(min(num_sinks, length))) | {s for s in listed if s >= 0} | set(range(recent_start, length))
    return slots & dense_reads(length, window)


def choose_channels(probes, keys, num_channels):
    """Returns [K, R] ascending: of every kv head, the channels of the largest mean |q x k| over all pairs.

    Args:
        probes: [P, N, H]; those of a kv head's group count together. Without any the keys alone count.
        keys: [K, T, H].
        num_channels: R.
    """
    K, _, H = keys.shape
    group = probes.shape[1] // K
    chosen = []
    for k in range(K):
        queries = probes[:, k * group : (k + 1) * group].reshape(-1, H) if len(probes) else np.ones((1, H))
        mean = np.abs(queries[:, None, :] * keys[k][None, :, :]).mean(axis=(0, 1))
        chosen.append(sorted(np.argsort(-mean, kind="stable")[:num_channels]))
    return np.array(chosen)


def label_scores(q, keys, channels):
    """Returns [N, T]: q . k / sqrt(R) on the label channels of the head's kv head."""
    N, group = q.shape[0], q.shape[0] // keys.shape[0]
    picked = [(q[n, channels[n // group]], keys[n // group][:, channels[n // group]]) for n in range(N)]
    return np.array([(k @ query) / np.sqrt(channels.shape[1]) for query, k in picked])


def pooled(scores, candidates, num_lists):
    """Returns [J, T]: a list's score is the sum over its heads of the softmax over the candidates."""
    N, T = scores.shape
    if num_lists == N:
        return scores
    at = sorted(candidates)
    weights = np.zeros((N, T))
    weights[:, at] = np.exp(scores[:, at] - scores[:, at].max(axis=1, keepdims=True)) if at else 0
    weights[:, at] /= weights[:, at].sum(axis=1, keepdims=True) if at else 1
    return weights.reshape(num_lists, N // num_lists, T).sum(axis=1)


def select(scores, candidates, num_critical):
    """Returns the ascending slots of the highest scores [T] among the candidates; a tie goes to the lower slot."""
    return sorted(sorted(candidates, key=lambda slot: (-scores[slot], slot))[:num_critical])


@dataclasses.dataclass(frozen=True)
class Budget:
    """HShare's settings as plain numbers."""

    num_sinks: int
    num_critical: int
    num_recent: int
    num_lists: int
    num_channels: int
    num_probes: int
    interval: int
    num_shared_layers: int
    num_shared_lists: int

    @property
    def size(self):
        """Returns the tokens that a head reads right after a refresh."""
        return self.num_sinks + self.num_critical + self.num_recent


def critical_tokens(q, keys, channels, length, budget, window=None):
    """Returns J lists of slots, chosen by the queries [N, H] at position length - 1 from keys [K, S, H]."""
    low = budget.num_sinks if window is None else max(budget.num_sinks, length - window)
    candidates = set(range(low, length - budget.num_recent))
    scores = pooled(label_scores(q, keys, channels), candidates, budget.num_lists)
    return [select(scores[j], candidates, budget.num_critical) for j in range(budget.num_lists)]


def probe_positions(start, length, budget):
    """Returns the probes of a row whose tokens [start, length) were just read: spread from the first full budget on."""
    first = max(start, budget.size - 1)
    count = max(length - first, 0)
    used = min(count, budget.num_probes)
    if used < 2:
        return [first] * used
    return [first + i * (count - 1) // (used - 1) for i in range(used)]


def similarity(lists):
    """Returns (of layers [L, L], of lists [L, J, J]): the mean overlap of critical tokens, for lists[probe][l][j].

    Overlaps are counted as whole numbers and divided last, so that equal overlaps are equal numbers.
    """
    P, L, J = len(lists), len(lists[0]), len(lists[0][0])
    z = max(len(tokens) for probe in lists for layer in probe for tokens in layer)
    layers, heads = np.zeros((L, L), int), np.zeros((L, J, J), int)
    for probe in lists:
        for a, b in itertools.product(range(L), repeat=2):
            layers[a, b] += sum(len(set(probe[a][j]) & set(probe[b][j])) for j in range(J))
        for layer, i, j in itertools.product(range(L), range(J), range(J)):
            heads[layer, i, j] += len(set(probe[layer][i]) & set(probe[layer][j]))
    return layers / (z * P * J), heads / (z * P)


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


def plan(layer_similarity, list_similarity, num_shared_layers, num_shared_lists):
    """Returns source [L][J] of pairs (layer, list): the query gate aside, first the layer is copied, then the list."""
    layer_map = greedy_map(layer_similarity, num_shared_layers)
    list_maps = [greedy_map(of_layer, num_shared_lists) for of_layer in list_similarity]
    return [[(source, j) for j in list_maps[source]] for source in layer_map]


def rms_norm(x, scale, eps):
    """Returns x over its root mean square, scaled."""
    return x / np.sqrt(np.mean(x * x) + eps) * scale


def rotate(x, position, theta):
    """Returns heads x [heads, H] with channels i and i + H / 2 turned by position * theta^(-2i / H)."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@dataclasses.dataclass
class Row:
    """One sequence in a decoder of the LLaMA family with plain rotary angles, token by token."""

    params: dict
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple
    theta: float
    eps: float

    def __post_init__(self):
        self.keys = [[] for _ in self.windows]  # L x length x [K, H]
        self.values = [[] for _ in self.windows]
        self.queries = [[] for _ in self.windows]  # L x length x [N, H]

    @property
    def length(self):
        """Returns the tokens read so far."""
        return len(self.keys[-1])

    def cached_keys(self, layer):
        """Returns [K, length, H]."""
        return np.stack(self.keys[layer], axis=1)

    def step(self, token, reads_of):
        """Returns logits [V] after `token`; reads_of(layer, length) gives each head's slots, once its key is stored."""
        N, K, H, position = self.num_heads, self.num_kv_heads, self.head_dim, self.length
        x = self.params["embedding"][token].astype(np.float64)
        for layer in range(len(self.windows)):
            weights = self.params[f"layers_{layer}"]
            normed = rms_norm(x, weights["attention_norm"]["scale"], self.eps)
            fused = (weights["qkv"]["weight"].astype(np.float64) @ normed).reshape(N + 2 * K, H)
            self.queries[layer].append(rotate(fused[:N], position, self.theta))
            self.keys[layer].append(rotate(fused[N : N + K], position, self.theta))
            self.values[layer].append(fused[N + K :])
            keys, values = self.cached_keys(layer), np.stack(self.values[layer], axis=1)
            out = attention(self.queries[layer][-1], keys, values, reads_of(layer, position + 1))
            x = x + weights["out"]["weight"].astype(np.float64) @ out.reshape(-1)
            normed = rms_norm(x, weights["mlp_norm"]["scale"], self.eps)
            gate, up = np.split(weights["mlp"]["gate_up"]["weight"].astype(np.float64) @ normed, 2)
            x = x + weights["mlp"]["down"]["weight"].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)
        normed = rms_norm(x, self.params["final_norm"]["scale"], self.eps)
        return self.params["unembedding"].astype(np.float64) @ normed

    def dense_step(self, token):
        """Returns logits [V] after `token`, every layer seeing all that its window holds."""
        return self.step(token, lambda layer, length: [dense_reads(length, self.windows[layer])] * self.num_heads)


class SharedRow:
    """One sequence decoded with HShare: dense prefill, then the plan, then steps that refresh or reuse."""

    def __init__(self, row, budget):
        self.row, self.budget = row, budget
        self.lists = [[[] for _ in range(budget.num_lists)] for _ in row.windows]
        self.age = self.recent_start = 0

    def prefill(self, tokens):
        """Returns logits [V] after the last token; channels and the plan are then known."""
        row, budget = self.row, self.budget
        start = row.length
        logits = [row.dense_step(token) for token in tokens][-1]
        L, J = len(row.windows), budget.num_lists
        self.source = [[(layer, j) for j in range(J)] for layer in range(L)]
        self.age = 0
        probes = probe_positions(start, row.length, budget)
        keys = [row.cached_keys(layer) for layer in range(L)]
        queries = [np.stack(row.queries[layer])[probes] for layer in range(L)]
        self.channels = [choose_channels(queries[layer], keys[layer], budget.num_channels) for layer in range(L)]
        if probes:
            chosen = [
                [
                    critical_tokens(
                        queries[layer][i], keys[layer], self.channels[layer], p + 1, budget, row.windows[layer]
                    )
                    for layer in range(L)
                ]
                for i, p in enumerate(probes)
            ]
            self.source = plan(*similarity(chosen), budget.num_shared_layers, budget.num_shared_lists)
        return logits

    def decode(self, token, is_refresh=None):
        """Returns logits [V] after `token`; None refreshes every `interval` steps, from the first on."""
        row, budget = self.row, self.budget
        is_refresh = self.age % budget.interval == 0 if is_refresh is None else is_refresh
        length = row.length + 1
        # The recent range starts where it did at the refresh and grows; one that is overdue slides.
        self.recent_start = max(self.recent_start, length - (budget.num_recent + budget.interval - 1), 0)
        if is_refresh:
            self.recent_start = max(0, length - budget.num_recent)
        group = row.num_heads // budget.num_lists

        def reads_of(layer, length):
            if is_refresh:
                new = critical_tokens(
                    row.queries[layer][-1],
                    row.cached_keys(layer),
                    self.channels[layer],
                    length,
                    budget,
                    row.windows[layer],
                )
                for j in range(budget.num_lists):
                    if self.source[layer][j] == (layer, j):
                        self.lists[layer][j] = new[j]
            sources = [self.source[layer][n // group] for n in range(row.num_heads)]
            return [
                shared_reads(self.lists[a][j], budget.num_sinks, self.recent_start, length, row.windows[layer])
                for a, j in sources
            ]

        self.age += 1
        return row.step(token, reads_of)
