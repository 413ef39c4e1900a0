"""Freed memory stays with the process: on CPUs it is otherwise handed back and fetched anew at every step."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Returns whether glibc's malloc now keeps what is freed for the next allocation; elsewhere nothing is done.

    XLA:CPU allocates the scratch memory of a program each time it runs. Above 32 MB glibc asks the system for every
    such piece and gives it back, and fetching its pages anew took 15 % of a step's time. Call it before JAX starts its
    threads; the process then stays as large as it has once been.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
