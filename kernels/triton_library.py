"""The call of Triton kernels from jax: compiled for an NVIDIA GPU by jax-triton, or run by Triton's interpreter."""

import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array

from hshare_jax.kernels.tiling import Tiles
from hshare_jax.kernels.triton_interpreter import interpret, is_interpreting

PACKAGES = ("triton", "jax_triton")
# The oldest version of PTX that knows the instructions of an H200. Triton would write the newest version that it knows,
# which the compiler that comes with jax may not read.
PTX_VERSION = 80


def obstacle() -> str | None:
    """Why the kernels cannot be compiled here, in words; None if they can."""
    missing = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"lack {' and '.join(missing)} here"
    if is_interpreting():
        return "are interpreted, because TRITON_INTERPRET is set"
    if importlib.metadata.version("jax-triton") == "0.4.1" and jax.__version_info__ >= (0, 12):
        return f"jax-triton 0.4.1 cannot lower with jax {jax.__version__}"
    return None


def instructions() -> str:
    """Which Triton compiles the kernels."""
    return " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "jax-triton"))


def load_kernel(kind: str, name: str) -> Any:
    """A kernel by its name. Triton is imported here, because the functions around kernels are read without it.

    Args:
        kind: attention, selection or prefill.
        name: the kernel, in the module `triton_<kind>_kernels`.
    """
    return getattr(importlib.import_module(f"hshare_jax.kernels.triton_{kind}_kernels"), name)


def jit(function: Callable) -> Any:
    """`triton.jit` of a kernel. The type checks of our tests wrap functions, and Triton reads the bare function."""
    import triton  # pyright: ignore[reportMissingImports]

    return triton.jit(inspect.unwrap(function))


def call_kernel(
    kernel: Any,
    arrays: Mapping[str, Array | None],
    outputs: Mapping[str, jax.ShapeDtypeStruct | None],
    *,
    grid: tuple[int, ...],
    tiles: Tiles,
    sizes: Mapping[str, int],
    changed: tuple[str, Array] | None = None,
) -> list[Array]:
    """Runs a kernel, and returns its outputs in their order; the changed array comes last.

    Args:
        kernel: made by `jit`.
        arrays: what it reads, by the names of its parameters. A parameter without an array is None.
        outputs: what it writes, likewise. What a kernel does not write of an output may be anything.
        grid: how many programs there are along each axis.
        tiles: the warps and the stages of a program.
        sizes: the static parameters.
        changed: a parameter and the array that the kernel changes in place.
    """
    written = {name: shape for name, shape in outputs.items() if shape is not None}
    given = {**arrays, **{name: None for name, shape in outputs.items() if shape is None}}
    if is_interpreting():
        return interpret(kernel, given, written, grid=grid, sizes=sizes, changed=changed)
    import jax_triton  # pyright: ignore[reportMissingImports]

    ref = None if changed is None else jax.new_ref(changed[1])
    found = jax_triton.triton_call(
        **given, **({} if changed is None else {changed[0]: ref}), **sizes,
        kernel=kernel, name=kernel.__name__, grid=grid, out_type=list(written.values()),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        backend_options={"enable_fp_fusion": True, "ptx_version": PTX_VERSION},
    )  # fmt: skip
    return [*found, *([] if ref is None else [jax.freeze(ref)])]
