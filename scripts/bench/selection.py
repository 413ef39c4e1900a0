"""Times exact top-k on a GPU: our selection kernels against lax.top_k, its unstable form, and lax.approx_max_k.

Every side gives the chosen slots of rows of float32 scores; `select_labels` scores the slots itself, from 32 channels
of 4 bits, one query head a list. What a side chooses is first held against lax.top_k: the scores must be the same, and
no slot twice. A side whose choice differs says for how many of the rows.

    python -m scripts.bench.selection --slots 4096 32768
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hshare_jax.kernels import pallas_selection
from hshare_jax.methods.hshare.share_plan import identity_plan
from scripts.bench import gpu_timing as timing

NUM_CHANNELS = 32
COLUMNS = (
    "rows",
    "slots",
    "k",
    "side",
    "time",
    "must move",
    "of copy bandwidth",
    "lax.top_k / this",
    "rows that differ",
)


class Data(NamedTuple):
    """What one call reads; all scores are [B, J, S]."""

    scores: Array  # [B, J, S] float32
    label_query: Array  # [B, J, R] float32, whole numbers
    codes: Array  # [B, J, R / 2, S] uint8
    scales: Array  # [B, J, 2, S] bfloat16: no offset, and steps of 1, so that scores are exact whatever the order


def make_data(rows: tuple[int, int], num_slots: int, seed: int) -> Data:
    """Returns random data."""
    (B, J), f32, bf16 = rows, jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
    scores = timing.random_array(4 * seed, shape=(B, J, num_slots), dtype=f32)
    query = jnp.round(8 * timing.random_array(4 * seed + 1, shape=(B, J, NUM_CHANNELS), dtype=f32))
    codes = timing.random_array(4 * seed + 2, shape=(B, J, NUM_CHANNELS // 2, num_slots), dtype=jnp.dtype(jnp.uint8))
    scales = jnp.stack([jnp.zeros((B, J, num_slots), bf16), jnp.ones((B, J, num_slots), bf16)], axis=2)
    return Data(scores, query, codes, scales)


def exact_label_scores(d: Data) -> Array:
    """Returns the scores [B, J, S] that `select_labels` takes: whole numbers, so exact in any order."""
    codes = jnp.concatenate([d.codes & 15, d.codes >> 4], axis=2).astype(jnp.float32)
    return jnp.einsum("BJR,BJRS->BJS", d.label_query, codes, precision=lax.Precision.HIGHEST)


def ours(
    rows: tuple[int, int], num_slots: int, k: int, *, interpret: bool
) -> dict[str, Callable[[Array, Data], Array]]:
    """Returns our sides, functions of (lists [1, B, J, C], data) that return the lists."""
    B, J = rows
    source, every = identity_plan(B, 1, J), jnp.ones((B,), jnp.int32)
    bounds = (every > 0, 0 * every, num_slots * every, k * every)
    return {
        "select_scores": lambda lists, d: pallas_selection.select_scores(
            lists, 0, d.scores, source, *bounds, interpret=interpret
        ),
        "select_labels": lambda lists, d: pallas_selection.select_labels(
            lists, 0, d.label_query, d.codes, d.scales, source, *bounds, interpret=interpret
        ),
    }  # fmt: skip


def theirs(k: int) -> dict[str, Callable[[Array], Array] | str]:
    """Returns XLA's sides, functions of the scores that return slots, or why there is none."""
    unstable: Callable[[Array], Array] | str = f"jax {jax.__version__} has no such option"
    if "is_stable" in inspect.signature(lax.top_k).parameters:
        top_k: Callable[..., Any] = functools.partial(lax.top_k, k=k, is_stable=False)  # pyright: ignore[reportCallIssue]
        unstable = lambda scores: top_k(scores)[1]  # noqa: E731
    return {
        "lax.top_k": lambda scores: lax.top_k(scores, k)[1],
        "lax.top_k, is_stable=False": unstable,
        "lax.approx_max_k": lambda scores: lax.approx_max_k(scores, k)[1],
    }


@jax.jit
def count_differing(scores: Array, slots: Array) -> Array:
    """Returns in how many rows these slots [B, J, k] are not of the k highest scores, or one comes twice."""
    slots = jnp.sort(slots, axis=-1)
    is_repeated = (slots[..., 1:] == slots[..., :-1]).any(axis=-1)
    chosen = -jnp.sort(-jnp.take_along_axis(scores, slots, axis=-1), axis=-1)
    return (is_repeated | (chosen != lax.top_k(scores, slots.shape[-1])[0]).any(axis=-1)).sum()


def bench(rows: tuple[int, int], num_slots: int, k: int, effort: timing.Effort, *, interpret: bool) -> list[dict]:
    """Returns a row for each side: {"seconds", "bytes", "differing"} or {"error"}."""
    B, J = rows
    scores_bytes, lists_bytes = 4 * B * J * num_slots, 4 * B * J * k
    labels_bytes = B * J * (num_slots * (NUM_CHANNELS // 2 + 4) + 4 * NUM_CHANNELS)
    # Calls that are no chain need a set each; with more than 32, XLA's sorts would take long to compile.
    count = max(effort.min_calls, min(32, timing.num_data_sets(scores_bytes)))
    if lack := timing.lacks_memory(1.2 * count * (scores_bytes + labels_bytes)):
        return [{"rows": f"{B}x{J}", "slots": num_slots, "k": k, "side": "skipped", "error": lack}]
    data = [make_data(rows, num_slots, seed) for seed in range(effort.min_calls if interpret else count)]
    lists = jnp.zeros((1, B, J, k), jnp.int32)

    def run_theirs(choose: Callable[[Array], Array] | str) -> dict:
        if isinstance(choose, str):
            return {"error": choose}
        differing = count_differing(data[0].scores, jax.jit(choose)(data[0].scores))
        # Nothing of a call could go into the next without work of its own, so their results are kept.
        seconds = timing.seconds_per_call(lambda n, scores: (n, choose(scores)), 0, [d.scores for d in data], effort)
        return {"seconds": seconds, "bytes": scores_bytes + lists_bytes, "differing": int(differing)}

    def run_ours(side: str, choose: Callable[[Array, Data], Array]) -> dict:
        scored, size = data[0].scores, scores_bytes
        if side == "select_labels":
            scored, size = exact_label_scores(data[0]), labels_bytes
        differing = count_differing(scored, choose(lists, data[0])[0])
        seconds = timing.seconds_per_call(lambda lists, d: (choose(lists, d), None), lists, data, effort)
        return {"seconds": seconds, "bytes": size + lists_bytes, "differing": int(differing)}

    runs = {side: functools.partial(run_theirs, choose) for side, choose in theirs(k).items()}
    for side, choose in ours(rows, num_slots, k, interpret=interpret).items():
        runs[side] = functools.partial(run_ours, side, choose)
    found = []
    for side, run in runs.items():
        row: dict = {"rows": f"{B}x{J}", "slots": num_slots, "k": k, "side": side}
        try:
            found.append(row | run())
        except timing.FAILURES as error:
            found.append(row | {"error": timing.reason(error)})
    return found


def print_rows(rows: list[dict], bandwidth: float) -> None:
    """Prints the rows of one size."""
    yardstick = next((row["seconds"] for row in rows if row["side"] == "lax.top_k" and "seconds" in row), None)
    for row in rows:
        shown = [row.get("error", ""), "", "", "", ""]
        if "seconds" in row:
            seconds, size = row["seconds"], row["bytes"]
            ratio = "" if yardstick is None else f"{yardstick / seconds:.2f}"
            share = f"{size / seconds / bandwidth:.0%}"
            shown = [f"{seconds * 1e6:.1f} us", f"{size / 1e6:.2f} MB", share, ratio, str(row["differing"])]
        print(f"| {row['rows']} | {row['slots']} | {row['k']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measures every size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, nargs="+", default=[88, 128, 432])
    parser.add_argument("--slots", type=int, nargs="+", default=[4096, 8192, 32_768])
    parser.add_argument("--lists", type=int, nargs="+", default=[8, 32], help="of each of the 16 rows")
    parser.add_argument("--json", type=Path, help="writes the rows there too, after every size")
    parser.add_argument("--toy", action="store_true", help="tiny sizes through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    effort = timing.TOY if options.toy else timing.FULL
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    sizes = [((16, J), S, k) for J in options.lists for S in options.slots for k in options.k]
    rows: list[dict] = []
    for size in [((2, 2), 256, 20), ((1, 2), 300, 33)] if options.toy else sizes:
        found = bench(*size, effort, interpret=options.toy)
        print_rows(found, bandwidth)
        rows += found
        if options.json:
            timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
