"""Times prefill on a GPU: the attention of one layer over a whole prompt, and the prefill of whole LLaMA models.

Our attention reads the prompt in chunks of 512 tokens, as `prefill` does, each chunk against the whole cache. The other
sides compute causal attention in one call: FlashAttention-2 through torch, cuDNN and XLA. Numbers are random bfloat16.
Operations are counted for the two matrix products below the diagonal.

    python -m scripts.bench.prefill --tokens 4096 32768
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hshare_jax.decode_state import init_state
from hshare_jax.kernels import api, pallas_prefill
from hshare_jax.kernels.tiling import Tiles
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.models.config import ModelConfig
from hshare_jax.prefill import CHUNKS, prefill
from scripts.bench import gpu_timing as timing
from scripts.bench.attention import Side
from scripts.bench.generate import TOY, random_params, with_positions

# Layouts of our kernel that are timed beside the one that tiling.py chooses.
LAYOUTS = (
    Tiles(64, num_warps=8, num_stages=2, queries=128),
    Tiles(128, num_warps=8, num_stages=2, queries=128),
    Tiles(64, num_warps=4, num_stages=3, queries=64),
    Tiles(128, num_warps=4, num_stages=2, queries=64),
)
MAX_XLA_TOKENS = 8192  # XLA writes all scores [N, T, T] to memory
LONG_PROMPT = 8192  # tokens; a longer prompt takes seconds
COLUMNS = ("what", "tokens", "side", "time", "TFLOP/s", "tokens/s")


def operations(config: ModelConfig, tokens: int) -> float:
    """The floating-point operations of one layer's causal attention."""
    return 2 * config.num_heads * config.head_dim * tokens * (tokens + 1)


def attention_bytes(config: ModelConfig, tokens: int) -> float:
    """The bytes of one layer's queries, output, keys and values."""
    return 4 * tokens * config.head_dim * (config.num_heads + config.num_kv_heads)


def make_arrays(config: ModelConfig, tokens: int) -> tuple[Array, Array, Array]:
    """Random queries [1, T, N, H], keys and values [1, K, T, H]."""
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = ((1, tokens, N, H), (1, K, tokens, H), (1, K, tokens, H))
    q, keys, values = (timing.random_array(i, shape=shape, dtype=timing.BF16) for i, shape in enumerate(shapes))
    return q, keys, values


def our_attention(q: Array, keys: Array, values: Array, *, tiles: Tiles | None = None) -> Array:
    """Attention [1, T, N, H] in chunks, as a prefill of one row computes it, or by our kernel in another layout."""
    _, T, N, H = q.shape
    width = min(CHUNKS[-1], T)
    interpret = jax.default_backend() == "cpu"

    def attend(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        chunk, start = given
        if tiles is None:
            return None, api.prefill_attention(chunk, keys, values, start)
        how = {"tiles": tiles, "interpret": interpret}
        return None, pallas_prefill.prefill_attention(chunk, keys, values, start, **how)[0]

    chunks = q.reshape(T // width, 1, width, N, H)
    starts = jnp.arange(0, T, width, dtype=jnp.int32)[:, None]
    return lax.scan(attend, None, (chunks, starts))[1].reshape(q.shape)


def attention_sides(
    config: ModelConfig, tokens: int, effort: timing.Effort, layouts: Sequence[Tiles] = ()
) -> list[Side]:
    """All sides of one layer's attention; ours comes first. `layouts` are other layouts of our kernel."""
    q, keys, values = make_arrays(config, tokens)

    def by_xla(q: Array, data: tuple[Array, Array], implementation: Literal["cudnn", "xla"]) -> Array:
        # jax.nn takes [B, T, K, H]. The numbers are random, so the same bytes serve in that order.
        keys, values = (cache.reshape(1, tokens, config.num_kv_heads, config.head_dim) for cache in data)
        return jax.nn.dot_product_attention(q, keys, values, is_causal=True, implementation=implementation)

    def attend_in_torch(q, keys, values) -> object:
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            grouped = q.shape[1] != keys.shape[1]
            return scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=grouped)

    def by_torch() -> float:
        by_head = q.reshape(1, config.num_heads, tokens, config.head_dim)
        return timing.torch_seconds_per_call(attend_in_torch, [(by_head, keys, values)], effort)

    attends = {
        "ours": lambda q, data: our_attention(q, *data),
        "cuDNN": functools.partial(by_xla, implementation="cudnn"),
    }
    for tiles in layouts:
        name = (
            f"ours, {tiles.queries} queries x {tiles.block} slots, {tiles.num_warps} warps, {tiles.num_stages} stages"
        )
        attends[name] = lambda q, data, tiles=tiles: our_attention(q, *data, tiles=tiles)
    if tokens <= MAX_XLA_TOKENS:
        attends["XLA"] = functools.partial(by_xla, implementation="xla")
    size, sides = attention_bytes(config, tokens), []
    for name, attend in attends.items():
        # The output has the queries' shape, so it is the next call's.
        chain = timing.Chain(lambda q, data, f=attend: (f(q, data), None), q, [(keys, values)], effort)
        sides.append(Side(name, size, chain.seconds, chain))
    sides.insert(1, Side("FlashAttention-2 (torch)", size, by_torch))
    return sides


def measure_attention(config: ModelConfig, tokens: int, effort: timing.Effort) -> Iterator[dict[str, Any]]:
    """Yields a row for each side of one layer's attention: {"seconds", "bytes", "operations"} or {"error"}."""
    layouts = LAYOUTS if effort is not timing.TOY else LAYOUTS[2:3]
    sides = attention_sides(config, tokens, effort, layouts if tokens <= LONG_PROMPT else ())
    timing.compile_together([side.chain for side in sides if side.chain is not None])
    for side in sides:
        row: dict[str, Any] = {"what": "attention of a layer", "tokens": tokens, "side": side.name, "bytes": side.bytes}
        try:
            row |= {"seconds": side.seconds(), "operations": operations(config, tokens)}
        except timing.FAILURES as error:
            row |= {"error": timing.reason(error)}
        yield row


def measure_model(config: ModelConfig, params: dict, tokens: int, method: HShare | None) -> dict[str, Any]:
    """The row of one prompt's prefill by a whole model, the faster of two runs; of a long prompt there is one run.

    Operations are counted for the projections and for attention.
    """
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens)), jnp.int32)
    side = "dense" if method is None else f"HShare {method.sharing_ratio}, labels and plan with it"
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    row: dict[str, Any] = {"what": "whole model", "tokens": tokens, "side": side, "bytes": weights}

    def run(count: int) -> float:
        state = init_state(config, 1, tokens, method=method, dtype=jnp.bfloat16)
        jax.block_until_ready(state)
        began = time.perf_counter()
        lengths = jnp.asarray([count])
        jax.block_until_ready(prefill(params, prompt[:, :count], lengths, state, config=config, method=method))
        return time.perf_counter() - began

    try:
        run(CHUNKS[-1])  # one chunk compiles everything
        row["seconds"] = min(run(tokens) for _ in range(2 if tokens <= LONG_PROMPT else 1))
    except timing.FAILURES as error:
        return row | {"error": timing.reason(error)}
    # Two operations a weight and token; the embedding is looked up, and the logits are of the last token alone.
    multiplied = weights - params["embedding"].nbytes * (1 if config.tie_embeddings else 2)
    row["operations"] = multiplied / timing.BF16.itemsize * 2 * tokens + config.num_layers * operations(config, tokens)
    return row | {"tokens_per_second": tokens / row["seconds"]}


def print_row(row: dict) -> None:
    """Prints a row."""
    shown = [row.get("error", ""), "", ""]
    if "seconds" in row:
        seconds = row["seconds"]
        rates = f"{row['operations'] / seconds / 1e12:.1f}", f"{row['tokens'] / seconds:.0f}"
        shown = [f"{seconds * 1e3:.3f} ms", *rates]
    print(f"| {row['what']} | {row['tokens']} | {row['side']} | {' | '.join(shown)} |", flush=True)


def main() -> None:
    """Measures every length and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(timing.MODELS), default="LLaMA3-8B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32_768], help="multiples of 512")
    parser.add_argument("--json", type=Path, help="also writes the rows to this file, after each row")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on any machine")
    options = parser.parse_args()
    config, effort = timing.MODELS[options.model], timing.QUICK
    if options.toy:
        options.tokens, config, effort = [512], dataclasses.replace(TOY, max_positions=512), timing.TOY
    if any(tokens % CHUNKS[-1] for tokens in options.tokens):
        parser.error(f"--tokens {options.tokens} must be multiples of {CHUNKS[-1]}")
    config = with_positions(config, max(options.tokens))
    print(timing.heading())
    print(f"bfloat16\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    rows: list[dict] = []
    params = random_params(config)
    for tokens in options.tokens:
        whole = (measure_model(config, params, tokens, method) for method in (None, HShare()))
        for rows_of in (measure_attention(config, tokens, effort), whole):
            for row in rows_of:
                print_row(row)
                rows.append(row)
                if options.json:
                    timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
