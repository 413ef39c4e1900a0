"""Times dense prefill and decode steps on this machine: ours, and transformers with torch.

Prints one table: milliseconds, the bytes that a dense step must read (weights and cache), and the share of the measured
read bandwidth at which the step reads them. Weights are random, in SmolLM2-135M's shape, because speed does not depend
on their values. scripts/bench/hshare.py times HShare beside dense decoding.

    python -m scripts.bench.decode --batch 1 8 --context 512 4096
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import jax
import jax.numpy as jnp

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import parameter_shapes
from hshare_jax.prefill import prefill
from scripts.bench.gpu_timing import command

SMOLLM2 = ModelConfig(
    vocab_size=49_152, width=576, mlp_width=1536, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    max_positions=8192, windows=(None,) * 30, rope=RopeConfig(theta=100_000.0), tie_embeddings=True,
)  # fmt: skip
WARM_STEPS = 8


def read_bandwidth() -> float:
    """Bytes per second of summing an array far larger than the caches, the best of ten."""
    array = jnp.ones((128 * 2**20,), jnp.float32)
    total = jax.jit(jnp.sum)
    return array.nbytes / min(_timed(lambda: total(array).block_until_ready()) for _ in range(10))


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def bench_ours(params: dict, context: int, batches: list[int], steps: int) -> tuple[float, list[float]]:
    """Seconds of a prefill of one row (the better of two), and of a decode step of each batch (the median).

    The timed steps end with `context` tokens in every row. The rows of a batch are copies, which changes no speed.
    """
    tokens = jax.random.randint(jax.random.key(1), (1, context), 0, SMOLLM2.vocab_size)

    def fill(length: int) -> DecodeState:
        state = init_state(SMOLLM2, 1, context)
        filled = prefill(params, tokens[:, :length], jnp.array([length]), state, config=SMOLLM2)[1]
        return jax.block_until_ready(filled)

    fill(context)
    prefill_seconds = min(_timed(lambda: fill(context)) for _ in range(2))
    row = fill(context - steps - WARM_STEPS)
    return prefill_seconds, [_time_steps(params, row, batch, steps) for batch in batches]


def _time_steps(params: dict, row: DecodeState, batch: int, steps: int) -> float:
    def repeat(leaf: jax.Array) -> jax.Array:
        return jnp.array(jnp.concatenate([leaf] * batch), copy=True)  # the steps donate it

    state, token = jax.tree.map(repeat, row), jnp.zeros((batch,), jnp.int32)
    times = []
    for _ in range(steps + WARM_STEPS):
        began = time.perf_counter()
        logits, state = decode_step(params, token, state, config=SMOLLM2)
        logits.block_until_ready()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_STEPS:])


def bench_transformers(context: int, batches: list[int], steps: int) -> tuple[float, list[float]]:
    """The same times of transformers' LlamaForCausalLM, with its default attention and cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = SMOLLM2
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, max_position_embeddings=c.max_positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, c.vocab_size, (1, context))

    def fill(length: int):
        return model(tokens[:, :length], use_cache=True, logits_to_keep=1).past_key_values

    medians = []
    with torch.no_grad():
        fill(context)
        prefill_seconds = min(_timed(lambda: fill(context)) for _ in range(2))
        for batch in batches:
            cache, times = fill(context - steps - WARM_STEPS), []
            cache.batch_repeat_interleave(batch)
            token = torch.zeros((batch, 1), dtype=torch.long)
            for _ in range(steps + WARM_STEPS):
                times.append(_timed(lambda cache=cache, token=token: model(token, past_key_values=cache)))
            medians.append(statistics.median(times[WARM_STEPS:]))
    return prefill_seconds, medians


def main() -> None:
    """Measures all sides of every cell in one run, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--steps", type=int, default=16, help="timed decode steps of a cell")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each cell, not the table")
    parser.add_argument("--no-transformers", action="store_true", help="leave out transformers, which needs torch")
    options = parser.parse_args()
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    if not options.no_transformers:
        import torch
        import transformers

        versions += f", torch {torch.__version__}, transformers {transformers.__version__}"
    device = jax.devices()[0].device_kind
    print(f"{date.today()}  {device}  float32  {versions}\n$ {command()}", file=sys.stderr)
    bandwidth = read_bandwidth()
    print(f"measured read bandwidth {bandwidth / 1e9:.1f} GB/s", file=sys.stderr)
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(parameter_shapes(SMOLLM2))))
    leaves, tree = jax.tree.flatten(parameter_shapes(SMOLLM2))
    params = tree.unflatten([jax.random.normal(k, s.shape) * 0.02 for k, s in zip(keys, leaves, strict=True)])
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not options.json:
        print(
            "| context | side | prefill, batch 1 | batch | decode step | a dense step must read | share of bandwidth |"
        )
        print("|---|---|---|---|---|---|---|")
    for context in options.context:
        sides = {
            "ours": lambda: bench_ours(params, context, options.batch, options.steps),  # noqa: B023
            "transformers": lambda: bench_transformers(context, options.batch, options.steps),  # noqa: B023
        }
        if options.no_transformers:
            del sides["transformers"]
        for side, run in sides.items():
            prefill_seconds, step_seconds = run()
            for batch, seconds in zip(options.batch, step_seconds, strict=True):
                dense_bytes = weight_bytes + batch * context * SMOLLM2.cache_bytes_per_token(4)
                cell = {
                    "context": context, "side": side, "prefill_seconds": round(prefill_seconds, 3), "batch": batch,
                    "decode_ms": round(seconds * 1e3, 2), "dense_bytes": dense_bytes,
                    "share_of_bandwidth": round(dense_bytes / seconds / bandwidth, 3),
                }  # fmt: skip
                row = (
                    f"| {context} | {side} | {prefill_seconds:.2f} s | {batch} | {seconds * 1e3:.1f} ms "
                    f"| {dense_bytes / 1e6:.0f} MB | {cell['share_of_bandwidth']:.0%} |"
                )
                print(json.dumps(cell) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
