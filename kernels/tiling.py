"""Layouts of the GPU kernels: the slots that a program takes at a time, its warps, and how often lists are split.

Nothing here has been measured yet. The sizes fill an H200 by arithmetic. scripts/bench/tune_kernels.py times the
alternatives on a GPU and prints what this table should say.
"""

import dataclasses

NUM_CORES = 132  # streaming multiprocessors of an H100 and of an H200
PROGRAMS_PER_CORE = 4  # programs that hide each other's latencies; with fewer programs the slots are split


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The layout of one kernel."""

    block: int  # slots per iteration, a power of two
    num_warps: int
    num_stages: int  # stages of the software pipeline that fetches the next blocks
    splits: int = 1  # programs that share one list
    queries: int = 1  # queries of a head that a program of prefill attention takes at once, a power of two


def attention_tiles(
    head_dim: int, itemsize: int, num_programs: int, num_slots: int, *, in_registers: bool = False
) -> Tiles:
    """The layout of decode attention.

    Args:
        head_dim: H, padded to a power of two.
        itemsize: bytes of a number as it is multiplied.
        num_programs: rows times lists.
        num_slots: the most slots that a program reads if nothing is split.
        in_registers: whether keys and values are multiplied from registers.
    """
    # One block of keys and one of values take 16 KiB each. With two of three stages in flight, a core still has room
    # for other programs. Registers hold fewer.
    block = 16 if in_registers else max(16, min(128, 16_384 // (head_dim * itemsize)))
    most = -(-num_slots // (2 * block))  # a program with less than two blocks has nothing to overlap
    wanted = -(-PROGRAMS_PER_CORE * NUM_CORES // num_programs)
    splits = power_of_two(max(1, min(most, wanted, 128)))
    return Tiles(block, num_warps=4, num_stages=1 if in_registers else 3, splits=splits)


def prefill_tiles(head_dim: int, itemsize: int, num_queries: int, *, in_registers: bool = False) -> Tiles:
    """The layout of prefill attention.

    Args:
        head_dim: H, padded to a power of two.
        itemsize: bytes of a number as it is multiplied.
        num_queries: T, the new tokens of a row.
        in_registers: whether keys and values are multiplied from registers.
    """
    # The output of 128 queries of 128 channels fills a quarter of the registers of 8 warps. The queries, and three
    # stages of a block of keys and one of values, fit the shared memory of a core. Float32 is multiplied outside the
    # tensor cores.
    queries = max(16, power_of_two(num_queries, up=True))
    if in_registers:
        return Tiles(16, num_warps=8, num_stages=1, queries=16)
    if itemsize == 4:
        return Tiles(16, num_warps=4, num_stages=2, queries=min(queries, 32))
    queries, block = (min(queries, 128), 64) if head_dim <= 128 else (min(queries, 64), 32)
    return Tiles(block, num_warps=8 if queries == 128 else 4, num_stages=3, queries=queries)


def selection_tiles(num_slots: int, group_size: int) -> Tiles:
    """The layout of a selection: `block` slots per program, whose scores stay in registers.

    Args:
        num_slots: S.
        group_size: query heads that a list serves.
    """
    # With 8 warps each thread holds 64 scores in registers. With 16 warps a thread has half the registers, and spills.
    block = min(power_of_two(num_slots, up=True), 8192, power_of_two(16_384 // group_size))
    return Tiles(block, num_warps=8 if block * group_size >= 2048 else 4, num_stages=1)


def merge_tiles(num_candidates: int) -> Tiles:
    """The layout of the choice among the best of all chunks. Up to 16,384 candidates are one block, in registers."""
    block = power_of_two(num_candidates, up=True)
    block = block if block <= 16_384 else 8192
    return Tiles(block, num_warps=8 if block > 4096 else 4, num_stages=1)


def power_of_two(number: int, *, up: bool = False) -> int:
    """The power of two at or below a number, or at or above it."""
    return 1 << ((number - 1).bit_length() if up else number.bit_length() - 1)
