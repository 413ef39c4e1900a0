"""`hshare-jax convert`: writes a model as a checkpoint that loads fast, as it is or with cross-layer KV sharing."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.cli.devices import add_devices, read_mesh, start_processes
from hshare_jax.cli.errors import UsageError, usage_errors
from hshare_jax.cli.options import (
    add_kv_sharing,
    add_model,
    check_kv_sharing,
    check_not_empty,
    check_output,
    open_named,
    read_quantize,
    read_text,
    share_kv_as_told,
)
from hshare_jax.files.texts import check_path

if TYPE_CHECKING:
    from hshare_jax.evaluation.text_windows import Window
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model, ModelFiles

# jax and the modules that need it are imported in the functions that run after the options have been read.

_CONTEXT, _MAX_WINDOWS = 512, 16  # of --perplexity: tokens of a window, and the most windows


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    parser.set_defaults(run=run_convert)
    parser.add_argument("model", metavar="NAME", help="built-in name, GGUF file, directory or hub id")
    parser.add_argument("output", type=Path, metavar="DIR", help="directory that gets the checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in DIR; other files there stay")
    add_model(parser)
    group = parser.add_argument_group("cross-layer KV sharing; the model is of no use before it is trained")
    add_kv_sharing(group, weights=True)
    group.add_argument("--perplexity", metavar="TEXTFILE", help="tell the perplexity of a text before and after")
    add_devices(parser, processes=True)


def run_convert(options: argparse.Namespace) -> int:
    """Writes a checkpoint. Returns the exit status."""
    from hshare_jax.models.orbax_checkpoint import is_orbax_directory

    inputs = [options.model, options.perplexity]
    check_output(options.output, inputs=inputs, overwrite=options.overwrite, may_replace=is_orbax_directory)
    with usage_errors():
        check_path(options.output)
    check_kv_sharing(options)
    text = None if options.perplexity is None else read_text(options.perplexity, "--perplexity ")
    if options.kv_sharing is not None and options.quantize not in ("auto", "none"):
        raise UsageError(f"--quantize {options.quantize}: shared weights are trained, as floats; leave it out")
    start_processes(options)
    files = open_named(options)
    mesh = read_mesh(options, files.config)
    if mesh is not None:
        _check_divided(options, files.config)
    # A checkpoint is for every machine, so `auto` keeps the bits of the file.
    quantize = "stored" if options.quantize == "auto" else read_quantize(options, files)
    quantize = "none" if options.kv_sharing is not None else quantize
    config = share_kv_as_told(options, files.config)
    windows = [] if text is None else _cut_windows(options, files, text)
    import jax

    from hshare_jax.models.pretrained import save_model

    model = files.load(options.dtype, quantize, mesh)
    if options.kv_sharing is not None:
        from hshare_jax.training.start import share_layers

        name = f"{model.name}+{options.kv_sharing}"
        shared = share_layers(model, config, init=options.init or "mean", name=name)
        if windows:
            _tell_perplexities(windows, model, shared)
        model = shared
    save_model(model, options.output, overwrite=options.overwrite)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(f"wrote {model.name} ({model.dtype}, {size:,} bytes) to {options.output}", file=sys.stderr)
    if config.kv_layer_map != files.config.kv_layer_map:
        print(
            f"WARNING: {len(config.kv_layers)} of {config.num_layers} layers have keys and values, which the other "
            "layers were not made for: untrained, this model is of no use. Train it before you judge it.",
            file=sys.stderr,
        )
    elif config.windows != files.config.windows:
        print("WARNING: this model was made for other sliding windows; train it before you judge it.", file=sys.stderr)
    return 0


def _check_divided(options: argparse.Namespace, config: "ModelConfig") -> None:
    """Raises UsageError for what cannot be converted on several devices."""
    parts = options.tensor_parallel_size
    if parts > config.num_kv_heads:
        rule = f"must be at most the {config.num_kv_heads} kv heads, which a checkpoint holds once each"
        raise UsageError(f"--tensor-parallel-size {parts} {rule}")
    if options.kv_sharing is not None:
        raise UsageError(f"--kv-sharing {options.kv_sharing} is for one device; convert the model on several first")
    if options.quantize == "int8-channel":
        rule = "has a scale for each device's part of a row, which no other mesh could read"
        raise UsageError(f"--quantize int8-channel {rule}; take int8, or leave out --tensor-parallel-size")


def _cut_windows(options: argparse.Namespace, files: "ModelFiles", text: str) -> "list[Window]":
    """Windows of a text: as many as fit, at most `_MAX_WINDOWS`. A short text is one window."""
    from hshare_jax.evaluation.text_windows import cut_windows
    from hshare_jax.prompts import encode_text

    name = options.perplexity
    check_not_empty([name], [text])
    if files.tokenizer is None:
        raise UsageError(f"--perplexity {name}: {files.name} has no tokenizer, so text cannot be given to it")
    ids, prefix = encode_text(files.tokenizer, text)
    if len(prefix) + len(ids) < 3:
        raise UsageError(f"--perplexity {name} has {len(ids)} tokens, too few to measure; give a longer text")
    context = min(_CONTEXT, files.config.max_positions, len(prefix) + len(ids) - 1)
    count = max(1, min(_MAX_WINDOWS, len(ids) // (context + 1 - len(prefix))))
    return cut_windows(files, name, text, context=context, count=count)


def _tell_perplexities(windows: "list[Window]", *models: "Model") -> None:
    """Prints the perplexity of windows for the model before and after."""
    import numpy as np

    from hshare_jax.training.loss import perplexity

    tokens = np.array([window.tokens for window in windows], np.int32)
    before, after = (perplexity(model.params, tokens, config=model.config) for model in models)
    print(
        f"perplexity {before:.3f} before, {after:.3f} after, of {len(tokens)} x {tokens.shape[1] - 1} tokens",
        file=sys.stderr,
    )
