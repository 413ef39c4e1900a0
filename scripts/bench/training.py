"""Times optimiser steps on this machine: ours, and the same model in transformers with torch, turn by turn.

Prints one table: tokens/s of each side's fastest step, and the ratio of ours to theirs. Both sides run in float32 with
AdamW and gradient clipping, on the same random windows. torch uses its fused AdamW and its attention kernel. Both sides
keep freed memory (`keep_freed_memory`). Ours trains data-parallel over JAX's devices. A CPU is one device, unless
JAX_NUM_CPU_DEVICES says otherwise. On a busy machine, more threads than idle cores slow torch down far more than us;
then compare on one core, with `taskset -c 0` and --threads 1.

    JAX_NUM_CPU_DEVICES=2 python -m scripts.bench.training --vocab-size 8192 49152
"""

import argparse
import platform
import time
from collections.abc import Callable
from datetime import date

import jax
import numpy as np
from tqdm import tqdm

from hshare_jax.host_memory import keep_freed_memory
from hshare_jax.models.config import ModelConfig
from hshare_jax.training.presets import PRESETS, preset
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.start import new_model
from hshare_jax.training.step import data_mesh, init_state, place_batch, train_step
from scripts.bench.gpu_timing import command


def our_step(config: ModelConfig, settings: TrainingSettings, windows: np.ndarray) -> Callable[[], float]:
    """A function that takes one step and returns the loss."""
    mesh = data_mesh(settings)
    state, batch = init_state(new_model(config, None).params, settings, mesh), place_batch(windows, settings, mesh)
    compiled = train_step.lower(state, batch, config=config, settings=settings, mesh=mesh).compile()

    def step() -> float:
        nonlocal state
        state, found = compiled(state, place_batch(windows, settings, mesh))
        jax.block_until_ready(state)
        return float(found["loss"])

    return step


def torch_step(config: ModelConfig, settings: TrainingSettings, windows: np.ndarray) -> Callable[[], float]:
    """A function that takes one step of the same model in transformers and returns the loss."""
    import torch
    import transformers

    their_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings, use_cache=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(their_config)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), settings.learning_rate, (settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    tokens = torch.tensor(windows[:, :-1]).long()  # transformers shifts the labels

    def step() -> float:
        optimizer.zero_grad()
        loss = theirs(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.max_grad_norm)
        optimizer.step()
        return float(loss.detach())

    return step


def seconds_of(step: Callable[[], float]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    """Times both sides and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8192, 49_152])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--threads", type=int, help="threads of torch; default: one a core")
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    settings = TrainingSettings(sequence_length=options.sequence_length, batch_size=options.batch_size)
    devices = jax.devices()
    versions, rows = [f"jax {jax.__version__} (devices: {len(devices)})"], []
    if not options.without_torch:
        import torch
        import transformers

        if options.threads:
            torch.set_num_threads(options.threads)
        versions += [f"torch {torch.__version__} ({torch.get_num_threads()} threads)"]
        versions += [f"transformers {transformers.__version__}"]
    for vocab_size in options.vocab_size:
        config = preset(options.preset, vocab_size=vocab_size, max_positions=options.sequence_length)
        shape = (options.batch_size, options.sequence_length + 1)
        windows = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
        steps = {"ours": our_step(config, settings, windows)}
        if not options.without_torch:
            steps["transformers"] = torch_step(config, settings, windows)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in tqdm(range(options.rounds + 1), desc=f"vocabulary {vocab_size}", disable=None):
            for name, step in steps.items():
                taken = seconds_of(step)
                if number:  # the first step of each side warms up
                    times[name].append(taken)
        speeds = {name: settings.tokens_per_step / min(taken) for name, taken in times.items()}
        rows.append((config, speeds))
        jax.clear_caches()
    print(f"{devices[0].device_kind}, {', '.join(versions)}, Python {platform.python_version()}, {date.today()}")
    print(f"{command()}\n")
    print("| parameters | vocabulary | batch x length | ours, tokens/s | transformers, tokens/s | ours over theirs |")
    print("|---|---|---|---|---|---|")
    for config, speeds in rows:
        ours, theirs = speeds["ours"], speeds.get("transformers")
        others = "- | -" if theirs is None else f"{theirs:,.0f} | {ours / theirs:.2f}"
        size = f"{options.batch_size} x {options.sequence_length}"
        print(f"| {config.num_parameters / 1e6:.1f}M | {config.vocab_size:,} | {size} | {ours:,.0f} | {others} |")


if __name__ == "__main__":
    keep_freed_memory()
    main()
