"""What a model and a state take on each device, without devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from command_line import TINY
from jax.sharding import AbstractMesh
from random_weights import random_params

from hshare_jax.decode_state import init_state
from hshare_jax.device_memory import DeviceMemory, device_memory
from hshare_jax.errors import SettingError
from hshare_jax.methods.h2o import H2O
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import DATA, MODEL

METHOD = HShare(HShareSettings(num_sinks=2, num_critical=6, num_recent=4, label_channels=4))


def mesh_of(data: int, model: int) -> AbstractMesh:
    return AbstractMesh((data, model), (DATA, MODEL))


def num_bytes(tree: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_one_device_holds_the_bytes_of_the_arrays() -> None:
    params, state = random_params(TINY), init_state(TINY, 4, 300, method=METHOD)
    found = device_memory(TINY, 4, 300, method=METHOD, dtype=jnp.float32)
    assert found.weights == num_bytes(params)
    assert found.cache == num_bytes(state.cache)
    assert isinstance(state.method_state, SharedLists)
    assert found.labels == num_bytes(state.method_state.labels) > 0
    assert found.cache + found.labels + found.lists == num_bytes(state)
    assert found.total == found.weights + num_bytes(state)
    assert device_memory(TINY, 4, 300, dtype=jnp.float32) == dataclasses.replace(found, labels=0, lists=0)


def test_devices_divide_what_has_heads_and_what_has_rows() -> None:
    one, four = (device_memory(TINY, 4, 300, method=METHOD, mesh=mesh) for mesh in (mesh_of(1, 1), mesh_of(2, 2)))
    norms = (2 * TINY.num_layers + 1) * TINY.width * 2  # bytes; every device has them all
    assert four.weights == (one.weights - norms) // 2 + norms
    lengths = 4 * 4
    assert four.cache == (one.cache - lengths) // 4 + lengths // 2
    assert four.labels == one.labels // 4
    per_row = 2 * 4 * 4  # the age and the first recent slot of each row
    assert four.lists == (one.lists - per_row) // 4 + per_row // 2


def test_more_devices_than_kv_heads_hold_copies_of_them() -> None:
    two, four = (device_memory(TINY, 4, 300, mesh=mesh_of(1, model)) for model in (2, 4))
    assert two.cache == four.cache


def test_every_method_is_counted() -> None:
    found = device_memory(TINY, 4, 300, method=H2O(), mesh=mesh_of(2, 2))
    assert found.labels == 0
    assert found.lists > 0
    assert isinstance(found, DeviceMemory)


@pytest.mark.parametrize(
    ("data", "model", "told"),
    [(1, 3, "model=3 devices cannot divide 2 kv heads"), (3, 1, "batch_size=4 rows cannot be divided evenly over 3")],
)
def test_what_cannot_be_divided_is_told(data: int, model: int, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        device_memory(TINY, 4, 300, mesh=mesh_of(data, model))
