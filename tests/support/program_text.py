"""Facts that the tests read off the text of compiled programs."""

import re
from collections.abc import Sequence

import jax
from jax.stages import Compiled, Lowered
from quick_compile import AS_FOR_USERS


def compile_for_users(lowered: Lowered) -> Compiled:
    """The program as users compile it. The tests' own flags (conftest.py) fuse less, and so copy more."""
    return lowered.compile(AS_FOR_USERS)


def count_copies(text: str, buffers: Sequence[jax.Array]) -> int:
    """Counts the copy instructions of a compiled program whose result has the shape of one of the buffers."""
    names = {"float32": "f32", "bfloat16": "bf16", "int32": "s32", "uint8": "u8", "int8": "s8"}
    shapes = {f"{names[str(array.dtype)]}[{','.join(map(str, array.shape))}]" for array in buffers}
    copied = re.findall(r"= \(?(\w+\[[\d,]*\])\S* copy(?:-start)?\(", text)
    return sum(shape in shapes for shape in copied)
