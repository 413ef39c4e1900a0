"""Times the layouts of the Pallas kernels on a GPU and prints the best beside what kernels/tiling.py chooses now.

Attention of 64 and 128 channels a head, for 32 and for 8 kv heads, through lists and dense; selection by labels for the
same heads of 128. Blocks and splits are tried first, then warps and stages with the best of those; `--full` tries all.

    python -m scripts.bench.tune_kernels --kernels attention --head-dim 128
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.kernels import pallas_attention
from hshare_jax.kernels.tiling import Tiles, attention_tiles, selection_tiles
from scripts.bench import gpu_timing as timing
from scripts.bench.attention import TOY_CELLS, Cell, Data, make_data, num_data_sets, selection, sparse_attention

BLOCKS, SPLITS, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4, 8, 16), (2, 4, 8), (1, 2, 3, 4)
SELECTION_BLOCKS, SELECTION_WARPS = (1024, 2048, 4096, 8192), (4, 8, 16)
TOY_GRID = ((16, 32), (1, 2), (4,), (1, 2))
COLUMNS = ("kernel", "heads", "rows", "slots", "read", "now", "time", "best", "time", "now / best", "cannot run")


def try_layouts(layouts: Iterable[Tiles], run: Callable[[Tiles], float], times: dict[Tiles, float | None]) -> Tiles:
    """Returns the fastest layout so far, after it has added those that are new to `times`; None cannot run."""
    for tiles in layouts:
        if tiles in times:
            continue
        try:
            times[tiles] = run(tiles)
        except timing.FAILURES:  # more registers or shared memory than there are
            times[tiles] = None
    able = {tiles: seconds for tiles, seconds in times.items() if seconds is not None}
    if not able:
        raise RuntimeError("no layout can run; scripts/bench/attention.py prints why")
    return min(able, key=lambda tiles: able[tiles])


def tune_attention(cell: Cell, *, is_dense: bool, full: bool, toy: bool) -> dict:
    """Returns what the layouts of attention take in a cell, in `COLUMNS`' order and by layout."""
    impl, effort, data, q = _prepare(cell, toy)
    lengths = jnp.full((cell.B,), cell.S, jnp.int32)

    def run(tiles: Tiles) -> float:
        def dense(q: Array, d: Data) -> Array:
            return pallas_attention.dense_decode(q, d.keys, d.values, lengths, tiles=tiles, interpret=toy)

        attend = dense if is_dense else sparse_attention(cell, impl=impl, tiles=tiles)
        return timing.seconds_per_call(lambda q, d: (attend(q, d), None), q, data, effort)

    read = cell.S if is_dense else sum(cell.counts)
    now = attention_tiles(1 << (cell.H - 1).bit_length(), q.dtype.itemsize, cell.B * cell.K, read)
    blocks, splits, warps, stages = TOY_GRID if toy else (BLOCKS, SPLITS, WARPS, STAGES)
    times: dict[Tiles, float | None] = {}
    if full:
        best = try_layouts(itertools.starmap(Tiles, itertools.product(blocks, warps, stages, splits)), run, times)
    else:
        fixed = now.num_warps, now.num_stages
        best = try_layouts((Tiles(block, *fixed, split) for block in blocks for split in splits), run, times)
        best = try_layouts((Tiles(best.block, w, s, best.splits) for w in warps for s in stages), run, times)
    return _row("dense attention" if is_dense else "attention", cell, read, now, try_layouts([now], run, times), times)


def tune_selection(cell: Cell, *, toy: bool) -> dict:
    """Returns the same of choosing every list of a cell."""
    _, effort, data, _ = _prepare(cell, toy)

    def run(tiles: Tiles) -> float:
        step = selection(cell, 1, interpret=toy, tiles=tiles)
        return timing.seconds_per_call(step, data[0].lists, data, effort)

    now = selection_tiles(cell.S, cell.N // cell.K)
    blocks, warps = ((128, 256), (4,)) if toy else (SELECTION_BLOCKS, SELECTION_WARPS)
    times: dict[Tiles, float | None] = {}
    layouts = [Tiles(block, num_warps, num_stages=1) for block in blocks for num_warps in warps]
    best = try_layouts([*layouts, now], run, times)
    return _row("selection", cell, cell.S, now, best, times)


def _prepare(cell: Cell, toy: bool) -> tuple[str, timing.Effort, list[Data], Array]:
    data = [make_data(cell, seed) for seed in range(2 if toy else num_data_sets(cell))]
    q = timing.random_array(99, shape=(cell.B, cell.N, cell.H), dtype=jnp.dtype(jnp.bfloat16))
    return ("interpret", timing.TOY, data, q) if toy else ("pallas", timing.QUICK, data, q)


def _row(kernel: str, cell: Cell, read: int, now: Tiles, best: Tiles, times: dict[Tiles, float | None]) -> dict:
    failed = sum(seconds is None for seconds in times.values())
    return {
        "kernel": kernel, "heads": f"{cell.N}/{cell.K} of {cell.H}", "rows": cell.B, "slots": cell.S, "read": read,
        "now": repr(now), "now_seconds": times[now], "best": repr(best), "best_seconds": times[best], "failed": failed,
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
    kernels = ("attention", "dense", "selection")
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=list(kernels))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], help="for 32 query heads")
    parser.add_argument("--full", action="store_true", help="every layout of attention: 240 to compile in each cell")
    parser.add_argument("--json", type=Path, help="writes the rows there too, the times of all layouts with them")
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
        # A selection knows no head size.
        shapes = heads if kernel != "selection" else [(K, 128) for K in options.kv_heads]
        cells = [Cell("", 32, K, H, B, S) for K, H in shapes for B, S in sizes[kernel]]
        for cell in TOY_CELLS if options.toy else cells:
            try:
                if kernel == "selection":
                    row = tune_selection(cell, toy=options.toy)
                else:
                    row = tune_attention(cell, is_dense=kernel == "dense", full=options.full, toy=options.toy)
            except RuntimeError as error:  # no layout can run, or the data do not fit
                print(f"| {kernel} | {cell.N}/{cell.K} of {cell.H} | {timing.reason(error)} |" + " |" * 8, flush=True)
                continue
            print_row(row)
            rows.append(row)
            if options.json:
                timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
