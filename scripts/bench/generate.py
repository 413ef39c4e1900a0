"""Times decoding of whole LLaMA models on a GPU, dense and through shared lists of an eighth of the tokens.

Weights, cache and labels are random bfloat16, made on the device; speed does not depend on their values. Plans are
random with the share of computed lists that the settings have, one for each row; the lists are those that the first
steps choose. The steps run as one jitted scan, greedy, and end 32 tokens before the cache is full. The floor is what a
step must read (weights, keys and values, labels that are scored) over the measured copy bandwidth.

    python -m scripts.bench.generate --models LLaMA3-8B --batch 1 8 --context 4096
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_shapes
from scripts.bench import gpu_timing as timing

Tree = TypeVar("Tree")
BF16 = jnp.dtype(jnp.bfloat16)
ROOM = 64  # slots that are free when the steps begin
COLUMNS = (
    "model", "context", "batch", "side", "tokens read", "tokens/s", "step", "must read", "floor", "of floor",
    "dense / this",
)  # fmt: skip
TOY = ModelConfig(
    vocab_size=256, width=64, mlp_width=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=512,
    windows=(None,) * 3,
)  # fmt: skip


def settings(context: int) -> dict[str, HShareSettings | None]:
    """Returns the sides: dense, half of the lists computed, which is the default, and a third, as at 7/8-3/4-1/2."""
    sinks, recent = (16, 64) if context >= 4096 else (2, 8)
    base = HShareSettings(num_sinks=sinks, num_critical=context // 8 - sinks - recent, num_recent=recent)
    sides = (base, base.with_sharing_ratio("1/3-1-1"))
    return {"dense": None} | {f"HShare {side.sharing_ratio}": side for side in sides}


def random_tree(shapes: Tree, seed: int, dtype: jnp.dtype | None = None, scale: float = 1) -> Tree:
    """Returns random arrays of these shapes, and of this dtype where one is given."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = range(seed, seed + len(leaves))
    arrays = [
        timing.random_array(key, shape=leaf.shape, dtype=dtype or leaf.dtype, scale=scale)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return tree.unflatten(arrays)


def random_plan(config: ModelConfig, hshare: HShareSettings, batch: int) -> Array:
    """Returns plans [B, L, J] in which the settings' number of lists is computed; others copy a lower one of those."""
    L, J = config.num_layers, hshare.num_lists(config)
    first, size = hshare.dense_layers * J, L * J
    rng, source = np.random.default_rng(0), np.tile(np.arange(size), (batch, 1))
    for row in source:
        others = rng.permutation(np.arange(first + 1, size))[: hshare.num_computed_lists(config) - 1]
        own = np.sort(np.append(others, first))
        copies = np.setdiff1d(np.arange(first, size), own)
        row[copies] = own[rng.integers(np.searchsorted(own, copies))]
    return jnp.asarray(source.reshape(batch, L, J), jnp.int32)


def make_state(config: ModelConfig, batch: int, context: int, hshare: HShareSettings | None) -> DecodeState:
    """Returns a state that lacks ROOM tokens to be full; what is random is allocated once."""
    init = functools.partial(init_state, config, batch, context, method=hshare, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(init)
    cache = random_tree(shapes.cache, seed=1)
    cache = dataclasses.replace(cache, lengths=jnp.full((batch,), context - ROOM, jnp.int32))
    if hshare is None:
        return DecodeState(cache, None)

    def lists_and_plan() -> SharedLists:  # the labels, which are random, are left out
        shared = init().selection
        assert isinstance(shared, SharedLists)
        return dataclasses.replace(shared, labels=())

    assert isinstance(shapes.method_state, SharedLists)
    labels = random_tree(shapes.method_state.labels, seed=1000)
    shared = dataclasses.replace(jax.jit(lists_and_plan)(), labels=labels, source=random_plan(config, hshare, batch))
    return DecodeState(cache, shared)


@functools.partial(jax.jit, static_argnames=("config", "steps", "impl"), donate_argnames=("state",))
def decode_steps(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig, steps: int, impl: str
) -> tuple[Array, DecodeState]:
    """Returns (the last greedy tokens [B], the state) after so many steps, a multiple of the refresh interval."""
    interval = 1 if state.method_state is None else state.method_state.refresh_interval

    def run_block(carry: tuple[Array, DecodeState], _: None) -> tuple[tuple[Array, DecodeState], None]:
        tokens, state = carry
        for step in range(interval):
            logits, state = decode_step(params, tokens, state, config=config, refresh=step == 0, impl=impl)
            tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (tokens, state), None

    return lax.scan(run_block, (tokens, state), length=steps // interval)[0]


def bytes_to_read(config: ModelConfig, params: dict, state: DecodeState) -> tuple[float, float]:
    """Returns (bytes that a step must read, tokens that a head reads); of untied embeddings only rows are read."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not config.tie_embeddings:
        size -= params["embedding"].nbytes
    B, shared = state.cache.lengths.shape[0], state.method_state
    reads, length = float(count_reads(state, config).mean()), float(state.cache.lengths.mean())
    size += B * reads * config.cache_bytes_per_token(BF16.itemsize)
    if isinstance(shared, SharedLists):
        hshare, labels = shared.config, jax.tree.leaves(shared.labels[-1])
        per_slot = sum(leaf.nbytes for leaf in labels) / (B * config.num_kv_heads * state.cache.capacity)
        size += B * hshare.num_computed_lists(config) / hshare.refresh_interval * length * per_slot
    return size, reads


def measure(
    params: dict,
    config: ModelConfig,
    size: tuple[int, int],
    hshare: HShareSettings | None,
    options: argparse.Namespace,
    impl: str,
) -> dict:
    """Returns {"seconds"} of a step, the median, {"bytes"} and {"reads"}; every repeat starts at the same length."""
    context, batch = size
    state, times = make_state(config, batch, context, hshare), []
    tokens, begin = jnp.zeros((batch,), jnp.int32), np.asarray(state.cache.lengths)
    for _ in range(options.repeats + 2):  # the first compiles, the second may record command buffers
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=jnp.array(begin)))
        began = time.perf_counter()
        tokens, state = jax.block_until_ready(
            decode_steps(params, tokens, state, config=config, steps=options.steps, impl=impl)
        )
        times.append((time.perf_counter() - began) / options.steps)
    must_read, reads = bytes_to_read(config, params, state)
    return {"seconds": statistics.median(times[2:]), "bytes": must_read, "reads": reads}


def state_bytes(config: ModelConfig, batch: int, context: int, hshare: HShareSettings | None) -> int:
    """Returns the bytes of a state."""
    shapes = jax.eval_shape(lambda: init_state(config, batch, context, method=hshare, dtype=jnp.bfloat16))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def bench_model(
    name: str, config: ModelConfig, options: argparse.Namespace, bandwidth: float, impl: str
) -> Iterator[dict]:
    """Yields a row for each side of each size."""
    config = dataclasses.replace(config, max_positions=max(config.max_positions, *options.context))
    params = random_tree(parameter_shapes(config), seed=10_000, dtype=BF16, scale=0.02)
    for context, batch in itertools.product(options.context, options.batch):
        dense = None
        for side, hshare in settings(context).items():
            row: dict = {"model": name, "context": context, "batch": batch, "side": side}
            # The temporaries of a step are small beside 3% of a state.
            if lack := timing.lacks_memory(1.03 * state_bytes(config, batch, context, hshare)):
                yield row | {"error": f"skipped: {lack}"}
                continue
            try:
                row |= measure(params, config, (context, batch), hshare, options, impl)
            except timing.FAILURES as error:
                yield row | {"error": timing.reason(error)}
                continue
            row["floor"] = row["bytes"] / bandwidth
            dense = row["seconds"] if hshare is None else dense
            yield row if dense is None else row | {"dense_ratio": dense / row["seconds"]}


def print_row(row: dict) -> None:
    """Prints a row."""
    shown = [row.get("error", ""), *[""] * 6]
    if "seconds" in row:
        seconds, floor = row["seconds"], row["floor"]
        shown = [
            f"{row['reads']:.0f}", f"{row['batch'] / seconds:.1f}", f"{seconds * 1e3:.3f} ms",
            f"{row['bytes'] / 1e9:.3f} GB", f"{floor * 1e3:.3f} ms", f"{floor / seconds:.0%}",
            f"{row['dense_ratio']:.2f}" if "dense_ratio" in row else "",
        ]  # fmt: skip
    print(f"| {row['model']} | {row['context']} | {row['batch']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measures every model and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(timing.MODELS), default=list(timing.MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16_384])
    parser.add_argument("--steps", type=int, default=32, help="of one timed scan, at most 64")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--gpt-fast", type=Path, help="a checkout of gpt-fast: prints how to run it beside")
    parser.add_argument("--json", type=Path, help="writes the rows there too, after each of them")
    parser.add_argument("--toy", action="store_true", help="a tiny model through Pallas' interpreter, on any machine")
    options = parser.parse_args()
    if not 1 <= options.steps <= ROOM:
        parser.error(f"--steps {options.steps} must lie between 1 and {ROOM}")
    models, impl, effort = {name: timing.MODELS[name] for name in options.models}, "pallas", timing.FULL
    if options.toy:
        options.batch, options.context, options.steps, options.repeats = [1, 2], [256], 2, 2
        models, impl, effort = {"toy": TOY}, "interpret", timing.TOY
    print(timing.heading())
    bandwidth = timing.copy_bandwidth(effort)
    print(f"bfloat16, copy bandwidth {bandwidth / 1e9:.0f} GB/s")
    if options.gpt_fast:
        print(
            f"\nBeside it, its dense decoding of one row, with weights that it has converted:\n\n"
            f"    cd {options.gpt_fast} && python generate.py --compile --checkpoint_path CHECKPOINT/model.pth "
            f"--prompt {min(options.context) - ROOM} --max_new_tokens {options.steps}"
        )
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    for name, config in models.items():
        for row in bench_model(name, config, options, bandwidth, impl):
            print_row(row)
            rows.append(row)
            if options.json:
                timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
