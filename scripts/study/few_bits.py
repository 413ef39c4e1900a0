"""Measures what weights or caches in fewer bits lose: KL to the float32 model, and agreement of the likeliest token.

Weights alone are changed, or keys and values alone; all arithmetic is in float32. The first row is how far the file's
own bits are from float32, read as they are; for types that are kept it must be rounding alone.

    python -m scripts.study.few_bits --text A.txt B.txt --model smollm2-135m-instruct
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hshare_jax.evaluation.bootstrap import interval
from hshare_jax.evaluation.text_windows import cut_windows
from hshare_jax.kernels.block_weights import BlockWeights, quantise_blocks, quantise_channels
from hshare_jax.kernels.int8_rows import quantise_rows, row_floats
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import run_decoder, unembed
from hshare_jax.models.pretrained import load_model
from hshare_jax.training.attention import causal_attend
from scripts.study.cells import SKIP, read_texts
from scripts.study.reports import command, made_with

FLOAT32 = np.dtype("float32")


@functools.partial(jax.jit, static_argnames=("config", "has_int8_cache"))
def log_probabilities(
    params: dict, tokens: jax.Array, *, config: ModelConfig, has_int8_cache: bool = False
) -> jax.Array:
    """Log-probabilities [T, V] after each token of a window [T]."""
    rows, positions, attend = tokens[None, :], jnp.arange(len(tokens))[None, :], causal_attend(config)

    def attend_to_codes(layer: int, q: jax.Array, k: jax.Array | None, v: jax.Array | None, state: dict) -> Any:
        cached_k, cached_v = (None if x is None else row_floats(quantise_rows(x)) for x in (k, v))
        return attend(layer, q, cached_k, cached_v, state)

    how = attend_to_codes if has_int8_cache else attend
    hidden, _ = run_decoder(params, rows, positions, how, {}, config=config)
    return jax.nn.log_softmax(unembed(params, hidden[0], config=config))


def change_matrices(params: dict, change: Callable[[np.ndarray], Any]) -> dict:
    """The parameters with every matrix changed on the host."""

    def of(leaf: jax.Array) -> Any:
        return leaf if leaf.ndim == 1 else jax.tree.map(jnp.asarray, change(np.asarray(leaf)))

    return jax.tree.map(of, params)


def floats(blocks: BlockWeights) -> np.ndarray:
    """The floats that weights in few bits stand for."""
    return blocks.to_floats()


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bfloat16": lambda weight: weight.astype(jnp.bfloat16).astype(np.float32),
    "int8: a scale for each 32 weights": lambda weight: floats(quantise_blocks(weight, FLOAT32)),
    "int8-channel: a scale for each output": lambda weight: floats(quantise_channels(weight, FLOAT32)),
}
CACHE = "int8 cache: a scale for each token and head"


def main() -> None:
    """Measures all rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; of a .jsonl, `prompt`")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window, all of which are scored")
    options = parser.parse_args()
    texts = read_texts(parser, options.text)
    model = load_model(options.model, quantize="none")
    windows = [
        jnp.asarray(window.tokens[:-1])
        for text in texts.items()
        for window in cut_windows(model, *text, context=options.context, count=1, skip=SKIP)
    ]
    score = functools.partial(log_probabilities, config=model.config)
    expected = [np.asarray(score(model.params, window)) for window in windows]
    kinds: dict[str, Callable[[], dict]] = {
        "the file's own bits": lambda: load_model(options.model, quantize="stored").params,
        **{name: functools.partial(change_matrices, model.params, change) for name, change in CHANGES.items()},
        CACHE: lambda: model.params,
    }
    size = len(windows) * options.context
    print(f"{made_with(model.name)}, {len(windows)} windows, {size} positions\n\n    {command(options)}\n")
    print("| fewer bits | KL to float32, mean (95 %) | 99th percentile | same top token (95 %) |")
    print("|---|---|---|---|")
    for name, make in tqdm(kinds.items(), disable=None):
        params, divergence, agrees = make(), [], []
        for window, wanted in zip(windows, expected, strict=True):
            found = np.asarray(score(params, window, has_int8_cache=name == CACHE))
            divergence.append((np.exp(wanted) * (wanted - found)).sum(axis=1))
            agrees.append(wanted.argmax(axis=1) == found.argmax(axis=1))
        kl, same = np.stack(divergence), np.stack(agrees).astype(float)
        bounds = [*interval(np.mean, kl), *interval(np.mean, same)]
        print(
            f"| {name} | {kl.mean():.5f} ({bounds[0]:.5f}-{bounds[1]:.5f}) | {np.percentile(kl, 99):.4f} "
            f"| {same.mean():.1%} ({bounds[2]:.1%}-{bounds[3]:.1%}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
