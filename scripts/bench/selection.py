"""Times exact top-k on a GPU: our selection kernels, lax.top_k, its unstable form and lax.approx_max_k.

Every side chooses slots from rows of float32 scores. `select_by_labels` computes the scores itself, from 32 channels of
4 bits, with one query head a list. A side's choice is first compared with the choice of lax.top_k. The scores must be
the same, and no slot may come twice. The table says in how many rows the choice differs.

    python -m scripts.bench.selection --slots 4096 32768
"""

import argparse
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from hshare_jax.kernels import pallas_selection
from hshare_jax.kernels.labels import Labels
from hshare_jax.methods.base import identity_plan
from scripts.bench import gpu_timing as timing

NUM_CHANNELS = 32
TOY_SIZES = (((2, 2), 256, 20), ((1, 2), 300, 33))
COLUMNS = (
    "rows", "slots", "k", "side", "time", "must move", "of copy bandwidth", "lax.top_k / this", "rows that differ",
)  # fmt: skip

Size = tuple[tuple[int, int], int, int]  # (rows, lists of each row), slots, k


class Data(NamedTuple):
    """The arrays that one call reads; all scores are [B, J, S]."""

    scores: Array  # [B, J, S] float32
    label_query: Array  # [B, J, R] float32, whole numbers
    codes: Array  # [B, J, R / 2, S] uint8
    scales: Array  # [B, J, 2, S] bfloat16: offsets of 0 and steps of 1, so that scores are exact in any order


class Side(NamedTuple):
    """One way to choose: the bytes that it must move, its calls, and how many rows differ from lax.top_k's choice."""

    name: str
    bytes: int
    chain: timing.Chain | None
    count_differing: Callable[[], int]
    lack: str = ""  # why there is no chain


def make_data(rows: tuple[int, int], num_slots: int, seed: int) -> Data:
    """Random data."""
    (B, J), f32, bf16 = rows, jnp.dtype(jnp.float32), timing.BF16
    scores = timing.random_array(4 * seed, shape=(B, J, num_slots), dtype=f32)
    query = jnp.round(8 * timing.random_array(4 * seed + 1, shape=(B, J, NUM_CHANNELS), dtype=f32))
    codes = timing.random_array(4 * seed + 2, shape=(B, J, NUM_CHANNELS // 2, num_slots), dtype=jnp.dtype(jnp.uint8))
    scales = jnp.stack([jnp.zeros((B, J, num_slots), bf16), jnp.ones((B, J, num_slots), bf16)], axis=2)
    return Data(scores, query, codes, scales)


def exact_label_scores(d: Data) -> Array:
    """The scores [B, J, S] that `select_by_labels` computes: whole numbers, so exact in any order."""
    codes = jnp.concatenate([d.codes & 15, d.codes >> 4], axis=2).astype(jnp.float32)
    return jnp.einsum("BJR,BJRS->BJS", d.label_query, codes, precision=lax.Precision.HIGHEST)


def make_size(size: Size, effort: timing.Effort, *, toy: bool) -> list[Data] | str:
    """The data sets of a size, or why they do not fit on the device."""
    (B, J), num_slots, _ = size
    scores_bytes = 4 * B * J * num_slots
    # Calls that form no chain need a set each. With more than 32 sets, XLA's sorts would take long to compile.
    count = max(effort.min_calls, min(32, timing.num_data_sets(scores_bytes)))
    if lack := timing.lacks_memory(1.2 * count * (scores_bytes + _label_bytes(size))):
        return lack
    return [make_data((B, J), num_slots, seed) for seed in range(effort.min_calls if toy else count)]


def our_sides(size: Size, data: list[Data], effort: timing.Effort, impl: str) -> list[Side]:
    """Our selection by scores and by labels, both written into the lists [1, B, J, C]."""
    (B, J), num_slots, k = size
    source, every = identity_plan(B, 1, J), jnp.ones((B,), jnp.int32)
    bounds = (every > 0, 0 * every, num_slots * every, k * every)
    lists, interpret = jnp.zeros((1, B, J, k), jnp.int32), impl == "interpret"

    def select_by_scores(lists: Array, d: Data) -> Array:
        return pallas_selection.select_by_scores(lists, 0, d.scores, source, *bounds, interpret=interpret)

    def select_by_labels(lists: Array, d: Data) -> Array:
        labels = Labels(d.codes, d.scales)
        return pallas_selection.select_by_labels(lists, 0, d.label_query, labels, source, *bounds, interpret=interpret)

    def side(choose: Callable[[Array, Data], Array], scores: Callable[[Data], Array], size: int) -> Side:
        chain = timing.Chain(lambda lists, d: (choose(lists, d), None), lists, data, effort)
        return Side(
            choose.__name__,
            size + lists.nbytes,
            chain,
            lambda: int(count_differing(scores(data[0]), choose(lists, data[0])[0])),
        )

    return [
        side(select_by_scores, lambda d: d.scores, 4 * B * J * num_slots),
        side(select_by_labels, exact_label_scores, _label_bytes(size)),
    ]


def their_sides(size: Size, data: list[Data], effort: timing.Effort) -> list[Side]:
    """XLA's three ways to choose from scores."""
    (B, J), num_slots, k = size
    ways: dict[str, Callable[[Array], Array]] = {
        "lax.top_k": lambda scores: lax.top_k(scores, k)[1],
        "lax.approx_max_k": lambda scores: lax.approx_max_k(scores, k)[1],
    }
    unstable = "lax.top_k, is_stable=False"
    if has_unstable := "is_stable" in inspect.signature(lax.top_k).parameters:
        top_k: Callable[..., Any] = functools.partial(lax.top_k, k=k, is_stable=False)  # pyright: ignore[reportCallIssue]
        ways[unstable] = lambda scores: top_k(scores)[1]
    num_bytes, sides = 4 * B * J * num_slots + 4 * B * J * k, []
    for name, choose in ways.items():
        # A call's result could enter the next call only with extra work, so the results are kept.
        chain = timing.Chain(
            lambda n, s, choose=choose: (n, choose(s)), jnp.zeros(()), [d.scores for d in data], effort
        )

        def differing(choose: Callable[[Array], Array] = choose) -> int:
            return int(count_differing(data[0].scores, jax.jit(choose)(data[0].scores)))

        sides.append(Side(name, num_bytes, chain, differing))
    if not has_unstable:
        sides.append(Side(unstable, num_bytes, None, lambda: 0, lack=f"jax {jax.__version__} has no such option"))
    return sides


def _label_bytes(size: Size) -> int:
    (B, J), num_slots, _ = size
    return B * J * (num_slots * (NUM_CHANNELS // 2 + 4) + 4 * NUM_CHANNELS)


@jax.jit
def count_differing(scores: Array, slots: Array) -> Array:
    """In how many rows these slots [B, J, k] are not of the k highest scores, or hold a slot twice."""
    slots = jnp.sort(slots, axis=-1)
    is_repeated = (slots[..., 1:] == slots[..., :-1]).any(axis=-1)
    chosen = -jnp.sort(-jnp.take_along_axis(scores, slots, axis=-1), axis=-1)
    return (is_repeated | (chosen != lax.top_k(scores, slots.shape[-1])[0]).any(axis=-1)).sum()


def measure(sides: list[Side], size: Size) -> Iterator[dict]:
    """Yields each side's row: {"seconds", "bytes", "differing"} or {"error"}."""
    timing.compile_together([side.chain for side in sides if side.chain is not None])
    (B, J), num_slots, k = size
    for side in sides:
        row: dict = {"rows": f"{B}x{J}", "slots": num_slots, "k": k, "side": side.name, "bytes": side.bytes}
        try:
            if side.chain is None:
                row |= {"error": side.lack}
            else:
                row |= {"differing": side.count_differing(), "seconds": side.chain.seconds()}
        except timing.FAILURES as error:
            row |= {"error": timing.reason(error)}
        yield row


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
    parser.add_argument("--lists", type=int, nargs="+", default=[8, 32], help="lists of each of the 16 rows")
    parser.add_argument("--json", type=Path, help="also writes the rows to this file, after every size")
    parser.add_argument("--toy", action="store_true", help="tiny sizes through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    effort, impl = (timing.TOY, "interpret") if options.toy else (timing.FULL, "pallas")
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    sizes = [((16, J), S, k) for J in options.lists for S in options.slots for k in options.k]
    rows: list[dict] = []
    for size in TOY_SIZES if options.toy else sizes:
        data = make_size(size, effort, toy=options.toy)
        if isinstance(data, str):
            (B, J), num_slots, k = size
            print(f"| {B}x{J} | {num_slots} | {k} | skipped: {data} | | | | | |", flush=True)
            continue
        sides = [*their_sides(size, data, effort), *our_sides(size, data, effort, impl)]
        found = list(measure(sides, size))
        print_rows(found, bandwidth)
        rows += found
        if options.json:
            timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
