"""The bytes that a decode step must read, and how fast this machine reads."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from hshare_jax.decode_state import DecodeState, count_reads
from hshare_jax.methods.hshare.share_plan import mark_computed
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model


def read_bandwidth() -> float:
    """Bytes per second of summing an array far larger than the caches, the best of ten."""
    array, total, best = jnp.ones((128 * 2**20,), jnp.float32), jax.jit(jnp.sum), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        total(array).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return array.nbytes / best


def repeat_row(row: DecodeState, batch: int) -> DecodeState:
    """A state of `batch` rows that are copies of a state's one row."""

    def repeat(leaf: jax.Array) -> jax.Array:
        axis = 0 if leaf.shape[0] == 1 else 1  # lists are [L, B, J, C]
        return jnp.array(jnp.concatenate([leaf] * batch, axis=axis), copy=True)  # the steps donate it

    return jax.tree.map(repeat, row)


def bytes_of_step(model: Model, state: DecodeState) -> tuple[float, float, float]:
    """(Lists computed a step, bytes that a step must read, tokens that a head reads)."""
    config, B = model.config, state.cache.lengths.shape[0]
    length, reads = float(state.cache.lengths.mean()), float(count_reads(state, config).mean())
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves((state.cache.keys, state.cache.values)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) + reads * caches / state.cache.capacity
    lists = state.method_state
    if not isinstance(lists, SharedLists):
        return 0, size, reads
    is_computed = np.asarray(mark_computed(np.asarray(lists.source)))[:, lists.settings.num_dense :]
    computed = float(is_computed.sum(axis=(1, 2)).mean()) / lists.refresh_interval
    labels = jax.tree.leaves(lists.labels[-1])
    per_token = sum(leaf.nbytes for leaf in labels) / (B * config.num_kv_heads * state.cache.capacity)
    return computed, size + B * computed * length * per_token, reads
