"""Times HShare against our own dense decoding, and the search for the plan against the prefill before it.

All sides of the first table take turns, a few steps each, so that a slow moment of the machine meets them alike. The
bytes are what a step must read: weights, keys and values, and labels that are scored. SmolLM2-135M on random tokens.

    python -m scripts.bench.hshare --batch 8 --context 4096
"""

import argparse
import dataclasses
import platform
import statistics
import time
from datetime import date

import jax
import jax.numpy as jnp

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.prefill import prefill, read_prompt
from scripts.bench.decode import read_bandwidth
from scripts.bench.gpu_timing import command

ROUND = 4  # steps of one side before the next has its turn; a multiple of every refresh interval below


def settings() -> dict[str, HShareSettings | None]:
    """Returns the sides: dense, and 512 tokens at several ratios with one plan for the whole batch."""
    base = HShareSettings(num_sinks=16, num_critical=432, num_recent=64, plan_scope="batch")
    published = dataclasses.replace(base, plan="published", dilate=False)
    sides: dict[str, HShareSettings | None] = {"dense": None}
    for ratio in ("1-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1", "2/3-1-1/2"):
        sides[f"units {ratio}"] = base.with_sharing_ratio(ratio)
    for ratio in ("7/8-3/4-1/2", "1/2-1/2-1/2"):
        sides[f"published plan {ratio}"] = published.with_sharing_ratio(ratio)
    return sides


def bench_steps(model: Model, batch: int, context: int, rounds: int) -> None:
    """Prints the time and the bytes of a decode step of every side."""
    bandwidth = read_bandwidth()
    steps = (rounds + 1) * ROUND
    tokens = jax.random.randint(jax.random.key(1), (1, context), 0, model.config.vocab_size)
    states = {}
    for name, hshare in settings().items():
        state = init_state(model.config, 1, context, method=hshare)
        length = jnp.array([context - steps])
        _, row = prefill(model.params, tokens[:, : context - steps], length, state, config=model.config)
        states[name] = _repeat(row, batch)
        del row
    times: dict[str, list[float]] = {name: [] for name in states}
    token = jnp.zeros((batch,), jnp.int32)
    for _ in range(rounds + 1):
        for name, hshare in settings().items():
            state, interval = states[name], 1 if hshare is None else hshare.refresh_interval
            began = time.perf_counter()
            for step in range(ROUND):
                refresh = step % interval == 0
                _, state = decode_step(model.params, token, state, config=model.config, refresh=refresh)
            jax.block_until_ready(state)
            times[name].append((time.perf_counter() - began) / ROUND)
            states[name] = state
    print(f"\nbatch {batch}, {context} tokens; read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print("| side | lists computed a step | tokens read | bytes a step | step | dense / this | share of bandwidth |")
    print("|---|---|---|---|---|---|---|")
    dense = statistics.median(times["dense"][1:])
    for name, hshare in settings().items():
        seconds, state = statistics.median(times[name][1:]), states[name]  # the first round compiles
        computed, size, reads = bytes_of_step(model, state, hshare)
        print(
            f"| {name} | {computed:.1f} | {reads:.0f} | {size / 1e6:.0f} MB | {seconds * 1e3:.1f} ms "
            f"| {dense / seconds:.2f} | {size / seconds / bandwidth:.0%} |"
        )


def _repeat(row: DecodeState, batch: int) -> DecodeState:
    def repeat(leaf: jax.Array) -> jax.Array:
        axis = 0 if leaf.shape[0] == 1 else 1  # lists are [L, B, J, C]
        return jnp.array(jnp.concatenate([leaf] * batch, axis=axis), copy=True)  # the steps donate it

    return jax.tree.map(repeat, row)


def bytes_of_step(model: Model, state: DecodeState, hshare: HShareSettings | None) -> tuple[float, float, float]:
    """Returns (lists computed a step, bytes that a step must read, tokens read by a head)."""
    config, B = model.config, state.cache.lengths.shape[0]
    length, reads = float(state.cache.lengths.mean()), float(count_reads(state, config).mean())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) + B * reads * config.cache_bytes_per_token(4)
    if hshare is None or not isinstance(state.method_state, SharedLists):
        return 0, size, reads
    source = state.method_state.source.reshape(B, -1)
    first = hshare.dense_layers * hshare.num_lists(config)
    is_own = (source == jnp.arange(source.shape[1]))[:, first:]
    computed = float(is_own.sum(axis=1).mean()) / hshare.refresh_interval
    labels = state.method_state.labels[-1]
    per_token = sum(leaf.nbytes for leaf in jax.tree.leaves(labels)) / (B * config.num_kv_heads * state.cache.capacity)
    return computed, size + B * computed * length * per_token, reads


def bench_plan(model: Model, contexts: list[int]) -> None:
    """Prints the time that finding channels, labels and the plan takes, beside the dense prefill of one prompt."""
    print("\n| prompt | plan | prefill | channels, labels and plan | share |")
    print("|---|---|---|---|---|")
    for context in contexts:
        tokens = jax.random.randint(jax.random.key(1), (1, context), 0, model.config.vocab_size)
        for plan in ("units", "published"):
            # The first of three compiles.
            times = zip(*(_time_plan(model, tokens, HShareSettings(plan=plan)) for _ in range(3)), strict=True)
            read, share = (min(seconds) for seconds in times)
            print(f"| {context} | {plan} | {read:.3f} s | {share:.3f} s | {share / read:.1%} |", flush=True)


def _time_plan(model: Model, tokens: jax.Array, hshare: HShareSettings) -> tuple[float, float]:
    state, lengths = init_state(model.config, 1, tokens.shape[1], method=hshare), jnp.array([tokens.shape[1]])
    shared = state.method_state
    assert isinstance(shared, SharedLists)
    positions = shared.probe_positions(jnp.zeros_like(lengths), lengths, tokens.shape[1])
    began = time.perf_counter()
    _, cache, kept = read_prompt(model.params, tokens, lengths, state.cache, positions, config=model.config)
    jax.block_until_ready(cache)
    read = time.perf_counter()
    assert kept is not None
    jax.block_until_ready(shared.after_prefill(kept, positions, cache, model.config))
    return read - began, time.perf_counter() - read


def main() -> None:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10, help=f"timed turns of {ROUND} steps for each side")
    parser.add_argument("--plan-context", type=int, nargs="*", default=[256, 1024, 4096])
    options = parser.parse_args()
    print(
        f"{date.today()}, {jax.devices()[0].device_kind}, float32, jax {jax.__version__}, "
        f"Python {platform.python_version()}\n\n    {command()}"
    )
    model = load_model("smollm2-135m-instruct")
    for batch in options.batch:
        bench_steps(model, batch, options.context, options.rounds)
    bench_plan(model, options.plan_context)


if __name__ == "__main__":
    main()
