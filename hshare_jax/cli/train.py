"""`hshare-jax train`: trains a causal language model on text files, from random weights or from an existing model."""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.cli.errors import UsageError, usage_error, usage_errors
from hshare_jax.cli.options import (
    DEFAULT_MODEL,
    add_fields,
    add_kv_sharing,
    check_kv_sharing,
    check_not_input,
    check_output,
    read_text,
    real,
    share_kv_as_told,
    whole,
)
from hshare_jax.errors import SettingError, is_out_of_memory
from hshare_jax.files.texts import check_path, parse_json
from hshare_jax.host_memory import keep_freed_memory
from hshare_jax.training.presets import PRESETS, preset
from hshare_jax.training.settings import TrainingSettings

if TYPE_CHECKING:
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model, ModelFiles
    from hshare_jax.training.data import TrainingData

# The modules that only this command needs are imported in its functions, so that every command starts quickly.

DESCRIPTION = """\
Train a causal language model on text files, from random weights or from an existing model.

DIR gets checkpoints (step_000123), metrics.jsonl, metrics.png and, at the end, the trained model, for the other
commands: `hshare-jax generate --model DIR/model`. After a kill, the same command resumes the run.

Every JAX device takes an equal share of a batch. A CPU counts as one device. JAX_NUM_CPU_DEVICES=2 makes it two
devices, which are faster on two cores than one device with two threads, but hold parameters and optimiser state twice.
"""
EXAMPLES = """\
examples:
  hshare-jax train --text books/*.txt --output runs/tiny --preset tiny --sequence-length 256 --num-steps 500
  hshare-jax train --text books/*.txt --output runs/shared --model smollm2-135m-instruct \\
      --kv-sharing sandwich-middle:15 --learning-rate 3e-4 --sequence-length 512 --batch-size 8
"""
PLOT = "metrics.png"
WARMUP = TrainingSettings().warmup_steps  # unless a tenth of all steps is fewer


def add_train(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `train`."""
    parser.set_defaults(run=run_train)
    parser.description, parser.epilog, parser.allow_abbrev = DESCRIPTION, EXAMPLES, False
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 text files to train on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory of the run")
    parser.add_argument(
        "--eval-text", nargs="+", metavar="FILE", help="text files to evaluate on; default: held-out windows of --text"
    )
    parser.add_argument(
        "--eval-fraction", type=real, default=0.01, metavar="X", help="share of the windows held out (default: 0.01)"
    )
    parser.add_argument(
        "--max-eval-windows", type=whole, default=128, metavar="N", help="most windows evaluated (default: 128)"
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--model", metavar="NAME", help="model to start from: built-in name, GGUF file, directory or hub id"
    )
    start.add_argument("--preset", choices=tuple(PRESETS), help="start from random weights in a ready size")
    start.add_argument(
        "--config", type=Path, metavar="JSON", help="start from random weights in the sizes of a config.json"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME",
        help=f"model whose tokenizer --preset and --config use (default: {DEFAULT_MODEL})",
    )  # fmt: skip
    add_kv_sharing(parser.add_argument_group("cross-layer KV sharing"), weights=True)
    group = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    add_fields(group, TrainingSettings, leave_out=("warmup_steps",))
    (warmup,) = (field for field in dataclasses.fields(TrainingSettings) if field.name == "warmup_steps")
    group.add_argument(
        "--warmup-steps", type=whole, metavar="N",
        help=f"{warmup.metadata['help']} (default: {WARMUP}, or a tenth of all steps if that is fewer)",
    )  # fmt: skip


def run_train(options: argparse.Namespace) -> int:
    """Trains, draws the curves and prints the result as one line of JSON. Returns the exit status."""
    keep_freed_memory()
    try:
        _train(options, *_prepare(options))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory; lower --batch-size, or raise --accumulation-steps: {error}") from error
    except KeyboardInterrupt:
        print("hshare-jax: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        raise
    return 0


def _prepare(options: argparse.Namespace) -> "tuple[TrainingSettings, ModelFiles, ModelConfig, TrainingData]":
    """Reads and checks everything except weights; UsageError for a mistake in the options or the texts."""
    from hshare_jax.models.pretrained import open_model
    from hshare_jax.training.run import check_length
    from hshare_jax.training.step import data_mesh

    try:
        settings = _read_settings(options)
        sizes = _check_start(options)
        data_mesh(settings)  # for its check
        files = open_model(options.model or options.tokenizer or DEFAULT_MODEL)
        config = _first_config(options, settings, files, sizes)
        check_length(config, settings)
        return settings, files, config, _read_data(options, settings, files)
    except SettingError as error:
        raise usage_error(error) from error


def _read_settings(options: argparse.Namespace) -> TrainingSettings:
    """The settings that the options ask for; UsageError or SettingError if an option cannot be used."""
    from hshare_jax.training.data import check_eval_windows
    from hshare_jax.training.run import METRICS, MODEL

    options.output = Path(os.path.expanduser(options.output))
    inputs = [options.model, options.tokenizer, options.config, *options.text, *(options.eval_text or ())]
    with usage_errors():
        check_path(options.output)
    check_output(options.output / METRICS, inputs=inputs, overwrite=True)
    for name in (PLOT, MODEL):
        check_not_input(options.output / name, inputs)
    names = [field.name for field in dataclasses.fields(TrainingSettings)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if "warmup_steps" not in given:
        num_steps = given.get("num_steps", TrainingSettings().num_steps)
        given["warmup_steps"] = max(0, min(WARMUP, num_steps // 10))
    settings = TrainingSettings(**given)
    check_eval_windows(options.eval_fraction, options.max_eval_windows)
    return settings


def _check_start(options: argparse.Namespace) -> "ModelConfig | None":
    """Checks what is not a setting, before a model is opened. Returns the sizes that --config names, if it is given."""
    if options.model and options.tokenizer:
        raise UsageError("--tokenizer is for --preset and --config; --model brings its own")
    if options.init and not options.model:
        raise UsageError("--init is for --model; --preset and --config start from random weights")
    check_kv_sharing(options)
    for option, names in (("--text", options.text), ("--eval-text", options.eval_text or ())):
        if "-" in names:
            raise UsageError(f"{option} must name files, not -: a run that is started again reads them again")
        for name in names:
            read_text(name, f"{option} ")
    from hshare_jax.models.pretrained import check_model_name

    try:
        check_model_name(options.model or options.tokenizer or DEFAULT_MODEL)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    return _read_sizes(options.config) if options.config else None


def _read_sizes(path: Path) -> "ModelConfig":
    """The sizes that a config.json holds. The vocabulary size is 1, until the tokenizer's replaces it."""
    from hshare_jax.models.config import config_from_hf

    try:
        sizes = parse_json(read_text(str(path), "--config "))
    except ValueError as error:
        raise UsageError(f"--config {path} is not JSON: {error}") from error
    if not isinstance(sizes, dict):
        raise UsageError(f"--config {path} must hold a JSON object, such as a model's config.json")
    try:
        return config_from_hf({**sizes, "vocab_size": 1})
    except (TypeError, ValueError) as error:  # TypeError: text in place of a number
        raise UsageError(f"--config {path}: {error}") from error


def _first_config(
    options: argparse.Namespace, settings: TrainingSettings, files: "ModelFiles", sizes: "ModelConfig | None"
) -> "ModelConfig":
    """The configuration that is trained; UsageError if its layers cannot share as the options ask."""
    if options.model:
        config = files.config
    elif sizes is None:
        # The vocabulary size of the tokenizer's model: often larger than the tokenizer's, and a multiple of 64.
        longest = max(PRESETS[options.preset].max_positions, settings.sequence_length)
        config = preset(options.preset, vocab_size=files.config.vocab_size, max_positions=longest)
    else:
        config = dataclasses.replace(sizes, vocab_size=files.config.vocab_size)
    return share_kv_as_told(options, config)


def _read_data(options: argparse.Namespace, settings: TrainingSettings, files: "ModelFiles") -> "TrainingData":
    """The windows of the texts; UsageError or SettingError for texts that cannot be used."""
    from hshare_jax.training.data import encode_files, split_windows

    if files.tokenizer is None:
        raise UsageError(f"{files.name} has no tokenizer, so text cannot be given to it")
    try:
        tokens = encode_files(files.tokenizer, options.text)
        others = encode_files(files.tokenizer, options.eval_text) if options.eval_text else None
    except ValueError as error:
        raise UsageError(str(error)) from error
    return split_windows(
        tokens, settings.sequence_length, eval_fraction=options.eval_fraction,
        max_eval_windows=options.max_eval_windows, eval_tokens=others,
    )  # fmt: skip


def _first_model(
    options: argparse.Namespace, config: "ModelConfig", settings: TrainingSettings, files: "ModelFiles"
) -> "Model":
    """The model that training starts from. A model of random weights has no chat template."""
    from hshare_jax.training.start import new_model, share_layers

    sharing = "" if options.kv_sharing is None else f"+{options.kv_sharing}"
    if options.model:
        model = files.load("float32", "none")
        name = model.name + sharing
        return share_layers(model, config, init=options.init or "mean", name=name) if sharing else model
    tokenizer = files.tokenizer
    assert tokenizer is not None
    tokenizer.chat_template = None
    name = (options.preset or options.config.stem) + sharing
    return new_model(config, tokenizer, name=name, seed=settings.seed)


def _train(
    options: argparse.Namespace,
    settings: TrainingSettings,
    files: "ModelFiles",
    config: "ModelConfig",
    data: "TrainingData",
) -> None:
    import jax

    from hshare_jax.training.run import METRICS, train

    model = _first_model(options, config, settings, files)
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
        from hshare_jax.files.figures import save
        from hshare_jax.training.curves import plot_training, read_metrics

        summary["plot"] = str(options.output / PLOT)
        lines = read_metrics(options.output / METRICS)
        save(plot_training(lines, subject=f"{model.name}, {settings.tokens_per_step:,} tokens a step"), summary["plot"])
    print(json.dumps(summary))
