"""Triton's interpreter behind the call of a kernel: NumPy runs the kernel's Python code, slowly, on every machine.

jax hands the arrays over by a callback. NumPy has no bfloat16, so the interpreter computes in float32 instead. Whether
kernels are interpreted is decided by the environment variable TRITON_INTERPRET when Triton is imported, so a process
either interprets all of its Triton kernels or compiles all of them.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

TYPES = {"float32": "fp32", "float16": "fp16", "int32": "i32", "int8": "i8", "uint8": "u8"}  # as Triton names them


def obstacle() -> str | None:
    """Why the kernels cannot be interpreted here, in words; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "is not installed"
    if not is_interpreting():
        return "is off: TRITON_INTERPRET=1 must be set before the program starts"
    return None


def is_interpreting() -> bool:
    """Whether Triton interprets kernels in this process. Triton reads the variable so too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def instructions() -> str:
    """What runs the kernels."""
    return "NumPy"


def interpret(
    kernel: Any,
    arrays: Mapping[str, Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    sizes: Mapping[str, int],
    changed: tuple[str, Array] | None,
) -> list[Array]:
    """Runs a kernel in the interpreter.

    Args:
        kernel, arrays, grid, sizes, changed: as for `triton_library.call_kernel`.
        outputs: those that exist.
    """
    from triton.runtime.interpreter import GridExecutor  # pyright: ignore[reportMissingImports]

    class Grid(GridExecutor):
        """The programs of a kernel, over arrays that lie where NumPy can read them. Nothing is copied to a device."""

        def _init_args_hst(self, args: Sequence, kwargs: Mapping) -> tuple[Sequence, Mapping]:
            return args, kwargs

        def _restore_args_dev(self, *arguments: object) -> None:
            del arguments

    inputs = {name: array for name, array in arrays.items() if array is not None}
    nothing = dict.fromkeys(arrays.keys() - inputs.keys())
    shapes = [jax.ShapeDtypeStruct(shape.shape, _widened(shape.dtype)) for shape in outputs.values()]
    if changed is not None:
        shapes.append(jax.ShapeDtypeStruct(changed[1].shape, changed[1].dtype))

    def run(*given: Array) -> list[np.ndarray]:
        read = [np.array(array) for array in given]
        written = [_junk(shape) for shape in shapes[: len(outputs)]]
        names = [*inputs, *outputs]
        if changed is not None:
            names.append(changed[0])
            written.append(read.pop())
        pointers = map(Pointer, (*read, *written))
        with np.errstate(all="ignore"):  # a GPU computes on as well
            Grid(kernel.rewrite(), kernel.arg_names, grid)(
                **dict(zip(names, pointers, strict=True)), **nothing, **sizes
            )
        return written

    given = [array.astype(_widened(array.dtype)) for array in inputs.values()]
    given += [] if changed is None else [changed[1]]
    found = jax.pure_callback(run, shapes, *given, vmap_method="sequential")
    dtypes = [shape.dtype for shape in outputs.values()]
    return [array.astype(dtype) for array, dtype in zip(found, dtypes, strict=False)] + found[len(outputs) :]


class Pointer:
    """An array as the interpreter takes it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.dtype = TYPES[str(array.dtype)]

    def data_ptr(self) -> int:
        """Where the first number lies."""
        return self.array.ctypes.data


def _widened(dtype: Any) -> np.dtype:
    return np.dtype(np.float32) if dtype == jnp.bfloat16 else np.dtype(dtype)


def _junk(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """An output before the kernel runs. It shows where a kernel reads what nobody wrote."""
    is_float = np.issubdtype(shape.dtype, np.floating)
    return np.full(shape.shape, np.nan if is_float else np.iinfo(shape.dtype).max, shape.dtype)
