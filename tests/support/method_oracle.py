"""The methods of hshare_jax.methods as slow plain NumPy in float64, one row and one head at a time.

Each method is a class. `start(row, num_lists)` reads the prompt of a `row_oracle.Row`. `reads(row, layer, length)`
gives the slots that each head of a layer reads at a decode step.
"""

import numpy as np
import oracle


def weights(row, layer, position, slots=None):
    """The attention [N, T] of each head from this position, over all slots that it sees or only over slots[n]."""
    scores = oracle.key_scores(row.queries[layer][position], row.cached_keys(layer))
    if slots is None:
        return oracle.softmaxed(scores, row.sees(layer, position + 1))
    return np.stack([oracle.softmaxed(scores[n : n + 1], slots[n])[0] for n in range(len(scores))])


def by_list(x, num_lists):
    """The sums [J, T] over the heads of each list."""
    return np.stack([heads.sum(axis=0) for heads in np.split(x, num_lists)])


def spread(reads, num_heads):
    """The slots of each head, which are the slots of the head's list."""
    return [set(reads[n * len(reads) // num_heads]) for n in range(num_heads)]


class Streaming:
    """StreamingLLM: sinks and the last tokens."""

    def __init__(self, num_sinks, num_recent):
        self.num_sinks, self.num_recent = num_sinks, num_recent

    def start(self, row, num_lists):
        """Remembers nothing."""
        self.J = num_lists

    def reads(self, row, layer, length):
        """The slots that each head reads."""
        start = max(0, length - self.num_recent)
        return [oracle.shared_reads([], self.num_sinks, start, row.sees(layer, length))] * row.num_heads


class HeavyHitters:
    """H2O: sums of attention. Whenever a token leaves the recent range, one token is dropped."""

    def __init__(self, num_sinks, num_heavy, num_recent):
        self.num_sinks, self.num_heavy, self.num_recent = num_sinks, num_heavy, num_recent

    def start(self, row, num_lists):
        """Adds up the attention in the prompt and keeps the best tokens that are not recent."""
        self.J, n = num_lists, row.length
        self.sums = [np.zeros((row.num_heads, 4096)) for _ in row.windows]
        self.kept = []
        for layer, sums in enumerate(self.sums):
            for position in range(n):
                sums[:, :n] += weights(row, layer, position)
            old = set(range(self.num_sinks, n - self.num_recent)) & row.sees(layer, n)
            self.kept.append([oracle.select(of_list, old, self.num_heavy) for of_list in by_list(sums, self.J)])

    def reads(self, row, layer, length):
        """The slots that each head reads.

        The token that leaves the recent range competes first. The attention of this step is then added to the sums.
        """
        start, sums = max(0, length - self.num_recent), self.sums[layer]
        leaving = length - self.num_recent - 1
        if leaving >= self.num_sinks:
            for j, of_list in enumerate(by_list(sums, self.J)):
                held = [*self.kept[layer][j], leaving]
                if len(held) > self.num_heavy:
                    seen = row.sees(layer, length)
                    held.remove(min(held, key=lambda slot: (of_list[slot] if slot in seen else -np.inf, slot)))
                self.kept[layer][j] = held
        seen = row.sees(layer, length)
        reads = [oracle.shared_reads(held, self.num_sinks, start, seen) for held in self.kept[layer]]
        reads = spread(reads, row.num_heads)
        found = weights(row, layer, length - 1, reads)
        sums[:, : len(found.T)] += found
        return reads


class Pages:
    """Quest: pages are chosen by the greatest score that a key within the bounds of a page could have."""

    def __init__(self, num_sinks, num_pages, page_size, num_recent):
        self.num_sinks, self.num_pages, self.page_size, self.num_recent = num_sinks, num_pages, page_size, num_recent

    def start(self, row, num_lists):
        """Remembers nothing, because pages are read off the keys."""
        self.J = num_lists

    def reads(self, row, layer, length):
        """The slots that each head reads."""
        size, seen = self.page_size, row.sees(layer, length)
        keys, window = row.cached_keys(layer), row.windows[layer]
        start = max(0, min((length - 1) // size * size, length - self.num_recent))
        first = self.num_sinks if window is None else max(self.num_sinks, length - window)
        group = row.num_heads // row.num_kv_heads
        scores = np.zeros((row.num_heads, -(-length // size)))
        for n, q in enumerate(row.queries[layer][length - 1]):
            for page in range(scores.shape[1]):
                held = keys[n // group, page * size : min((page + 1) * size, length)]
                if len(held):  # the newest page has no key yet if the layer looks up
                    scores[n, page] = np.maximum(q * held.min(axis=0), q * held.max(axis=0)).sum()
        pages = {p for p in range(scores.shape[1]) if (p + 1) * size > first and p * size < start}
        reads = []
        for of_list in by_list(scores, self.J):
            chosen = oracle.select(of_list, pages, self.num_pages)
            listed = [slot for p in chosen for slot in range(p * size, (p + 1) * size) if first <= slot < start]
            reads.append(oracle.shared_reads(listed, self.num_sinks, start, seen))
        return spread(reads, row.num_heads)


class Snapshot:
    """SnapKV: the tokens of the prompt that the last queries look at, with attention smoothed over neighbours."""

    def __init__(self, num_sinks, num_critical, num_observed, kernel_size, keeps_generated):
        self.num_sinks, self.num_critical, self.num_observed = num_sinks, num_critical, num_observed
        self.kernel_size, self.keeps_generated = kernel_size, keeps_generated

    def start(self, row, num_lists):
        """Chooses the tokens of all later steps."""
        self.J, self.prompt, self.kept = num_lists, row.length, []
        n, end = row.length, max(0, row.length - self.num_observed)
        for layer in range(len(row.windows)):
            observed = sum(weights(row, layer, position) for position in range(end, n))
            prefix = np.where(np.arange(n) < end, observed, 0)
            side = self.kernel_size // 2
            smooth = np.stack([np.convolve(head, np.ones(self.kernel_size))[side : side + n] for head in prefix])
            competing = set(range(self.num_sinks, end))
            self.kept.append([oracle.select(s, competing, self.num_critical) for s in by_list(smooth, self.J)])

    def reads(self, row, layer, length):
        """The slots that each head reads."""
        start = max(0, (self.prompt if self.keeps_generated else length) - self.num_observed)
        seen = row.sees(layer, length)
        reads = [oracle.shared_reads(held, self.num_sinks, start, seen) for held in self.kept[layer]]
        return spread(reads, row.num_heads)
