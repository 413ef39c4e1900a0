"""Times the kernels of a decode step by themselves: a CPU's native ones, or another implementation's.

Each line is all layers of one kind of work in SmolLM2-135M's shape, as one program. Attention and selection run on
random keys, through random lists of 432 tokens beside 80 first and last ones; projections have the model's own 4-bit
weights. The last column is the time that reading the bytes would take, as a share of the time. All lines take turns.

    python -m scripts.bench.native --batch 8 --context 4096
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

from hshare_jax.kernels import api
from hshare_jax.kernels.block_weights import BlockWeights
from hshare_jax.kernels.labels import label_query, make_labels
from hshare_jax.models.pretrained import load_model
from scripts.bench.gpu_timing import command

LAYERS = 10  # different caches, so that none stays in the CPU's; times are scaled to the model's layers
NUM_SINKS, NUM_CRITICAL, NUM_RECENT = 16, 432, 64
ROUNDS = 9


def time_in_turns(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median seconds of each side. The sides take turns, so that a slow moment of the machine meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(of_side[1:]) for name, of_side in times.items()}  # the first turn compiles


def main() -> None:
    """Measures all kinds of work and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--impl", default="auto")
    options = parser.parse_args()
    B, S, impl = options.batch, options.context, options.impl
    model = load_model("smollm2-135m-instruct", quantize="stored")
    config = model.config
    N, K, H, L = config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers
    key, rng = jax.random.key(0), np.random.default_rng(0)
    keys, values = (
        [jax.random.normal(jax.random.fold_in(key, i + offset), (B, K, S, H)) for i in range(LAYERS)]
        for offset in (0, LAYERS)
    )
    q, lengths = jax.random.normal(key, (B, N, H)), jnp.full((B,), S, jnp.int32)
    middle = np.arange(NUM_SINKS, S - NUM_RECENT)
    listed = [np.sort(rng.permutation(middle)[:NUM_CRITICAL]) for _ in range(LAYERS * B * K)]
    lists = jnp.asarray(np.reshape(listed, (LAYERS, B, K, NUM_CRITICAL)), jnp.int32)
    source = jnp.tile(jnp.arange(LAYERS * K, dtype=jnp.int32).reshape(1, LAYERS, K), (B, 1, 1))
    channels = jnp.tile(jnp.arange(0, H, 2, dtype=jnp.int32), (B, K, 1))
    labels, query = [make_labels(of_layer, channels, 4) for of_layer in keys], label_query(q, channels, 4)
    matrices = [leaf for leaf in jax.tree.leaves(model.params, is_leaf=_is_blocks) if _is_blocks(leaf)]

    # As in a model, a layer waits for the one before it.
    def dense(out: jax.Array, keys: list, values: list) -> jax.Array:
        for cache in zip(keys, values, strict=True):
            out = api.dense_decode(out, *cache, lengths, impl=impl)
        return out

    def through_lists(out: jax.Array, keys: list, values: list) -> jax.Array:
        decode = functools.partial(api.sparse_decode, num_sinks=NUM_SINKS, max_recent=NUM_RECENT, impl=impl)
        for i, cache in enumerate(zip(keys, values, strict=True)):
            out = decode(out, *cache, lists, source, i, lengths, lengths - NUM_RECENT)
        return out

    def choose(lists: jax.Array, labels: list) -> jax.Array:
        ends = jnp.full((B,), NUM_SINKS), lengths - NUM_RECENT
        for i, of_layer in enumerate(labels):
            lists = api.select_by_labels(lists, i, query, of_layer, source, jnp.ones(B, bool), *ends, None, impl=impl)
        return lists

    def project(matrices: list) -> jax.Array:
        one = jnp.ones(())
        for weight in matrices:
            one = 1 + 0 * api.project(weight, jnp.full((B, weight.shape[1]), one), impl=impl)[0, 0]
        return one

    read = NUM_SINKS + NUM_CRITICAL + NUM_RECENT
    per_layer, scale = 2 * B * K * H * 4, L / LAYERS
    label_bytes = L * sum(leaf.nbytes for leaf in jax.tree.leaves(labels[0]))
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(matrices))
    memory = jnp.ones((128 * 2**20,), jnp.float32)  # far larger than the caches
    sides = {
        "reading memory": (jax.jit(jnp.sum), (memory,), 1, memory.nbytes),
        "dense attention": (jax.jit(dense), (q, keys, values), scale, L * per_layer * S),
        f"attention through lists, {read} tokens": (
            jax.jit(through_lists), (q, keys, values), scale, L * per_layer * read,
        ),
        "choice of all lists": (jax.jit(choose), (lists, labels), scale, label_bytes),
        "projections and logits": (jax.jit(project), (matrices,), 1, weight_bytes),
    }  # fmt: skip
    seconds = time_in_turns({name: functools.partial(run, *arrays) for name, (run, arrays, *_) in sides.items()})
    bandwidth = memory.nbytes / seconds["reading memory"]
    print(
        f"{date.today()}, {jax.devices()[0].device_kind}, {api.describe(impl)}, jax {jax.__version__}, Python "
        f"{platform.python_version()}; batch {B}, {S} tokens; read bandwidth {bandwidth / 1e9:.1f} GB/s\n\n"
        f"    {command()}\n\n| work of one step | time | bytes | share of bandwidth |\n|---|---|---|---|"
    )
    for name, (_, _, factor, size) in sides.items():
        took = factor * seconds[name]
        print(f"| {name} | {took * 1e3:.1f} ms | {size / 1e6:.0f} MB | {size / took / bandwidth:.0%} |")


def _is_blocks(leaf: object) -> bool:
    return isinstance(leaf, BlockWeights)


if __name__ == "__main__":
    main()
