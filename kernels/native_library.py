"""The library of CPU kernels, which is compiled from kernels/native when the package is installed."""

import ctypes
import functools
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax import Array

PATH = Path(__file__).resolve().parent / "native" / "libhshare_native.so"
ATTENTION, APPENDING = ("dense_decode", "sparse_decode", "split_decode"), ("append_tokens", "append_labels")
INSTRUCTIONS = ("amx", "avx512", "avx2", "any")
HANDLERS = (*ATTENTION, *APPENDING, "prefill_attention", "select", "project", "dequantise")


@functools.cache
def obstacle() -> str | None:
    """Why the library cannot be used here, in words; None if it can. A first call loads it and registers its handlers.

    XLA calls a handler by `hshare_` and its name. The library uses the best instructions of the CPU, but at most those
    that the environment variable HSHARE_JAX_INSTRUCTIONS names (one of `INSTRUCTIONS`).
    """
    if (named := os.environ.get("HSHARE_JAX_INSTRUCTIONS", "any")) not in INSTRUCTIONS:
        return f"is told HSHARE_JAX_INSTRUCTIONS={named}, which must be one of {', '.join(INSTRUCTIONS)}"
    if not PATH.is_file():
        return "was not compiled when the package was installed (by gcc 11 or clang 14, or newer ones)"
    try:
        library = ctypes.CDLL(str(PATH))
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, f"hshare_{name}"))
            jax.ffi.register_ffi_target(f"hshare_{name}", handler, platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:  # for another machine, or another version of XLA
        return f"does not fit this machine ({platform.machine()}) or jaxlib {jaxlib.__version__}: {error}"
    return None


@functools.cache
def instructions() -> str:
    """Which instructions the library's code uses on this machine: one of `INSTRUCTIONS`."""
    library = ctypes.CDLL(str(PATH))
    library.hshare_instructions.restype = ctypes.c_char_p
    return library.hshare_instructions().decode()


def call_library(
    name: str, like: Array | jax.ShapeDtypeStruct | Sequence, *arrays: Array, **attributes: np.generic | bool
) -> Any:
    """Calls a handler of the library, which returns an array of the shape and dtype of `like`, or several of them.

    Args:
        name: one of `HANDLERS`.
        like: the array that the result is like; a list of arrays if there are several results.
        arrays: the handler's arguments. Integers are passed as int32, codes of 8 bits as they are.
        attributes: the handler's static arguments.
    """
    shape = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), like)
    return jax.ffi.ffi_call(f"hshare_{name}", shape, vmap_method="sequential")(*map(_as_passed, arrays), **attributes)


def change_in_place(
    name: str, *arrays: Array, changed: tuple[int, ...], **attributes: np.generic | bool
) -> list[Array]:
    """Calls a handler of the library that changes some of its arguments, and returns those arguments.

    Args:
        name, arrays, attributes: as for `call_library`.
        changed: which of the arrays are changed. XLA copies them first if anybody else still reads them.
    """
    arrays = tuple(map(_as_passed, arrays))
    shapes = [jax.ShapeDtypeStruct(arrays[index].shape, arrays[index].dtype) for index in changed]
    aliases = {index: place for place, index in enumerate(changed)}
    call = jax.ffi.ffi_call(f"hshare_{name}", shapes, vmap_method="sequential", input_output_aliases=aliases)
    return list(call(*arrays, **attributes))


def _as_passed(array: Array) -> Array:
    """Integers as int32; codes of 8 bits, and all that is no integer, as they are."""
    is_integer = jnp.issubdtype(array.dtype, jnp.integer) and array.dtype.itemsize > 1
    return array.astype(jnp.int32) if is_integer else array
