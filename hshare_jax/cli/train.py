#!/usr/bin/env python3
"""Trains a causal language model on text files, from random weights or from a model that is there.

DIR gets checkpoints (step_000123), metrics.jsonl, metrics.png and, at the end, the model, which the commands read:
`hshare-jax generate --model DIR/model`. After a kill the same command goes on where it was.

Every JAX device takes its share of a batch. A CPU is one device; JAX_NUM_CPU_DEVICES=2 makes it two, which is faster on
two cores than two threads in one device, and holds parameters and optimiser state twice.

    python scripts/train.py --text books/*.txt --output runs/tiny --preset tiny --sequence-length 256 --num-steps 500
    python scripts/train.py --text books/*.txt --output runs/shared --model smollm2-135m-instruct \\
        --kv-sharing sandwich-middle:15 --learning-rate 3e-4 --sequence-length 512 --batch-size 8
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax

from hshare_jax.cli.options import (
    DEFAULT_MODEL,
    FAILURE,
    USAGE,
    Parser,
    UsageError,
    add_kv_sharing,
    check_kv_sharing,
    check_output,
    option_name,
    read_text,
    share_kv_as_told,
)
from hshare_jax.host_memory import keep_freed_memory
from hshare_jax.models.config import ModelConfig, config_from_hf
from hshare_jax.models.pretrained import Model, ModelFiles, check_model_name, open_model
from hshare_jax.training.config import TrainingConfig
from hshare_jax.training.data import TrainingData, encode_files, split_windows
from hshare_jax.training.run import METRICS, check_length, train
from hshare_jax.training.start import PRESETS, new_model, preset, share_layers
from hshare_jax.training.step import data_mesh

WARMUP = TrainingConfig().warmup_steps  # unless a tenth of the steps is fewer
HELP = {
    "sequence_length": "tokens that a window predicts",
    "batch_size": "windows of an optimiser step",
    "accumulation_steps": "micro-batches that a step is cut into, to take less memory",
    "num_steps": "optimiser steps of the whole run",
    "learning_rate": "its peak",
    "warmup_steps": "steps of linear warm-up; unless told a tenth of all, at most",
    "min_learning_rate_ratio": "where the cosine ends, as a share of the peak",
    "weight_decay": "of AdamW, on matrices alone",
    "beta1": "of AdamW",
    "beta2": "of AdamW",
    "max_grad_norm": "gradients are scaled down to this norm; 0 leaves them",
    "compute_dtype": "of the forward and backward pass: float32 or bfloat16; masters are float32",
    "seed": "of random weights and of the windows' order",
    "log_every": "steps between two lines of metrics",
    "eval_every": "steps between two evaluations",
    "checkpoint_every": "steps between two checkpoints",
    "keep_checkpoints": "how many of the newest stay",
}


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, TrainingConfig]:
    """Returns the options and the settings among them; ends the program with code 2 on a mistake."""
    parser = Parser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text to train on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run's directory")
    parser.add_argument("--eval-text", nargs="+", metavar="FILE", help="text to evaluate on; default: held-out windows")
    parser.add_argument("--eval-fraction", type=float, default=0.01, help="share of the windows held out (0.01)")
    parser.add_argument("--max-eval-windows", type=int, default=128, metavar="N", help="no more are evaluated (128)")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", metavar="NAME", help="start from: built-in name, GGUF file, directory or hub id")
    start.add_argument("--preset", choices=tuple(PRESETS), help="random weights in a ready size")
    start.add_argument("--config", type=Path, metavar="JSON", help="random weights in the sizes of a config.json")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help=f"of which model, for --preset and --config ({DEFAULT_MODEL})"
    )
    add_kv_sharing(parser.add_argument_group("cross-layer KV sharing"), weights=True)
    group = parser.add_argument_group("training")
    for field in dataclasses.fields(TrainingConfig):
        kind, default = type(field.default), field.default
        group.add_argument(
            option_name(field.name), type=kind, default=default, metavar="N" if kind is int else "X",
            help=f"{HELP[field.name]} ({default})",
        )  # fmt: skip
    parser.set_defaults(warmup_steps=None)
    options = parser.parse_args(arguments)
    if options.warmup_steps is None:
        options.warmup_steps = max(0, min(WARMUP, options.num_steps // 10))
    options.output = options.output.expanduser()
    try:
        check_output(options.output / METRICS, overwrite=True)
        settings = TrainingConfig(**{name: getattr(options, name) for name in HELP})
        if not 0 < options.eval_fraction < 1:
            raise ValueError(f"eval_fraction={options.eval_fraction} must lie between 0 and 1")
        if options.max_eval_windows < 1:
            raise ValueError(f"max_eval_windows={options.max_eval_windows} must be at least 1")
        if options.model and options.tokenizer:
            raise ValueError("--tokenizer is for --preset and --config; --model brings its own")
        if options.init and not options.model:
            raise ValueError("--init is for --model; --preset and --config start from random weights")
        check_kv_sharing(options)
        for option, names in (("--text", options.text), ("--eval-text", options.eval_text or ())):
            if "-" in names:
                raise ValueError(f"{option} must name files, not -: a run that is started again reads them again")
            for name in names:
                read_text(name, f"{option} ")
        check_model_name(options.model or options.tokenizer or DEFAULT_MODEL)
        options.sizes = read_config(options.config) if options.config else None
        data_mesh(settings)
    except (UsageError, ValueError, FileNotFoundError) as error:
        parser.error(as_typed(error))
    return options, settings


def as_typed(error: Exception) -> str:
    """Returns a library's complaint in the user's words: `num_steps=0` is `--num-steps 0`, `tokens` those of --text."""
    known = "|".join([*HELP, "eval_fraction", "max_eval_windows"])
    text = re.sub(r"^(eval_)?tokens has", lambda match: f"--{'eval-' if match[1] else ''}text has", str(error))
    return re.sub(rf"\b({known})=", lambda match: f"{option_name(match[1])} ", text)


def read_config(path: Path) -> ModelConfig:
    """Returns the sizes of a config.json, its vocabulary yet to be the tokeniser's; UsageError if it has none."""
    try:
        sizes = json.loads(read_text(str(path), "--config "))
    except ValueError as error:
        raise UsageError(f"--config {path} is not JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise UsageError(f"--config {path} must hold a JSON object, such as a model's config.json")
    try:
        return config_from_hf({**sizes, "vocab_size": 1})
    except (TypeError, ValueError) as error:  # TypeError: text in place of a number
        raise UsageError(f"--config {path}: {error}") from error


def read_data(options: argparse.Namespace, settings: TrainingConfig, files: ModelFiles) -> TrainingData:
    """Returns the windows of the texts."""
    if files.tokenizer is None:
        raise ValueError(f"{files.name} has no tokeniser, so text cannot be given to it")
    tokens = encode_files(files.tokenizer, options.text)
    others = encode_files(files.tokenizer, options.eval_text) if options.eval_text else None
    return split_windows(
        tokens, settings.sequence_length, eval_fraction=options.eval_fraction,
        max_eval_windows=options.max_eval_windows, eval_tokens=others,
    )  # fmt: skip


def first_config(options: argparse.Namespace, settings: TrainingConfig, files: ModelFiles) -> ModelConfig:
    """Returns the configuration that is trained; UsageError if its layers cannot share as told."""
    if options.model:
        config = files.config
    elif options.preset:
        # As many tokens as the tokeniser's own model has: often more than there are, and a multiple of 64.
        longest = max(PRESETS[options.preset].max_positions, settings.sequence_length)
        config = preset(options.preset, vocab_size=files.config.vocab_size, max_positions=longest)
    else:
        config = dataclasses.replace(options.sizes, vocab_size=files.config.vocab_size)
    return share_kv_as_told(options, config)


def first_model(options: argparse.Namespace, config: ModelConfig, settings: TrainingConfig, files: ModelFiles) -> Model:
    """Returns the model that training starts from; one of random weights knows no chat template."""
    sharing = "" if options.kv_sharing is None else f"+{options.kv_sharing}"
    if options.model:
        model = files.load("float32")
        name = model.name + sharing
        return share_layers(model, config, init=options.init or "mean", name=name) if sharing else model
    tokenizer = files.tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = None
    name = (options.preset or options.config.stem) + sharing
    return new_model(config, tokenizer, name=name, seed=settings.seed)


def run(options: argparse.Namespace, settings: TrainingConfig) -> None:
    """Trains, draws the curves and prints the result as one line of JSON."""
    files = open_model(options.model or options.tokenizer or DEFAULT_MODEL)
    try:
        config = first_config(options, settings, files)
        check_length(config, settings)
        data = read_data(options, settings, files)
    except ValueError as error:
        raise UsageError(as_typed(error)) from error
    model = first_model(options, config, settings, files)
    windows = f"{len(data.training_indices):,} windows, {len(data.eval_indices):,} held out"
    print(
        f"{model.config.num_parameters / 1e6:.1f}M parameters, {windows}, {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}",
        file=sys.stderr,
    )
    result = train(model, data, settings, options.output)
    summary = dataclasses.asdict(result) | {"plot": None}
    if importlib.util.find_spec("matplotlib") is None:
        print("no plot is drawn: that needs matplotlib, pip install 'hshare-jax[eval]'", file=sys.stderr)
    else:
        from hshare_jax.evaluation.plots.overlap import save
        from hshare_jax.training.curves import plot_training, read_metrics

        summary["plot"] = str(options.output / "metrics.png")
        lines = read_metrics(options.output / METRICS)
        save(plot_training(lines, subject=f"{model.name}, {settings.tokens_per_step:,} tokens a step"), summary["plot"])
    print(json.dumps(summary))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failure, 2 for a usage error; one in the options alone ends the program."""
    options, settings = parse(arguments)
    try:
        run(options, settings)
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return USAGE
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return FAILURE
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):  # how JAX says it
            raise
        print(
            f"train.py: error: out of memory; lower --batch-size, or raise --accumulation-steps: {error}",
            file=sys.stderr,
        )
        return FAILURE
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 128 + 2
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
