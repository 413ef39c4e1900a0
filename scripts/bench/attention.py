"""Times decode attention on a GPU: ours through lists and dense, XLA's, cuDNN's, FlashAttention-2's, the published one.

One layer of LLaMA2-7B's or LLaMA3-8B's heads in bfloat16; lists make up an eighth of the tokens. A side that cannot run
says why. With selection means: what a layer takes on average over steps, where the ratio's share of the lists is chosen
every refresh; the query's label channels and the appending of labels are left out.

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

from hshare_jax.kernels import api, pallas_attention, pallas_selection, reference_attention
from hshare_jax.kernels.tiling import Tiles
from hshare_jax.methods.hshare.settings import HShareSettings
from scripts.bench import gpu_timing as timing

PUBLISHED = "published kernel"
RATIOS = ("7/8-3/4-1/2", "1/2-1/2-1/2", "1-1-1")
LABEL_CHANNELS = 32
COLUMNS = ("cell", "side", "time", "must move", "of copy bandwidth", "fastest dense / this", "ideal by bytes")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer's attention; a list serves a kv head."""

    name: str
    N: int
    K: int
    H: int
    B: int
    S: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Returns (sinks, critical, recent tokens), an eighth of the cache together."""
        sinks, recent = (16, 64) if self.S >= 4096 else (8, 32) if self.S >= 1024 else (2, 8)
        return sinks, self.S // 8 - sinks - recent, recent

    @property
    def label_bytes(self) -> int:
        """Returns the bytes of the codes and scales of the labels."""
        return self.B * self.K * self.S * (self.channels // 2 + 2 * 2)

    @property
    def channels(self) -> int:
        """Returns R."""
        return min(LABEL_CHANNELS, self.H)

    def attention_bytes(self, tokens: int, num_listed: int = 0) -> int:
        """Returns the bytes of keys and values of so many tokens, of queries and output, and of the lists."""
        return 4 * self.H * (self.B * self.K * tokens + self.B * self.N) + 4 * self.B * self.K * num_listed


class Data(NamedTuple):
    """What one call reads."""

    keys: Array  # [B, K, S, H]
    values: Array  # [B, K, S, H]
    lists: Array  # [1, B, J, C] int32, ascending
    label_query: Array  # [B, N, R] float32
    codes: Array  # [B, K, R / 2, S] uint8
    scales: Array  # [B, K, 2, S]


def cells() -> dict[str, Cell]:
    """Returns the twelve cells by name."""
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
    """Returns how many data sets make lists' rows and labels cold."""
    return timing.num_data_sets(min(cell.attention_bytes(sum(cell.counts)), cell.label_bytes))


@functools.partial(jax.jit, static_argnames=("cell",))
def _spread_lists(seed: Array, cell: Cell) -> Array:
    sinks, critical, recent = cell.counts
    draws = jax.random.uniform(jax.random.key(seed), (1, cell.B, cell.K, cell.S - sinks - recent))
    return sinks + jnp.sort(jnp.argsort(draws, axis=-1)[..., :critical], axis=-1).astype(jnp.int32)


def make_data(cell: Cell, seed: int) -> Data:
    """Returns random data; the lists are spread at random between sinks and recent tokens."""
    B, N, K, S, H, R = cell.B, cell.N, cell.K, cell.S, cell.H, cell.channels
    bf16, f32, u8 = (jnp.dtype(name) for name in ("bfloat16", "float32", "uint8"))
    shapes = [((B, K, S, H), bf16), ((B, K, S, H), bf16), ((B, N, R), f32), ((B, K, R // 2, S), u8)]
    shapes.append(((B, K, 2, S), bf16))
    arrays = [timing.random_array(8 * seed + i, shape=shape, dtype=dtype) for i, (shape, dtype) in enumerate(shapes)]
    keys, values, label_query, codes, scales = arrays
    return Data(keys, values, _spread_lists(jnp.int32(seed), cell), label_query, codes, scales)


def sharing_source(cell: Cell, share: float) -> Array:
    """Returns a plan [B, 1, J] by which this share of the lists, evenly spread over rows and heads, is computed."""
    count = cell.B * cell.K
    is_own = np.diff(np.floor(np.arange(count + 1) * share + 0.5)).astype(bool).reshape(cell.B, 1, cell.K)
    own = np.arange(cell.K)
    return jnp.asarray(np.where(is_own, own, (own + 1) % cell.K), jnp.int32)


def sparse_attention(cell: Cell, *, impl: str = "auto", tiles: Tiles | None = None) -> Callable[[Array, Data], Array]:
    """Returns attention through the lists, a function of (q, data)."""
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


def selection(
    cell: Cell, share: float, *, interpret: bool, tiles: Tiles | None = None
) -> Callable[[Array, Data], tuple[Array, None]]:
    """Returns the choice of this share of the lists by labels, a step of (lists, data)."""
    sinks, critical, recent = cell.counts
    source, every = sharing_source(cell, share), jnp.ones((cell.B,), jnp.int32)
    bounds = (every > 0, sinks * every, (cell.S - recent) * every, critical * every)
    return lambda lists, d: (
        pallas_selection.select_labels(
            lists, 0, d.label_query, d.codes, d.scales, source, *bounds, tiles=tiles, interpret=interpret
        ),
        None,
    )


def dense_sides(cell: Cell, impl: str) -> dict[str, Callable[[Array, Data], Array]]:
    """Returns the dense sides in JAX, functions of (q, data)."""
    lengths = jnp.full((cell.B,), cell.S, jnp.int32)

    def cudnn(q: Array, d: Data) -> Array:
        # It takes [B, S, K, H]. The numbers are random, so the same bytes read in that order do: no transposition.
        keys, values = (cache.reshape(cell.B, cell.S, cell.K, cell.H) for cache in (d.keys, d.values))
        return jax.nn.dot_product_attention(q[:, None], keys, values, implementation="cudnn")[:, 0]

    return {
        "ours dense": lambda q, d: api.dense_decode(q, d.keys, d.values, lengths, impl=impl),
        "XLA dense": lambda q, d: reference_attention.dense_decode(q, d.keys, d.values, lengths),
        "cuDNN": cudnn,
    }


def time_flash_attention(q: Array, data: list[Data], effort: timing.Effort) -> float:
    """Returns seconds a call of torch's FlashAttention-2."""

    def attend(q, keys, values) -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=q.shape[1] != keys.shape[1])

    return timing.torch_seconds_per_call(attend, [(q, d.keys, d.values) for d in data], effort)


def time_published(
    function: Callable[..., object], cell: Cell, q: Array, data: list[Data], effort: timing.Effort
) -> float:
    """Returns seconds a call of function(q, keys, values, slots); slots [B, N, W] int32 are all that a head reads."""
    sinks, _, recent = cell.counts
    ranges = (jnp.arange(sinks, dtype=jnp.int32), jnp.arange(cell.S - recent, cell.S, dtype=jnp.int32))
    first, last = (jnp.broadcast_to(slots, (cell.B, cell.K, slots.size)) for slots in ranges)
    slots = [jnp.concatenate([first, d.lists[0], last], axis=2) for d in data]
    slots = [jnp.repeat(of_list, cell.N // cell.K, axis=1) for of_list in slots]
    arrays = [(q, d.keys, d.values, of_head) for d, of_head in zip(data, slots, strict=True)]
    return timing.torch_seconds_per_call(function, arrays, effort)


def sides(
    cell: Cell, published: Callable[..., object] | None, effort: timing.Effort, impl: str
) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """Yields (name, bytes that it must move, what returns its seconds) of each side; the dense ones come first."""
    data = [make_data(cell, seed) for seed in range(2 if effort is timing.TOY else num_data_sets(cell))]
    q = timing.random_array(99, shape=(cell.B, cell.N, cell.H), dtype=jnp.dtype(jnp.bfloat16))

    def time_chain(attend: Callable[[Array, Data], Array]) -> float:
        # The output has the query's shape: it is the next call's query.
        return timing.seconds_per_call(lambda q, d: (attend(q, d), None), q, data, effort)

    size = cell.attention_bytes(cell.S)
    for name, attend in dense_sides(cell, impl).items():
        yield name, size, functools.partial(time_chain, attend)
    yield "FlashAttention-2 (torch)", size, lambda: time_flash_attention(q, data, effort)
    size, sparse = cell.attention_bytes(sum(cell.counts), cell.counts[1]), sparse_attention(cell, impl=impl)
    if published is not None:
        yield PUBLISHED, size, lambda: time_published(published, cell, q, data, effort)
    time_sparse = functools.cache(lambda: time_chain(sparse))
    yield "ours sparse", size, time_sparse
    for ratio in RATIOS:
        config = HShareSettings().with_sharing_ratio(ratio)
        share, interval = float(config.layer_ratio * config.head_ratio), config.refresh_interval
        step = selection(cell, share, interpret=impl == "interpret")

        def time_both(step=step, interval=interval) -> float:
            return time_sparse() + timing.seconds_per_call(step, data[0].lists, data, effort) / interval

        selected = share / interval * (cell.label_bytes + data[0].lists.nbytes)
        yield f"ours sparse, selection at {ratio}", size + selected, time_both


def measure(side: str, size: float, run: Callable[[], float], cell: Cell) -> dict:
    """Returns a side's row: {"cell", "side", "bytes"} and {"seconds"} or {"error"}."""
    row: dict = {"cell": cell.name, "side": side, "bytes": size}
    # Whatever signature the published kernel has: what Python says of arguments that do not fit is printed.
    foreign = (TypeError, AttributeError, AssertionError, IndexError) if side == PUBLISHED else ()
    try:
        return row | {"seconds": run()}
    except (*timing.FAILURES, *foreign) as error:
        return row | {"error": timing.reason(error)}


def print_row(row: dict, dense: float | None, dense_size: int, bandwidth: float) -> None:
    """Prints a row; `dense` is the fastest dense side's seconds."""
    shown = [row.get("error", ""), "", "", "", ""]
    if "seconds" in row:
        seconds, size = row["seconds"], row["bytes"]
        ratio = "" if dense is None else f"{dense / seconds:.2f}"
        share = f"{size / seconds / bandwidth:.0%}"
        shown = [f"{seconds * 1e6:.1f} us", f"{size / 1e6:.2f} MB", share, ratio, f"{dense_size / size:.2f}"]
    print(f"| {row['cell']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def bench_cell(
    cell: Cell,
    sides: Iterator[tuple[str, float, Callable[[], float]]],
    bandwidth: float,
    rows: list[dict],
    path: Path | None,
) -> None:
    """Measures the sides of a cell, prints their rows and adds them to `rows`, which go to the file."""
    dense_size, dense = cell.attention_bytes(cell.S), None
    waiting: list[dict] = []  # dense rows, until the fastest is known
    for side, size, run in sides:
        row = measure(side, size, run, cell)
        rows.append(row)
        waiting.append(row)
        if size == dense_size:
            dense = min(filter(None, (dense, row.get("seconds"))), default=None)
            continue
        for each in waiting:
            print_row(each, dense, dense_size, bandwidth)
        waiting.clear()
        if path:
            timing.write_json(path, rows)


def main() -> None:
    """Measures every cell and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=list(cells()), default=list(cells()), metavar="CELL")
    parser.add_argument("--published-checkout", type=Path, help="a checkout of HShare's published code")
    parser.add_argument("--published-function", metavar="MODULE:FUNCTION", help="its kernel in there")
    parser.add_argument("--json", type=Path, help="writes the rows there too, after every cell")
    parser.add_argument("--toy", action="store_true", help="tiny sizes through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    if (options.published_checkout is None) != (options.published_function is None):
        parser.error("--published-checkout and --published-function go together")
    published = None
    if options.published_function is not None:
        sys.path.insert(0, str(options.published_checkout))
        module, _, name = options.published_function.partition(":")
        published = getattr(importlib.import_module(module), name)
    effort, impl = (timing.TOY, "interpret") if options.toy else (timing.FULL, "pallas")
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    for cell in TOY_CELLS if options.toy else [cells()[name] for name in options.cells]:
        if lack := timing.lacks_memory((num_data_sets(cell) + 0.5) * (cell.attention_bytes(cell.S) + cell.label_bytes)):
            print(f"| {cell.name} | skipped: {lack} | | | | | |")
            continue
        bench_cell(cell, sides(cell, published, effort, impl), bandwidth, rows, options.json)


if __name__ == "__main__":
    main()
