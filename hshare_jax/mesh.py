"""A mesh of devices: the rows of a batch are divided along its axis "data", heads and mlp along its axis "model".

A function of decoding is written for one device. `by_parts` runs it on each device's part of the arrays. What the
devices must add up is added up where it arises: in the decoder (`ModelConfig.is_part`) and in means over heads.

Arrays know by their dimensions how they are divided. The fields of a state name theirs (`dims`), in the letters of
`shapes`: B rows lie along "data"; K, N, J and U, which count heads or lists, along "model".
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from hshare_jax.errors import SettingError, check_whole
from hshare_jax.shapes import DATA, MODEL

AnyMesh = Mesh | AbstractMesh  # an AbstractMesh has a shape and no devices
_AXES = {"B": DATA, "K": MODEL, "N": MODEL, "J": MODEL, "U": MODEL}
_DIMS, _IDS = "dims", "flat_ids"


def make_mesh(data: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of data x model devices, for `load_model` and `init_state`.

    Neighbouring devices lie along "model", because devices along "model" exchange sums in every layer, and devices
    along "data" exchange nothing.

    Args:
        data: over how many devices the rows of a batch are spread.
        model: over how many devices the heads of a model are spread.
        devices: the devices; None takes those that jax has, of all processes.

    Raises:
        SettingError: a number below 1, or another number of devices.
    """
    check_whole("data", data, 1)
    check_whole("model", model, 1)
    devices = jax.devices() if devices is None else devices
    if data * model != len(devices):
        rule = f"and {{model}} make {data * model} devices, and there are {len(devices)}"
        raise SettingError("data", data, rule, "choose numbers whose product is that", others={"model": model})
    return Mesh(np.array(devices).reshape(data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def num_parts(mesh: AnyMesh | None) -> int:
    """Over how many devices heads are spread."""
    return 1 if mesh is None else mesh.shape[MODEL]


def dims(letters: str, *, flat_ids: bool = False) -> dict[str, object]:
    """The metadata of a dataclass field whose arrays all have these first dimensions, such as "B K S H".

    Args:
        letters: one for each of the first dimensions; later ones are not divided.
        flat_ids: whether the arrays, [..., L, J], hold flat ids of lists (layer * J + list). Each device then sees the
            ids among its own lists.
    """
    return {_DIMS: letters, _IDS: flat_ids}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one array lies on a mesh."""

    spec: PartitionSpec
    holds_ids: bool = False


def layout_of(letters: str, *, flat_ids: bool = False) -> Layout:
    """How an array with these dimensions lies on a mesh: "L B J C" -> (None, data, model, None)."""
    return Layout(PartitionSpec(*(_AXES.get(letter) for letter in letters.split())), flat_ids)


def layouts_alike(tree: Any, letters: str) -> list[Layout]:
    """The layout of each leaf of a tree whose arrays all have these first dimensions."""
    return [layout_of(letters)] * len(jax.tree.leaves(tree))


def layouts(tree: Any) -> list[Layout]:
    """The layout of each leaf of a tree, in the order of `jax.tree.leaves`.

    Args:
        tree: dataclasses whose fields have `dims`, in any containers. A string stands for an array of these dimensions,
            and a Layout for itself.
    """
    if isinstance(tree, Layout):
        return [tree]
    if isinstance(tree, str):
        return [layout_of(tree)]
    if not dataclasses.is_dataclass(tree):
        parts = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
        if len(parts) == 1 and parts[0] is tree:
            raise TypeError(f"an array {getattr(tree, 'shape', tree)} does not tell its dimensions")
        return [layout for part in parts for layout in layouts(part)]
    found = []
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if field.metadata.get("static"):
            continue
        if (letters := field.metadata.get(_DIMS)) is not None:
            count = len(jax.tree.leaves(value))
            found += [layout_of(letters, flat_ids=field.metadata[_IDS])] * count
        elif value is not None:
            found += layouts(value)
    return found


def by_parts(function: Callable[..., Any], mesh: Mesh, args: Sequence[Any], takes: Sequence[Any], returns: Any) -> Any:
    """The result of function(*args), computed by each device for its part.

    Args:
        function: written for one device, and so for any part of the rows and heads.
        mesh: the devices.
        args: trees of arrays.
        takes: for each of `args` what `layouts` reads: the argument itself, dimensions, or a tree of them.
        returns: the same for the result.
    """
    leaves, tree = jax.tree.flatten(tuple(args))
    inputs = [layout for take in takes for layout in layouts(take)]
    outputs = layouts(returns)
    made = []

    def run(*parts: Array) -> tuple[Array, ...]:
        seen = [_to_part(part) if layout.holds_ids else part for part, layout in zip(parts, inputs, strict=True)]
        results, result_tree = jax.tree.flatten(function(*jax.tree.unflatten(tree, seen)))
        made.append(result_tree)
        return tuple(_to_whole(x) if layout.holds_ids else x for x, layout in zip(results, outputs, strict=True))

    # check_vma is off, because with it every loop and kernel would have to declare which values vary over devices.
    spread = jax.shard_map(
        run, mesh=mesh, in_specs=tuple(layout.spec for layout in inputs),
        out_specs=tuple(layout.spec for layout in outputs), check_vma=False,
    )  # fmt: skip
    results = spread(*leaves)
    return jax.tree.unflatten(made[0], results)


def make_on(mesh: Mesh | None, make: Callable[..., Any], *sizes: Any, takes: str | None = None) -> Any:
    """What make(*sizes) returns, on a mesh in parts from the start; None takes the default device.

    On a mesh it is a program, compiled once for each function and its arguments.

    Args:
        mesh: the devices.
        make: returns a tree of arrays; a function of a module, not a closure.
        sizes: its arguments, hashable.
        takes: the dimensions of all arrays, as for `layouts`; None takes what `make` returns.
    """
    if mesh is None:
        return make(*sizes)
    tree, program = _program_that_makes(mesh, make, sizes, takes)
    return jax.tree.unflatten(tree, program())


@functools.lru_cache(maxsize=64)
def _program_that_makes(
    mesh: Mesh, make: Callable[..., Any], sizes: tuple[Any, ...], takes: str | None
) -> tuple[Any, Callable[[], tuple[Array, ...]]]:
    """The structure of what make(*sizes) returns, and a compiled function that gives its arrays."""
    made = []

    def leaves() -> tuple[Array, ...]:
        found = make(*sizes)
        made.append((jax.tree.structure(found), layouts(found if takes is None else takes)))
        return tuple(jax.tree.leaves(found))

    jax.eval_shape(leaves)
    tree, lies = made[0]
    shardings = tuple(NamedSharding(mesh, layout.spec) for layout in lies)
    return tree, jax.jit(leaves, out_shardings=shardings)


def put(array: np.ndarray, letters: str, mesh: Mesh | None) -> Array:
    """A host array, the same in every process, on the mesh; None takes the default device.

    Not jnp.asarray, which compiles a program for each shape.
    """
    if mesh is None:
        return jax.device_put(array)
    sharding = NamedSharding(mesh, layout_of(letters).spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_host(array: Array | np.ndarray) -> np.ndarray:
    """The whole array in this process, also if other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = _gather(array.sharding.mesh)(array)  # pyright: ignore[reportAttributeAccessIssue] - they lie on meshes
    return np.asarray(array)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Array], Array]:
    """A compiled function that gives each device the whole array."""
    return jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))


def check_rows_divide(name: str, num_rows: int, mesh: AnyMesh | None) -> None:
    """Raises SettingError if the mesh cannot divide so many rows evenly."""
    if mesh is not None and num_rows % mesh.shape[DATA]:
        rule = f"rows cannot be divided evenly over {mesh.shape[DATA]} devices"
        raise SettingError(name, num_rows, rule, f"take a multiple of {mesh.shape[DATA]}")


def _to_part(ids: Array) -> Array:
    """Flat ids among all lists as flat ids among this device's lists, [..., L, J]."""
    J = ids.shape[-1]
    in_all = J * lax.axis_size(MODEL)  # lists of a layer on all devices
    return ids // in_all * J + ids % in_all - J * lax.axis_index(MODEL)


def _to_whole(ids: Array) -> Array:
    """The inverse of `_to_part`."""
    J = ids.shape[-1]
    return ids // J * (J * lax.axis_size(MODEL)) + ids % J + J * lax.axis_index(MODEL)


def bytes_per_device(tree: Any, takes: Any, mesh_shape: tuple[int, int]) -> int:
    """Bytes of a tree's arrays on each device of a mesh of data x model devices."""
    sizes = dict(zip((DATA, MODEL), mesh_shape, strict=True))
    total = 0
    for leaf, layout in zip(jax.tree.leaves(tree), layouts(takes), strict=True):
        parts = math.prod(sizes.get(axis, 1) for axis in layout.spec)
        total += math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // parts
    return total
