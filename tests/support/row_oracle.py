"""Sequences in a decoder of the LLaMA family, token by token in float64, dense or with HShare, in plain NumPy."""

import dataclasses
import functools

import numpy as np
import oracle
import tail_oracle


def rms_norm(x, scale, eps):
    """Divides x by the root mean square over its last axis, then scales."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, position, theta):
    """Turns channels i and i + H / 2 of x [heads, H] by the angle position * theta^(-2i / H)."""
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
    kv_map: tuple  # the layer whose keys and values serve each layer
    no_rope_layers: tuple  # the layers that do not rotate; those that borrow their keys do not either

    def __post_init__(self):
        self.keys = [[] for _ in self.windows]  # L x length x [K, H]; empty in a layer that borrows keys
        self.values = [[] for _ in self.windows]
        self.queries = [[] for _ in self.windows]  # L x length x [N, H]

    @property
    def length(self):
        """How many tokens have been read."""
        return len(self.keys[0])

    def cached(self, kept, layer):
        """The kept keys or values [K, length, H] that serve a layer."""
        none = np.zeros((self.num_kv_heads, 0, self.head_dim))
        return np.stack(kept[self.kv_map[layer]], axis=1) if kept[self.kv_map[layer]] else none

    def cached_keys(self, layer):
        """The keys [K, length, H] that serve a layer."""
        return self.cached(self.keys, layer)

    def sees(self, layer, length):
        """The slots that the query at position length - 1 sees. A layer that looks up does not see slot length - 1."""
        return oracle.dense_reads(length, self.windows[layer]) - ({length - 1} if self.kv_map[layer] > layer else set())

    def users(self, layer):
        """The layers that read the same keys as this layer."""
        return [other for other, shared in enumerate(self.kv_map) if shared == self.kv_map[layer]]

    def step(self, token, reads_of, tail_of=None):
        """The logits [V] after `token`.

        `reads_of(layer, length)` gives the slots that each head of a layer reads. It is called after the layer's key of
        the token is stored. `tail_of(layer, length)` gives the layer's tail, or None if what is not read is left out.
        """
        N, K, H, position = self.num_heads, self.num_kv_heads, self.head_dim, self.length  # before any key is stored
        x = self.params["embedding"][token].astype(np.float64)
        for layer in range(len(self.windows)):
            weights = self.params[f"layers_{layer}"]
            normed = rms_norm(x, weights["attention_norm"]["scale"], self.eps)
            has_own = self.kv_map[layer] == layer
            fused = weights["qkv" if has_own else "q"]["weight"].astype(np.float64) @ normed
            if has_own:  # for each kv head the queries of its group, its key, its value
                groups = fused.reshape(K, N // K + 2, H)
                fused = groups[:, :-2]
                self.keys[layer].append(self.finished(groups[:, -2], layer, position, "k_norm"))
                self.values[layer].append(groups[:, -1])
            self.queries[layer].append(self.finished(fused.reshape(N, H), layer, position, "q_norm"))
            keys, values = self.cached_keys(layer), self.cached(self.values, layer)
            q, reads = self.queries[layer][-1], reads_of(layer, position + 1)
            tail = None if tail_of is None else tail_of(layer, position + 1)
            if tail is None:
                out = oracle.attention(q, keys, values, reads)
            else:
                out = oracle.attention_with_tail(q, keys, values, reads, self.sees(layer, position + 1), *tail)
            x = x + weights["out"]["weight"].astype(np.float64) @ out.reshape(-1)
            normed = rms_norm(x, weights["mlp_norm"]["scale"], self.eps)
            gate, up = (weights["mlp"]["gate_up"]["weight"].astype(np.float64) @ normed).reshape(-1, 2).T
            x = x + weights["mlp"]["down"]["weight"].astype(np.float64) @ (gate / (1 + np.exp(-gate)) * up)
        normed = rms_norm(x, self.params["final_norm"]["scale"], self.eps)
        return self.params["unembedding"].astype(np.float64) @ normed

    def finished(self, x, layer, position, norm):
        """Queries or keys [heads, H] of one token, normed if the layer has such a norm, then rotated."""
        weights = self.params[f"layers_{layer}"]
        if norm in weights:
            x = rms_norm(x, weights[norm]["scale"], self.eps)
        return x if self.kv_map[layer] in self.no_rope_layers else rotate(x, position, self.theta)

    def dense_step(self, token):
        """The logits [V] after `token`, where every head reads all slots that the layer sees."""
        return self.step(token, lambda layer, length: [self.sees(layer, length)] * self.num_heads)


class SharedRow:
    """One sequence decoded with HShare: dense prefill, then plan and tails, then steps that refresh or reuse."""

    def __init__(self, row, budget):
        self.row, self.budget = row, budget
        self.lists = [[[] for _ in range(budget.num_lists)] for _ in row.windows]
        # What computed lists keep until the next refresh: the lists themselves, or pools.
        self.kept = self.lists if budget.pool == 1 else [[*of_layer] for of_layer in self.lists]
        self.age = self.recent_start = 0
        self.num_read = 0.0  # tokens that the last step read, as the mean over layers and heads

    def prefill(self, tokens):
        """The logits [V] after the last token. Channels, the plan and the tails are found as well."""
        row, budget = self.row, self.budget
        start = row.length
        logits = [row.dense_step(token) for token in tokens][-1]
        L = len(row.windows)
        self.age = 0
        self.channels = [
            oracle.choose_channels(
                np.concatenate([np.stack(row.queries[user][start:]) for user in row.users(layer)]),
                row.cached_keys(layer),
                budget.num_channels,
            )
            for layer in range(L)
        ]
        self.probes = oracle.probe_positions(start, row.length, budget)
        self.similarity = self.find_similarity(self.probes)
        self.take_plan(self.find_plan(self.similarity))
        return logits

    def refit(self, tokens):
        """Reads the last tokens once more, and finds from them what a prefill finds."""
        for kept in (*self.row.keys, *self.row.values, *self.row.queries):
            del kept[len(kept) - len(tokens) :]
        self.prefill(tokens)

    def take_plan(self, source):
        """Reads through this plan from now on, with tails that are fitted to it."""
        self.source, L = source, len(self.row.windows)
        has_tail = [self.budget.tail and layer >= self.budget.dense_layers for layer in range(L)]
        self.tails = [self.fit_tail(layer) if has_tail[layer] else None for layer in range(L)]

    def fit_tail(self, layer):
        """The keys [N, 1 + r, H], values [N, 1 + r, H] and terms [N, 6 + r] of a layer's tails."""
        row, budget = self.row, self.budget
        positions = oracle.tail_probe_positions(self.probes)
        choose = functools.cache(self.choose)
        listed = functools.cache(lambda position: self.read_lists(layer, position, lambda a: choose(a, position)))
        keys, values = row.cached_keys(layer), row.cached(row.values, layer)
        tails = []
        for n in range(row.num_heads):
            k = n // (row.num_heads // row.num_kv_heads)
            probes = []
            for position in positions:
                # What a decode step that chooses anew would read with this query.
                length, j = position + 1, n // (row.num_heads // budget.num_lists)
                seen, recent_start = row.sees(layer, length), length - budget.num_recent
                reads = oracle.shared_reads(listed(position)[j], budget.num_sinks, recent_start, seen)
                probes.append(tail_oracle.probe(row.queries[layer][position][n], keys[k], values[k], reads, seen))
            mean_key = tail_oracle.mean_middle_key(keys[k], budget.num_sinks, budget.num_recent, row.windows[layer])
            tails.append(tail_oracle.fit(probes, mean_key, budget.tail_rank))
        return tuple(np.stack(arrays) for arrays in zip(*tails, strict=True))

    def find_similarity(self, probes):
        """The similarities from which the plan is found. None without probes, or if nothing is shared."""
        budget, L, J = self.budget, len(self.row.windows), self.budget.num_lists
        if not probes or budget.plan is None:
            return None
        # Dense layers have no lists.
        lists = [
            [self.choose(layer, position) if layer >= budget.dense_layers else [[]] * J for layer in range(L)]
            for position in probes
        ]
        if budget.plan == "published":
            return oracle.overlaps(lists, budget.pool * budget.num_critical)
        masses = [[mass for layer in range(L) for mass in self.masses(layer, position)] for position in probes]
        return oracle.caught_masses([[tokens for of_layer in probe for tokens in of_layer] for probe in lists], masses)

    def masses(self, layer, position):
        """For each list of a layer the attention [T] of the list's heads from this position. None in a dense layer."""
        row, J = self.row, self.budget.num_lists
        if layer < self.budget.dense_layers:
            return [None] * J
        scores = oracle.key_scores(row.queries[layer][position], row.cached_keys(layer))
        return oracle.list_masses(scores, row.sees(layer, position + 1), J)

    def find_plan(self, similarity):
        """The plan [L][J] of pairs (layer, list)."""
        L, budget = len(self.row.windows), self.budget
        if similarity is None:
            return oracle.identity(L, budget.num_lists)
        if budget.plan == "published":
            return oracle.published_plan(similarity[0], similarity[1], budget)
        if budget.plan == "anchors":
            return oracle.anchor_plan(similarity, L, budget)
        return oracle.units_plan(similarity, L, budget)

    def scores(self, layer, position):
        """The scores [N, T] by which the query at this position chooses."""
        q, keys = self.row.queries[layer][position], self.row.cached_keys(layer)
        if self.budget.is_exact:
            return oracle.key_scores(q, keys)
        return oracle.label_scores(q, keys, self.channels[layer], self.budget.bits)

    def choose(self, layer, position):
        """The lists, or pools, of a layer that the query at this position chooses."""
        scores = self.scores(layer, position)
        return oracle.critical_tokens(scores, position + 1, self.budget, self.row.windows[layer])

    def read_lists(self, layer, position, kept_in):
        """The J lists that the heads of a layer read. `kept_in(a)` gives what the computed lists of layer a keep."""
        kept = [kept_in(a)[j] for a, j in self.source[layer]]
        if self.budget.pool == 1:
            return kept
        scores = self.scores(layer, position)
        return oracle.lists_in_pools(scores, kept, position + 1, self.budget, self.row.windows[layer])

    @property
    def tail_size(self):
        """How many cached tokens weigh as much as one head's tail, where all numbers have the same size."""
        rank, H = self.budget.tail_rank, self.row.head_dim
        return 1 + rank + (6 + rank) / (2 * H)

    def decode(self, token, is_refresh=None):
        """The logits [V] after `token`. By default the first and every `interval`-th later step refreshes."""
        row, budget = self.row, self.budget
        is_refresh = self.age % budget.interval == 0 if is_refresh is None else is_refresh
        length = row.length + 1
        # Between refreshes the recent range keeps its start and grows. If a refresh is overdue, the range slides.
        self.recent_start = max(self.recent_start, length - (budget.num_recent + budget.interval - 1), 0)
        if is_refresh:
            self.recent_start = max(0, length - budget.num_recent)
        group = row.num_heads // budget.num_lists
        counts = []

        def reads_of(layer, length):
            is_dense = layer < budget.dense_layers
            # A row chooses nothing while it reads everything, and will until the next refresh.
            if is_refresh and not is_dense and row.length + 1 + budget.interval > budget.min_length:
                new = self.choose(layer, length - 1)
                for j in range(budget.num_lists):
                    if self.source[layer][j] == (layer, j):
                        self.kept[layer][j] = new[j]
            listed, seen = self.read_lists(layer, length - 1, self.kept.__getitem__), row.sees(layer, length)
            if budget.pool > 1 and not is_dense:
                self.lists[layer] = listed
            reads = [
                seen
                if is_dense or length < budget.min_length
                else oracle.shared_reads(listed[n // group], budget.num_sinks, self.recent_start, seen)
                for n in range(row.num_heads)
            ]
            # Heads of a list share its tokens, but each has virtual tokens of its own, if it has a tail at all.
            virtual, tails = 0, tail_of(layer, length)
            if tails is not None and np.mean([*map(len, reads)]) < len(seen):
                virtual = self.tail_size * group * np.mean(tails[2][:, 4] > tail_oracle.NOTHING)
            counts.extend(len(of_head) + virtual for of_head in reads)
            return reads

        def tail_of(layer, length):
            return None if length < budget.min_length else self.tails[layer]

        self.age += 1
        logits = row.step(token, reads_of, tail_of)
        self.num_read = float(np.mean(counts))
        return logits


def share_batch_plan(rows):
    """Gives all rows the plan of the mean similarity, taken over the rows that have probes."""
    known = [row.similarity for row in rows if row.similarity is not None]
    mean = None
    if known and rows[0].budget.plan == "published":
        mean = tuple(np.mean(parts, axis=0) for parts in zip(*known, strict=True))
    elif known:
        mean = np.mean(known, axis=0)
    for row in rows:
        row.take_plan(row.find_plan(mean))
