"""Compiling quickly rather than well: tests compile thousands of small programs, and each runs for microseconds.

Without LLVM's optimisation they take half the time, and with XLA's older way to write loops, which jaxlib 0.11.1 and
later lack, two thirds of that. XLA splits a program into parts that cores compile side by side, and each part costs
some milliseconds anew. The cores have another worker's programs to compile, so programs are not split: decode steps
then take two thirds of the time to compile.
"""

import os
from importlib.metadata import version

# XLA ends the process where it does not know a flag.
_OLD_LOOPS = version("jaxlib").startswith(("0.10.", "0.11.0"))
AS_FOR_USERS: dict[str, str | bool] = (
    {"xla_cpu_use_fusion_emitters": True} if _OLD_LOOPS else {}
)  # options of a program that tests look into


def compile_quickly() -> None:
    """Sets XLA_FLAGS unless it is set, which must be before the first program is compiled."""
    flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags + " --xla_cpu_use_fusion_emitters=false" * _OLD_LOOPS)
