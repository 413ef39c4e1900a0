"""Times decode steps and prefill on this machine: ours, dense and by HShare, transformers, and llama.cpp.

The model is SmolLM2-135M-Instruct, whose weights have 4 bits. `stored` sides keep them so, as llama.cpp does; the
others hold the same weights as float32. Bytes are those that a step must read: weights, the cached tokens that are
read, and the labels that are scored. Each side has two turns, so that a slow moment of the machine meets one of them. A
time is the median over calls that decode several tokens in one program, as `generate` does. transformers and llama.cpp
make one call for each token.

llama.cpp takes part if llama-cpp-python is installed and its model is given:

    python -m scripts.bench.decode --batch 1 8 --context 512 4096 8192 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

The ratio is to the fastest dense decoding of ours whose cache has the same dtype.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels.api import describe
from hshare_jax.kernels.int8_rows import KVCacheDType
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.prefill import prefill
from scripts.bench.gpu_timing import command
from scripts.bench.step_bytes import bytes_of_step, read_bandwidth, repeat_row

MODEL = "smollm2-135m-instruct"
ROUND = 8  # decode steps of one call
METHOD = HShare(HShareSettings(min_length=0))


@dataclasses.dataclass(frozen=True)
class Side:
    """One of ours: the weights, what computes a step, whether it decodes by HShare, and the dtype of its cache."""

    weights: str
    impl: str
    is_sparse: bool
    kv_cache_dtype: KVCacheDType = "auto"

    @property
    def name(self) -> str:
        """As the table names it."""
        cache = "" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} cache"
        return f"{'HShare' if self.is_sparse else 'dense'}, {self.weights}, {self.impl}{cache}"


SIDES = (
    Side("stored", "native", False),
    Side("stored", "native", True),
    Side("stored", "native", False, "int8"),
    Side("stored", "native", True, "int8"),
    Side("float32", "native", False),
    Side("float32", "native", True),
    Side("float32", "reference", False),
    Side("float32", "reference", True),
)


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@functools.partial(jax.jit, static_argnames=("config", "impl"), donate_argnames=("state",))
def decode_round(
    params: dict, token: jax.Array, state: DecodeState, *, config: ModelConfig, impl: str
) -> tuple[jax.Array, DecodeState]:
    """Decodes `ROUND` tokens greedily."""

    def step(_: jax.Array, carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        logits, state = decode_step(params, *carry, config=config, refresh=True, impl=impl)
        return logits.argmax(axis=-1).astype(jnp.int32), state

    return lax.fori_loop(0, ROUND, step, (token, state))


def time_side(
    side: Side, model: Model, row: DecodeState, batch: int, rounds: int
) -> tuple[float, list[float], tuple[float, float, float]]:
    """Seconds of the first call, which compiles; seconds of a step in each later call; and what a step reads."""
    state = repeat_row(row if side.is_sparse else DecodeState(row.cache, None), batch)
    token, times = jnp.zeros((batch,), jnp.int32), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        token, state = decode_round(model.params, token, state, config=model.config, impl=side.impl)
        token.block_until_ready()
        times.append(time.perf_counter() - began)
    return times[0], [seconds / ROUND for seconds in times[1:]], bytes_of_step(model, state)


def bench_ours(models: dict[str, Model], context: int, batches: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """Yields a line for each side and batch. The timed steps end with about `context` tokens in every row."""
    length = context - 2 * (rounds + 1) * ROUND
    tokens = jax.random.randint(jax.random.key(1), (1, length), 0, models["stored"].config.vocab_size)
    rows = {}
    for side in SIDES:
        if (prompt := (side.weights, side.kv_cache_dtype)) in rows:
            continue
        model = models[side.weights]
        state = init_state(model.config, 1, context, method=METHOD, kv_cache_dtype=side.kv_cache_dtype)
        _, rows[prompt] = prefill(model.params, tokens, jnp.array([length]), state, config=model.config, method=METHOD)
    for batch in batches:
        first, times, reads = {}, {side: [] for side in SIDES}, {}
        for order in (SIDES, SIDES[::-1]):
            for side in order:
                row = rows[side.weights, side.kv_cache_dtype]
                seconds, found, reads[side] = time_side(side, models[side.weights], row, batch, rounds)
                first.setdefault(side, seconds)
                times[side] += found
        for side in SIDES:
            _, size, num_read = reads[side]
            yield {
                "context": context, "batch": batch, "side": side.name, "kv_cache_dtype": side.kv_cache_dtype,
                "step_ms": statistics.median(times[side]) * 1e3,
                "bytes": size, "tokens_read": num_read, "first_call_s": first[side],
            }  # fmt: skip


def bench_prefill(models: dict[str, Model], context: int) -> Iterator[dict[str, Any]]:
    """Yields the seconds of a dense prefill of one row."""
    for weights, model in models.items():
        tokens = jax.random.randint(jax.random.key(1), (1, context), 0, model.config.vocab_size)

        def fill(length: int, model: Model = model, tokens: jax.Array = tokens) -> None:
            state, lengths = init_state(model.config, 1, context), jnp.array([length])
            jax.block_until_ready(prefill(model.params, tokens[:, :length], lengths, state, config=model.config))

        for length in (min(context, 512), 64):  # compiles the two programs that serve all lengths
            fill(length)
        yield {"context": context, "side": f"ours, {weights}", "prefill_s": _timed(lambda: fill(context))}


def bench_transformers(model: Model, context: int, batches: list[int], steps: int) -> Iterator[dict[str, Any]]:
    """Yields the same of transformers' LlamaForCausalLM in this shape, with its default attention and cache."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, max_position_embeddings=c.max_positions,
        tie_word_embeddings=True,
    )  # fmt: skip
    network = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, c.vocab_size, (1, context))

    def fill(length: int):
        return network(tokens[:, :length], use_cache=True, logits_to_keep=1).past_key_values

    with torch.no_grad():
        fill(context)
        yield {"context": context, "side": "transformers", "prefill_s": _timed(lambda: fill(context))}
        for batch in batches:
            cache, times = fill(context - steps), []
            cache.batch_repeat_interleave(batch)
            token = torch.zeros((batch, 1), dtype=torch.long)
            for _ in range(steps):
                times.append(_timed(lambda cache=cache, token=token: network(token, past_key_values=cache)))
            yield {
                "context": context, "batch": batch, "side": "transformers, float32",
                "step_ms": statistics.median(times[steps // 2 :]) * 1e3, "tokens_read": context,
                "bytes": 4 * c.num_parameters + batch * context * c.cache_bytes_per_token(4),
            }  # fmt: skip


def bench_llama_cpp(gguf: Path, config: ModelConfig, context: int, steps: int) -> Iterator[dict[str, Any]]:
    """Yields the same of llama.cpp with its default cache (float16), at batch 1, with as many threads as JAX has."""
    import os

    from llama_cpp import Llama  # pyright: ignore[reportMissingImports] - it takes long to build

    llama = Llama(str(gguf), n_ctx=context, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(), verbose=False)
    tokens = jax.random.randint(jax.random.key(1), (context - steps,), 0, config.vocab_size).tolist()
    yield {"context": context, "side": "llama.cpp", "prefill_s": _timed(lambda: llama.eval(tokens))}
    times = [_timed(lambda: llama.eval([7])) for _ in range(steps)]
    yield {
        "context": context, "batch": 1, "side": "llama.cpp", "step_ms": statistics.median(times[steps // 2 :]) * 1e3,
        "bytes": gguf.stat().st_size + context * config.cache_bytes_per_token(2), "tokens_read": context,
    }  # fmt: skip


def _best_dense(line: dict[str, Any], lines: list[dict[str, Any]]) -> float:
    """The milliseconds of our fastest dense decoding in the cell of a line, with a cache of the same dtype."""

    def cell(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["context"], line.get("batch"), line.get("kv_cache_dtype", "auto")

    return min(other["step_ms"] for other in lines if other["side"].startswith("dense") and cell(other) == cell(line))


def main() -> None:
    """Measures all sides of every cell in one run, and prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=4, help=f"timed calls of {ROUND} steps in each turn of a side")
    parser.add_argument("--gguf", type=Path, help="the built-in model's GGUF file, for llama.cpp")
    parser.add_argument("--transformers", action="store_true", help="transformers takes part, which needs torch")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each cell, not the tables")
    options = parser.parse_args()
    others = (["torch", "transformers"] if options.transformers else []) + (
        ["llama-cpp-python"] if options.gguf else []
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", *others))
    bandwidth = read_bandwidth()
    print(
        f"{date.today()}, {jax.devices()[0].device_kind}, {versions}, Python {platform.python_version()}; native is "
        f"{describe('native')}; read bandwidth {bandwidth / 1e9:.1f} GB/s\n\n    {command()}\n",
        file=sys.stderr,
    )
    models = {"stored": load_model(MODEL, quantize="stored"), "float32": load_model(MODEL, quantize="none")}
    lines: list[dict[str, Any]] = []
    for context in options.context:
        cells = [bench_prefill(models, context), bench_ours(models, context, options.batch, options.rounds)]
        if options.transformers:
            cells.append(bench_transformers(models["float32"], context, options.batch, 2 * ROUND))
        if options.gguf:
            cells.append(bench_llama_cpp(options.gguf, models["stored"].config, context, 4 * ROUND))
        for cell in cells:
            for line in cell:
                lines.append(line)
                print(json.dumps(line), file=sys.stdout if options.json else sys.stderr, flush=True)
    if options.json:
        return
    print("| context | batch | side | step | best dense of ours / this | bytes | share of bandwidth | tokens read |")
    print("|---|---|---|---|---|---|---|---|")
    for line in sorted((line for line in lines if "batch" in line), key=lambda line: (line["context"], line["batch"])):
        ratio = _best_dense(line, lines) / line["step_ms"]
        share = line["bytes"] / line["step_ms"] * 1e3 / bandwidth
        print(
            f"| {line['context']} | {line['batch']} | {line['side']} | {line['step_ms']:.1f} ms | {ratio:.2f} "
            f"| {line['bytes'] / 1e6:.0f} MB | {share:.0%} | {line['tokens_read']:.0f} |"
        )
    print("\n| context | side | prefill, batch 1 | first call, which compiles |\n|---|---|---|---|")
    for line in lines:
        if "prefill_s" in line:
            print(f"| {line['context']} | {line['side']} | {line['prefill_s']:.2f} s | |")
        elif "first_call_s" in line and line["batch"] == options.batch[0]:
            print(f"| {line['context']} | {line['side']} | | {line['first_call_s']:.1f} s |")


if __name__ == "__main__":
    main()
