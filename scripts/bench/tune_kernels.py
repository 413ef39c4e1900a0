"""Times the layouts of the Pallas kernels on a GPU and prints the best beside the one that kernels/tiling.py chooses.

Cells are attention through lists and dense, with 64 and 128 channels a head and 32 and 8 kv heads, and selection by
labels for the same heads of 128. Blocks and splits are tried first, then warps and stages with the best of those. With
`--full` every layout is tried.

    python -m scripts.bench.tune_kernels --kernels attention --head-dim 128
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.kernels.tiling import Tiles, attention_tiles, selection_tiles
from scripts.bench import gpu_timing as timing
from scripts.bench.attention import (
    TOY_CELLS,
    Cell,
    Data,
    attention_chain,
    dense_attention,
    make_cell,
    selection,
    sparse_attention,
)

KERNELS = ("attention", "dense", "selection")
BLOCKS, SPLITS, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4, 8, 16), (2, 4, 8), (1, 2, 3, 4)
SELECTION_BLOCKS, SELECTION_WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
TOY_GRID = ((16, 32), (1, 2), (4,), (1, 2))
BF16_ERROR = 2e-2  # absolute, on outputs of about 1
MAX_DIFFERING = 0.01  # share of a list's slots, where weights are almost equal
COLUMNS = ("kernel", "heads", "rows", "slots", "read", "now", "time", "best", "time", "now / best", "cannot run")

Times = dict[Tiles, float | None]  # seconds by layout; None: the layout cannot run


def current_tiles(kernel: str, cell: Cell) -> Tiles:
    """The layout that kernels/tiling.py chooses."""
    if kernel == "selection":
        return selection_tiles(cell.S, cell.N // cell.K)
    width = 1 << (cell.H - 1).bit_length()
    return attention_tiles(width, timing.BF16.itemsize, cell.B * cell.K, slots_read(kernel, cell))


def slots_read(kernel: str, cell: Cell) -> int:
    """The slots that one program would read if no list were split."""
    return sum(cell.counts) if kernel == "attention" else cell.S


def chain_of(
    kernel: str, cell: Cell, tiles: Tiles, q: Array, data: list[Data], effort: timing.Effort, impl: str
) -> timing.Chain:
    """Calls of a kernel in one layout, on the arrays of `make_cell`."""
    if kernel == "selection":
        return timing.Chain(selection(cell, 1, impl=impl, tiles=tiles), data[0].lists, data, effort)
    make = sparse_attention if kernel == "attention" else dense_attention
    return attention_chain(make(cell, impl=impl, tiles=tiles), q, data, effort)


def check_layout(kernel: str, cell: Cell, tiles: Tiles, q: Array, data: list[Data], impl: str) -> tuple[str, bool]:
    """How far a layout's result is from the reference's, and whether that is near enough, on one data set."""
    if kernel == "selection":
        steps = selection(cell, 1, impl=impl, tiles=tiles), selection(cell, 1, impl="reference")
        found, expected = (jax.jit(step)(data[0].lists, data[0])[0] for step in steps)
        share = float((found != expected).mean())
        return f"{share:.2%} of the slots differ from the reference's", share <= MAX_DIFFERING
    make = sparse_attention if kernel == "attention" else dense_attention
    attends = make(cell, impl=impl, tiles=tiles), make(cell, impl="reference")
    found, expected = (jax.jit(attend)(q, data[0]).astype(jnp.float32) for attend in attends)
    error = float(jnp.abs(found - expected).max())
    return f"error {error:.1e}", error <= BF16_ERROR  # NaN is not


def try_layouts(layouts: Iterable[Tiles], make_chain: Callable[[Tiles], timing.Chain], times: Times) -> Tiles:
    """Times the layouts that are new to `times`, adds them to it, and returns the fastest so far.

    Raises:
        RuntimeError: no layout can run.
    """
    chains = {tiles: make_chain(tiles) for tiles in dict.fromkeys(layouts) if tiles not in times}
    timing.compile_together(chains.values())
    for tiles, chain in chains.items():
        try:
            times[tiles] = chain.seconds()
        except timing.FAILURES:  # more registers or shared memory than there are
            times[tiles] = None
    able = {tiles: seconds for tiles, seconds in times.items() if seconds is not None}
    if not able:
        raise RuntimeError("no layout can run; python -m scripts.bench.attention prints why")
    return min(able, key=lambda tiles: able[tiles])


def neighbours(kernel: str, now: Tiles) -> Iterator[Tiles]:
    """The layouts that differ from one in a single size, by one step."""
    sizes = {"block": (now.block // 2, now.block * 2), "num_warps": (now.num_warps // 2, now.num_warps * 2)}
    if kernel != "selection":  # a selection has no pipeline, and its block is what splits its slots
        sizes["num_stages"] = (now.num_stages - 1, now.num_stages + 1)
        sizes["splits"] = (now.splits // 2, now.splits * 2)
    for name, values in sizes.items():
        least = 16 if name == "block" else 1
        yield from (dataclasses.replace(now, **{name: value}) for value in values if value >= least)


def tune_nearby(kernel: str, cell: Cell, make_chain: Callable[[Tiles], timing.Chain], most: int | None = None) -> dict:
    """Tries the current layout and its neighbours, then the best size of each kind together; returns `row`'s row.

    Args:
        kernel, cell: what is tuned.
        make_chain: calls of the kernel in a layout.
        most: how many neighbours to try; None: all.
    """
    now, times = current_tiles(kernel, cell), Times()
    try_layouts([now, *itertools.islice(neighbours(kernel, now), most)], make_chain, times)
    together = {}
    for name in (field.name for field in dataclasses.fields(Tiles)):
        alike = (tiles for tiles in times if dataclasses.replace(tiles, **{name: getattr(now, name)}) == now)
        able = {tiles: seconds for tiles in alike if (seconds := times[tiles]) is not None}
        if able:
            together[name] = getattr(min(able, key=lambda tiles: able[tiles]), name)
    best = try_layouts([dataclasses.replace(now, **together)], make_chain, times)
    return row(kernel, cell, now, best, times) | {"best_tiles": best}


def tune(kernel: str, cell: Cell, *, full: bool, toy: bool) -> dict:
    """Tries the layouts of a kernel in a cell; returns `row`'s row."""
    q, data = make_cell(cell, toy=toy)
    effort, impl = (timing.TOY, "interpret") if toy else (timing.QUICK, "pallas")

    def make_chain(tiles: Tiles) -> timing.Chain:
        return chain_of(kernel, cell, tiles, q, data, effort, impl)

    now, times = current_tiles(kernel, cell), Times()
    if kernel == "selection":
        blocks, warps = ((128, 256), (4,)) if toy else (SELECTION_BLOCKS, SELECTION_WARPS)
        layouts = [Tiles(block, num_warps, num_stages=1) for block in blocks for num_warps in warps]
        return row(kernel, cell, now, try_layouts([*layouts, now], make_chain, times), times)
    blocks, splits, warps, stages = TOY_GRID if toy else (BLOCKS, SPLITS, WARPS, STAGES)
    if full:
        layouts = itertools.starmap(Tiles, itertools.product(blocks, warps, stages, splits))
        best = try_layouts(layouts, make_chain, times)
    else:
        fixed = now.num_warps, now.num_stages
        best = try_layouts((Tiles(block, *fixed, split) for block in blocks for split in splits), make_chain, times)
        best = try_layouts((Tiles(best.block, w, s, best.splits) for w in warps for s in stages), make_chain, times)
    return row(kernel, cell, now, try_layouts([now, best], make_chain, times), times)


def row(kernel: str, cell: Cell, now: Tiles, best: Tiles, times: Times) -> dict:
    """The findings for a kernel in a cell: the current layout, the best layout, and the seconds of all layouts."""
    failed = sum(seconds is None for seconds in times.values())
    return {
        "kernel": kernel, "heads": f"{cell.N}/{cell.K} of {cell.H}", "rows": cell.B, "slots": cell.S,
        "read": slots_read(kernel, cell), "now": repr(now), "now_seconds": times[now], "best": repr(best),
        "best_seconds": times[best], "failed": failed,
        "seconds": {repr(tiles): seconds for tiles, seconds in times.items()},
    }  # fmt: skip


def print_row(row: dict) -> None:
    """Prints a row."""
    now, best = row["now_seconds"], row["best_seconds"]
    shown = [str(row[name]) for name in ("kernel", "heads", "rows", "slots", "read")]
    shown += [f"`{row['now']}`", "cannot run" if now is None else f"{now * 1e6:.1f} us"]
    shown += [f"`{row['best']}`", f"{best * 1e6:.1f} us", "" if now is None else f"{now / best:.2f}"]
    print(f"| {' | '.join(shown)} | {row['failed']} of {len(row['seconds'])} |", flush=True)


def main() -> None:
    """Tries the layouts in every cell and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], help="for 32 query heads")
    parser.add_argument("--full", action="store_true", help="every layout of attention: 240 to compile in each cell")
    parser.add_argument("--json", type=Path, help="also writes the rows to this file, with the times of all layouts")
    parser.add_argument("--toy", action="store_true", help="tiny sizes through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    heads = list(itertools.product(options.kv_heads, options.head_dim))
    sizes = {"attention": [(16, 4096), (1, 32_768), (64, 4096)], "dense": [(16, 4096)]}
    sizes["selection"] = [(16, 4096), (16, 8192), (1, 32_768)]
    print(timing.heading())
    print(f"layouts for {jax.devices()[0].device_kind}, bfloat16\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    for kernel in options.kernels:
        # A selection reads labels, whose size does not depend on the head's.
        shapes = heads if kernel != "selection" else [(K, 128) for K in options.kv_heads]
        cells = [Cell("", 32, K, H, B, S) for K, H in shapes for B, S in sizes[kernel]]
        for cell in TOY_CELLS if options.toy else cells:
            try:
                found = tune(kernel, cell, full=options.full, toy=options.toy)
            except RuntimeError as error:  # no layout can run, or the data do not fit
                print(f"| {kernel} | {cell.N}/{cell.K} of {cell.H} | {timing.reason(error)} |" + " |" * 8, flush=True)
                continue
            print_row(found)
            rows.append(found)
            if options.json:
                timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
