"""Times decode attention on a GPU: ours sparse and dense, XLA's, cuDNN's, FlashAttention-2's and the published kernel.

A cell is one layer with LLaMA2-7B's or LLaMA3-8B's heads in bfloat16. Lists hold an eighth of the tokens. A side that
cannot run says why. "With selection" is the mean time of a layer over steps: the ratio's share of the lists is chosen
at every refresh. The query's label channels and the appending of labels are not timed.

    python -m scripts.bench.attention --cells llama2-b16-4k llama3-b16-4k --json rows.json
"""

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hshare_jax.kernels import api, pallas_attention, pallas_selection
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.tiling import Tiles
from hshare_jax.methods.hshare.settings import read_sharing_ratio
from scripts.bench import gpu_timing as timing

Attend = Callable[[Array, "Data"], Array]  # (q, data) -> attention [B, N, H]
PUBLISHED = "published kernel"
RATIOS = ("7/8-3/4-1/2", "1/2-1/2-1/2", "1-1-1")
LABEL_CHANNELS = 32
COLUMNS = ("cell", "side", "time", "must move", "of copy bandwidth", "fastest dense / this", "ideal by bytes")


@dataclasses.dataclass(frozen=True)
class Cell:
    """The attention of one layer; a list serves a kv head."""

    name: str
    N: int
    K: int
    H: int
    B: int
    S: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """(sinks, critical, recent tokens), together an eighth of the cache."""
        sinks, recent = (16, 64) if self.S >= 4096 else (8, 32) if self.S >= 1024 else (2, 8)
        return sinks, self.S // 8 - sinks - recent, recent

    @property
    def label_bytes(self) -> int:
        """The bytes of the labels' codes and scales."""
        return self.B * self.K * self.S * (self.channels // 2 + 2 * 2)

    @property
    def channels(self) -> int:
        """R, the label channels of a head."""
        return min(LABEL_CHANNELS, self.H)

    def attention_bytes(self, tokens: int, num_listed: int = 0) -> int:
        """The bytes of so many tokens' keys and values, of queries and output, and of the lists."""
        return 4 * self.H * (self.B * self.K * tokens + self.B * self.N) + 4 * self.B * self.K * num_listed


class Data(NamedTuple):
    """The arrays that one call reads."""

    keys: Array  # [B, K, S, H]
    values: Array  # [B, K, S, H]
    lists: Array  # [1, B, J, C] int32, ascending
    label_query: Array  # [B, N, R] float32
    codes: Array  # [B, K, R / 2, S] uint8
    scales: Array  # [B, K, 2, S]


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to compute a cell: the bytes that it must move, and what finds its seconds."""

    name: str
    bytes: float
    seconds: Callable[[], float]
    chain: timing.Chain | None = None  # what is compiled ahead


def cells() -> dict[str, Cell]:
    """The twelve cells by name."""
    sizes = [(16, 1), (16, 4), (64, 4), (16, 32), (1, 32), (1, 128)]
    named = {"llama2": timing.LLAMA2_7B, "llama3": timing.LLAMA3_8B}
    found = [
        Cell(f"{name}-b{batch}-{k}k", model.num_heads, model.num_kv_heads, model.head_dim, batch, k * 1024)
        for name, model in named.items()
        for batch, k in sizes
    ]
    return {cell.name: cell for cell in found}


TOY_CELLS = (Cell("toy-mha", 4, 4, 32, 2, 256), Cell("toy-gqa", 4, 2, 32, 1, 512))


def num_data_sets(cell: Cell) -> int:
    """How many data sets keep the lists' rows and the labels cold."""
    return timing.num_data_sets(min(cell.attention_bytes(sum(cell.counts)), cell.label_bytes))


def lacks_memory(cell: Cell) -> str | None:
    """Why a cell does not fit on the device; None where it fits."""
    return timing.lacks_memory((num_data_sets(cell) + 0.5) * (cell.attention_bytes(cell.S) + cell.label_bytes))


@functools.partial(jax.jit, static_argnames=("cell",))
def _spread_lists(seed: Array, cell: Cell) -> Array:
    sinks, critical, recent = cell.counts
    draws = jax.random.uniform(jax.random.key(seed), (1, cell.B, cell.K, cell.S - sinks - recent))
    return sinks + jnp.sort(jnp.argsort(draws, axis=-1)[..., :critical], axis=-1).astype(jnp.int32)


def make_data(cell: Cell, seed: int) -> Data:
    """Random data; the lists are spread at random between sinks and recent tokens."""
    B, N, K, S, H, R = cell.B, cell.N, cell.K, cell.S, cell.H, cell.channels
    bf16, f32, u8 = timing.BF16, jnp.dtype(jnp.float32), jnp.dtype(jnp.uint8)
    shapes = [((B, K, S, H), bf16), ((B, K, S, H), bf16), ((B, N, R), f32), ((B, K, R // 2, S), u8)]
    shapes.append(((B, K, 2, S), bf16))
    arrays = [timing.random_array(8 * seed + i, shape=shape, dtype=dtype) for i, (shape, dtype) in enumerate(shapes)]
    keys, values, label_query, codes, scales = arrays
    return Data(keys, values, _spread_lists(jnp.int32(seed), cell), label_query, codes, scales)


def make_cell(cell: Cell, *, toy: bool) -> tuple[Array, list[Data]]:
    """The query [B, N, H] and as many data sets as a cell needs."""
    q = timing.random_array(99, shape=(cell.B, cell.N, cell.H), dtype=timing.BF16)
    return q, [make_data(cell, seed) for seed in range(2 if toy else num_data_sets(cell))]


def sharing_source(cell: Cell, share: float) -> Array:
    """A plan [B, 1, J] that computes this share of the lists, evenly spread over rows and heads."""
    count = cell.B * cell.K
    is_own = np.diff(np.floor(np.arange(count + 1) * share + 0.5)).astype(bool).reshape(cell.B, 1, cell.K)
    own = np.arange(cell.K)
    return jnp.asarray(np.where(is_own, own, (own + 1) % cell.K), jnp.int32)


def sparse_attention(cell: Cell, *, impl: str = "auto", tiles: Tiles | None = None) -> Attend:
    """Attention through the lists."""
    sinks, _, recent = cell.counts
    source, lengths = sharing_source(cell, 1), jnp.full((cell.B,), cell.S, jnp.int32)
    settings = {"num_sinks": sinks, "max_recent": recent}
    if tiles is None:
        attend = functools.partial(api.sparse_decode, impl=impl, **settings)
    else:
        attend = functools.partial(
            pallas_attention.sparse_decode, tiles=tiles, interpret=impl == "interpret", **settings
        )
    return lambda q, d: attend(q, d.keys, d.values, d.lists, source, 0, lengths, lengths - recent)


def dense_attention(cell: Cell, *, impl: str = "auto", tiles: Tiles | None = None) -> Attend:
    """Our attention over the whole cache."""
    lengths = jnp.full((cell.B,), cell.S, jnp.int32)
    if tiles is None:
        return lambda q, d: api.dense_decode(q, d.keys, d.values, lengths, impl=impl)
    attend = functools.partial(pallas_attention.dense_decode, tiles=tiles, interpret=impl == "interpret")
    return lambda q, d: attend(q, d.keys, d.values, lengths)


def selection(
    cell: Cell, share: float, *, impl: str, tiles: Tiles | None = None
) -> Callable[[Array, Data], tuple[Array, None]]:
    """The choice of this share of the lists by labels, a step of (lists, data)."""
    sinks, critical, recent = cell.counts
    source, every = sharing_source(cell, share), jnp.ones((cell.B,), jnp.int32)
    bounds = (every > 0, sinks * every, (cell.S - recent) * every, critical * every)
    if tiles is None:
        select = functools.partial(api.select_by_labels, impl=impl)
    else:
        select = functools.partial(pallas_selection.select_by_labels, tiles=tiles, interpret=impl == "interpret")
    return lambda lists, d: (select(lists, 0, d.label_query, Labels(d.codes, d.scales), source, *bounds), None)


def attention_chain(attend: Attend, q: Array, data: list[Data], effort: timing.Effort) -> timing.Chain:
    """Calls of one attention. The output has the query's shape, so it is the next call's query."""
    return timing.Chain(lambda q, d: (attend(q, d), None), q, data, effort)


def our_sides(cell: Cell, q: Array, data: list[Data], effort: timing.Effort, impl: str) -> list[Side]:
    """Our attention over the whole cache, through lists, and through lists with selection at several ratios."""
    dense = attention_chain(dense_attention(cell, impl=impl), q, data, effort)
    sparse = attention_chain(sparse_attention(cell, impl=impl), q, data, effort)
    time_sparse = functools.cache(sparse.seconds)
    size = cell.attention_bytes(sum(cell.counts), cell.counts[1])
    sides = [
        Side("ours dense", cell.attention_bytes(cell.S), dense.seconds, dense),
        Side("ours sparse", size, time_sparse, sparse),
    ]
    for ratio in RATIOS:
        layer, head, interval = read_sharing_ratio(ratio)
        share = float(layer * head)
        chain = timing.Chain(selection(cell, share, impl=impl), data[0].lists, data, effort)

        def time_both(chain: timing.Chain = chain, interval: int = interval) -> float:
            return time_sparse() + chain.seconds() / interval

        selected = share / interval * (cell.label_bytes + data[0].lists.nbytes)
        sides.append(Side(f"ours sparse, selection at {ratio}", size + selected, time_both, chain))
    return sides


def other_sides(cell: Cell, q: Array, data: list[Data], effort: timing.Effort) -> list[Side]:
    """Attention over the whole cache by XLA, cuDNN, torch's FlashAttention-2 and the flash_attn package."""
    lengths = jnp.full((cell.B,), cell.S, jnp.int32)

    def reordered(cache: Array) -> Array:
        # cuDNN and flash_attn take [B, S, K, H]. The numbers are random, so the same bytes serve in that order.
        return cache.reshape(cell.B, cell.S, cell.K, cell.H)

    def cudnn(q: Array, d: Data) -> Array:
        keys, values = reordered(d.keys), reordered(d.values)
        return jax.nn.dot_product_attention(q[:, None], keys, values, implementation="cudnn")[:, 0]

    def time_flash_attn() -> float:
        try:
            flash_attn = importlib.import_module("flash_attn")
        except ImportError as error:
            raise RuntimeError("flash_attn is not installed") from error
        arrays = [(q[:, None], reordered(d.keys), reordered(d.values)) for d in data]
        return timing.torch_seconds_per_call(flash_attn.flash_attn_with_kvcache, arrays, effort)

    size = cell.attention_bytes(cell.S)
    chains = {
        "XLA dense": lambda q, d: api.dense_decode(q, d.keys, d.values, lengths, impl="reference"),
        "cuDNN": cudnn,
    }
    chains = {name: attention_chain(attend, q, data, effort) for name, attend in chains.items()}
    sides = [Side(name, size, chain.seconds, chain) for name, chain in chains.items()]
    sides.append(Side("FlashAttention-2 (torch)", size, lambda: time_flash_attention(q, data, effort)))
    return [*sides, Side("flash_attn_with_kvcache", size, time_flash_attn)]


def time_flash_attention(q: Array, data: list[Data], effort: timing.Effort) -> float:
    """Seconds a call of torch's FlashAttention-2."""

    def attend(q, keys, values) -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=q.shape[1] != keys.shape[1])

    return timing.torch_seconds_per_call(attend, [(q, d.keys, d.values) for d in data], effort)


def load_published(checkout: Path, function: str) -> Callable[..., object]:
    """The published kernel, MODULE:FUNCTION in a checkout of the published code."""
    sys.path.insert(0, str(checkout))
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def published_side(
    function: Callable[..., object], cell: Cell, q: Array, data: list[Data], effort: timing.Effort
) -> Side:
    """The published kernel, function(q, keys, values, slots); a head reads its slots [B, N, W] int32 and no others."""
    sinks, critical, recent = cell.counts

    def time() -> float:
        ranges = (jnp.arange(sinks, dtype=jnp.int32), jnp.arange(cell.S - recent, cell.S, dtype=jnp.int32))
        first, last = (jnp.broadcast_to(slots, (cell.B, cell.K, slots.size)) for slots in ranges)
        slots = [jnp.concatenate([first, d.lists[0], last], axis=2) for d in data]
        slots = [jnp.repeat(of_list, cell.N // cell.K, axis=1) for of_list in slots]
        arrays = [(q, d.keys, d.values, of_head) for d, of_head in zip(data, slots, strict=True)]
        return timing.torch_seconds_per_call(function, arrays, effort)

    return Side(PUBLISHED, cell.attention_bytes(sum(cell.counts), critical), time)


def measure(sides: list[Side], cell: Cell) -> Iterator[dict]:
    """Yields each side's row: {"cell", "side", "bytes"} and {"seconds"} or {"error"}."""
    timing.compile_together([side.chain for side in sides if side.chain is not None])
    for side in sides:
        row: dict = {"cell": cell.name, "side": side.name, "bytes": side.bytes}
        # The published kernel may have any signature, so Python's complaints about the arguments are printed too.
        foreign = (TypeError, AttributeError, AssertionError, IndexError) if side.name == PUBLISHED else ()
        try:
            row |= {"seconds": side.seconds()}
        except (*timing.FAILURES, *foreign) as error:
            row |= {"error": timing.reason(error)}
        yield row


def print_rows(rows: list[dict], cell: Cell, bandwidth: float) -> None:
    """Prints the rows of a cell, each beside the fastest dense side."""
    dense_size = cell.attention_bytes(cell.S)
    dense = min((row["seconds"] for row in rows if "seconds" in row and row["bytes"] == dense_size), default=None)
    for row in rows:
        shown = [row.get("error", ""), "", "", "", ""]
        if "seconds" in row:
            seconds, size = row["seconds"], row["bytes"]
            ratio = "" if dense is None else f"{dense / seconds:.2f}"
            share = f"{size / seconds / bandwidth:.0%}"
            shown = [f"{seconds * 1e6:.1f} us", f"{size / 1e6:.2f} MB", share, ratio, f"{dense_size / size:.2f}"]
        print(f"| {row['cell']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measures every cell and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(cells()), default=list(cells()), metavar="CELL")
    parser.add_argument("--published-checkout", type=Path, help="a checkout of HShare's published code")
    parser.add_argument("--published-function", metavar="MODULE:FUNCTION", help="the kernel in that checkout")
    parser.add_argument("--json", type=Path, help="also writes the rows to this file, after every cell")
    parser.add_argument("--toy", action="store_true", help="tiny sizes through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    if (options.published_checkout is None) != (options.published_function is None):
        parser.error("--published-checkout and --published-function go together")
    published = None
    if options.published_function is not None:
        published = load_published(options.published_checkout, options.published_function)
    effort, impl = (timing.TOY, "interpret") if options.toy else (timing.FULL, "pallas")
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    for cell in TOY_CELLS if options.toy else [cells()[name] for name in options.cells]:
        if lack := lacks_memory(cell):
            print(f"| {cell.name} | skipped: {lack} | | | | | |")
            continue
        q, data = make_cell(cell, toy=options.toy)
        sides = [*our_sides(cell, q, data, effort, impl), *other_sides(cell, q, data, effort)]
        if published is not None:
            sides.append(published_side(published, cell, q, data, effort))
        found = list(measure(sides, cell))
        print_rows(found, cell, bandwidth)
        rows += found
        if options.json:
            timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
