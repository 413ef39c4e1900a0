"""The results of a measuring run: one line of JSON for each measurement, and the summary of all measurements.

A line is on disk before the next measurement begins. This module imports no jax, so that a run can be summarised
wherever its files lie.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

LINES, SUMMARY, LOG, FAILED = "results.jsonl", "summary.md", "log.txt", "failing_cases.npz"
COLUMNS = ("what", "side", "time", "must move", "GB/s", "of copy bandwidth", "note")
Row = dict[str, Any]


class Lines:
    """The results file of a run; every added row also says where, when, with what and by which command it was made."""

    def __init__(self, folder: Path, made: Row) -> None:
        self._path, self._made = folder / LINES, made
        self.bandwidth: float | None = None  # copy bandwidth in bytes a second, once it is known

    def add(self, step: str, unit: str, row: Row) -> None:
        """Writes a row. A row with "seconds" and "bytes" also gets its bandwidth, and its share of the copy's."""
        row = {"step": step, "unit": unit, **row}
        if "seconds" in row and "bytes" in row:
            row["gb_per_second"] = row["bytes"] / row["seconds"] / 1e9
            if self.bandwidth:
                row["share_of_copy"] = row["bytes"] / row["seconds"] / self.bandwidth
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | self._made) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run; a last line that was cut off is left out."""
    path, rows = folder / LINES, []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def summarise(folder: Path, notes: Iterable[str] = ()) -> None:
    """Writes the summary of the rows that are there: machine, targets, and a table for each step."""
    rows, out = read_rows(folder), []
    if rows:
        made = rows[0]
        out += [
            f"# Measured on {made['device']}\n",
            f"{made['date']}, {made['versions']}\n",
            f"    {made['command']}\n",
        ]
    out += [f"- {note}" for note in notes]
    out += _target_table(rows)
    for step in dict.fromkeys(row["step"] for row in rows):
        out += [f"\n## {step}\n", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
        out += [_table_row(row) for row in rows if row["step"] == step]
    draft = folder / (SUMMARY + ".draft")
    draft.write_text("\n".join(out) + "\n", encoding="utf-8")
    draft.replace(folder / SUMMARY)


def _table_row(row: Row) -> str:
    shown = [row["unit"], row.get("side", ""), "", "", "", "", row.get("error", row.get("note", ""))]
    if "seconds" in row:
        seconds = row["seconds"]
        shown[2] = f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"
    if "bytes" in row and "seconds" in row:
        shown[3] = f"{row['bytes'] / 1e6:.2f} MB"
    if "gb_per_second" in row:
        shown[4] = f"{row['gb_per_second']:.0f}"
    if "share_of_copy" in row:
        shown[5] = f"{row['share_of_copy']:.0%}"
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in shown)} |"


# --- the targets


def _target_table(rows: list[Row]) -> list[str]:
    out = ["\n## Targets\n", "| target | measured | reached |", "|---|---|---|"]
    for name, least, measure in TARGETS:
        found = measure(rows)
        shown = "not measured | " if found is None else f"{found:.2f} | {'yes' if found >= least else 'no'}"
        out.append(f"| {name}: at least {least:g} | {shown} |")
    return out


def _find(rows: list[Row], unit: str, side: str) -> Row | None:
    """The fastest row of a unit and side that has a time; a side is named by its beginning."""
    found = [row for row in rows if row["unit"] == unit and row.get("side", "").startswith(side) and "seconds" in row]
    return min(found, key=lambda row: row["seconds"], default=None)


def _share(unit: str, side: str) -> Callable[[list[Row]], float | None]:
    def measure(rows: list[Row]) -> float | None:
        row = _find(rows, unit, side)
        return None if row is None else row.get("share_of_copy")

    return measure


def _speedup(unit: str, fast: str, slow: str) -> Callable[[list[Row]], float | None]:
    def measure(rows: list[Row]) -> float | None:
        ours, theirs = _find(rows, unit, fast), _find(rows, unit, slow)
        return theirs["seconds"] / ours["seconds"] if ours and theirs else None

    return measure


def _of_byte_ratio(unit: str) -> Callable[[list[Row]], float | None]:
    """How much of the byte ratio sparse attention gains over the fastest dense side."""

    def measure(rows: list[Row]) -> float | None:
        sparse = _find(rows, unit, "ours sparse")
        sides = ("ours dense", "XLA dense", "cuDNN", "FlashAttention-2", "flash_attn")
        dense = [found for side in sides if (found := _find(rows, unit, side))]
        if sparse is None or not dense:
            return None
        fastest = min(dense, key=lambda row: row["seconds"])
        return (fastest["seconds"] / sparse["seconds"]) / (fastest["bytes"] / sparse["bytes"])

    return measure


def _least_selection_speedup(rows: list[Row]) -> float | None:
    """The least speed-up of selection over lax.top_k, over the sizes where both were timed."""
    units = dict.fromkeys(row["unit"] for row in rows if row["unit"].startswith("selection "))
    found = [_speedup(unit, "select_", "lax.top_k")(rows) for unit in units]
    return min((ratio for ratio in found if ratio is not None), default=None)


TARGETS: tuple[tuple[str, float, Callable[[list[Row]], float | None]], ...] = (
    ("sparse attention, batch 16, 4k, MHA, share of copy bandwidth", 0.85, _share("llama2-b16-4k", "ours sparse")),
    ("sparse attention, batch 16, 4k, GQA, share of copy bandwidth", 0.80, _share("llama3-b16-4k", "ours sparse")),
    ("sparse attention, batch 1, 32k, MHA, share of copy bandwidth", 0.50, _share("llama2-b1-32k", "ours sparse")),
    ("batch 16, 4k, MHA: share of the byte ratio over the fastest dense side", 0.85, _of_byte_ratio("llama2-b16-4k")),
    ("batch 16, 4k, GQA: share of the byte ratio over the fastest dense side", 0.85, _of_byte_ratio("llama3-b16-4k")),
    ("selection: times lax.top_k's speed, the least of all sizes", 1.0, _least_selection_speedup),
    ("LLaMA2-7B steps, batch 16, 4k, dense, share of the floor", 0.80, _share("LLaMA2-7B b16 4k", "dense")),
    ("LLaMA2-7B steps, batch 16, 4k, sparse, share of the floor", 0.80, _share("LLaMA2-7B b16 4k", "HShare")),
    ("LLaMA3-8B steps, batch 16, 4k, dense, share of the floor", 0.80, _share("LLaMA3-8B b16 4k", "dense")),
    ("LLaMA3-8B steps, batch 16, 4k, sparse, share of the floor", 0.80, _share("LLaMA3-8B b16 4k", "HShare")),
    ("LLaMA2-7B steps, batch 16, 4k, sparse over dense", 2.4, _speedup("LLaMA2-7B b16 4k", "HShare", "dense")),
    ("LLaMA2-7B steps, batch 8, 16k, sparse over dense", 3.2, _speedup("LLaMA2-7B b8 16k", "HShare", "dense")),
    ("prefill attention, 4k, over FlashAttention-2", 0.5, _speedup("attention 4k", "ours", "FlashAttention-2")),
    ("prefill attention, 32k, over FlashAttention-2", 0.5, _speedup("attention 32k", "ours", "FlashAttention-2")),
)
