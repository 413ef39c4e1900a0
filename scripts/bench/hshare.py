"""Times HShare beside our dense decoding, and the search for a plan and a refit beside the prefill before them.

All sides of the first table take turns of a few steps, so that a slow moment of the machine meets them alike. Bytes are
those that a step must read: weights, keys and values, and scored labels. The model is SmolLM2-135M on random tokens.

    python -m scripts.bench.hshare --batch 8 --context 4096
"""

import argparse
import platform
import statistics
import time
from datetime import date

import jax
import jax.numpy as jnp

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.prefill import prefill, read_prompt, refit
from scripts.bench.gpu_timing import command
from scripts.bench.step_bytes import bytes_of_step, read_bandwidth, repeat_row

ROUND = 4  # steps of one side before the next side's turn; a multiple of every refresh interval below
PLAN_SETTINGS = HShareSettings(num_sinks=8, num_critical=88, num_recent=32, min_length=0)  # of the second table


def methods() -> dict[str, HShare | None]:
    """The sides: dense decoding, and 512 tokens at several ratios with one plan for the whole batch."""
    base = HShare().with_settings(
        {"num_sinks": 16, "num_critical": 432, "num_recent": 64, "min_length": 0, "plan_scope": "batch"}
    )
    published = base.with_settings({"plan_kind": "published", "dilate": False, "tail": None})
    half = base.with_sharing_ratio("1/2-1-1")
    sides: dict[str, HShare | None] = {
        "dense": None,
        "units 1/2-1-1, no tail, layer 0 dense": half.with_settings({"tail": None}),
        "units 1/2-1-1, layer 0 dense": half.with_settings({"dense_layers": 1}),
        "units 1/2-1-1, pools of 2": half.with_settings({"pool": 2}),
    }
    for ratio in ("1-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1", "2/3-1-1/2"):
        sides[f"units {ratio}"] = base.with_sharing_ratio(ratio)
    for ratio in ("7/8-3/4-1/2", "1/2-1/2-1/2"):
        sides[f"published plan {ratio}"] = published.with_sharing_ratio(ratio)
    return sides


def bench_steps(model: Model, batch: int, context: int, rounds: int) -> None:
    """Prints the time and the bytes of a decode step of every side."""
    bandwidth, config = read_bandwidth(), model.config
    steps = (rounds + 1) * ROUND
    tokens = jax.random.randint(jax.random.key(1), (1, context), 0, config.vocab_size)
    states = {}
    for name, method in methods().items():
        state, length = init_state(config, 1, context, method=method), jnp.array([context - steps])
        prompt = tokens[:, : context - steps]
        _, row = prefill(model.params, prompt, length, state, config=config, method=method)
        states[name] = repeat_row(row, batch)
        del row
    times: dict[str, list[float]] = {name: [] for name in states}
    token = jnp.zeros((batch,), jnp.int32)
    for _ in range(rounds + 1):
        for name, method in methods().items():
            state, interval = states[name], 1 if method is None else method.settings.refresh_interval
            began = time.perf_counter()
            for step in range(ROUND):
                refresh = step % interval == 0
                _, state = decode_step(model.params, token, state, config=config, refresh=refresh)
            jax.block_until_ready(state)
            times[name].append((time.perf_counter() - began) / ROUND)
            states[name] = state
    print(f"\nbatch {batch}, {context} tokens; read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print("| side | lists computed a step | tokens read | bytes a step | step | dense / this | share of bandwidth |")
    print("|---|---|---|---|---|---|---|")
    dense = statistics.median(times["dense"][1:])
    for name, state in states.items():
        seconds = statistics.median(times[name][1:])  # the first round compiles
        computed, size, reads = bytes_of_step(model, state)
        print(
            f"| {name} | {computed:.1f} | {reads:.0f} | {size / 1e6:.0f} MB | {seconds * 1e3:.1f} ms "
            f"| {dense / seconds:.2f} | {size / seconds / bandwidth:.0%} |"
        )


def bench_plan(model: Model, contexts: list[int]) -> None:
    """Prints the time that finding channels, labels, plan and tails takes, and a refit, beside one prompt's prefill."""
    print("\n| prompt | plan | prefill | channels, labels, plan and tails | share | refit |")
    print("|---|---|---|---|---|---|")
    for context in contexts:
        tokens = jax.random.randint(jax.random.key(1), (1, context), 0, model.config.vocab_size)
        units = HShare(PLAN_SETTINGS)
        plain = units.with_settings({"tail": None})
        published = plain.with_settings({"plan_kind": "published"})
        for kind, method in {"units": units, "units, no tails": plain, "published, no tails": published}.items():
            # The first of three runs compiles.
            times = zip(*(_time_plan(model, tokens, method) for _ in range(3)), strict=True)
            read, found, again = (min(seconds) for seconds in times)
            share = f"{found:.3f} s | {found / read:.1%}"
            print(f"| {context} | {kind} | {read:.3f} s | {share} | {again:.3f} s |", flush=True)


def _time_plan(model: Model, tokens: jax.Array, method: HShare) -> tuple[float, float, float]:
    """Seconds of (the prefill, the search for channels, labels, plan and tails, a refit)."""
    config, lengths = model.config, jnp.array([tokens.shape[1]])
    state = init_state(config, 1, tokens.shape[1], method=method)
    assert isinstance(state.method_state, SharedLists)
    positions = method.probe_positions(jnp.zeros_like(lengths), lengths, tokens.shape[1])
    began = time.perf_counter()
    _, cache, queries = read_prompt(model.params, tokens, lengths, state.cache, positions, config=config)
    jax.block_until_ready(cache)
    read = time.perf_counter()
    assert queries is not None
    lists = jax.block_until_ready(method.after_prefill(state.method_state, queries, cache, config))
    found = time.perf_counter()
    last = tokens[:, -REFIT_TOKENS:]
    state = refit(
        model.params, last, jnp.array([last.shape[1]]), DecodeState(cache, lists), config=config, method=method
    )
    jax.block_until_ready(state)
    return read - began, found - read, time.perf_counter() - found


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
