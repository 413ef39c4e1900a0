"""`hshare-jax convert` and `info`: a model as a checkpoint that loads fast, as it is or sharing keys and values."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hshare_jax.cli.calibrate import show_plan
from hshare_jax.cli.options import (
    DEFAULT_MODEL,
    UsageError,
    add_kv_sharing,
    add_model,
    add_prompt_files,
    add_settings,
    check_kv_sharing,
    check_not_empty,
    check_output,
    open_named,
    option_name,
    read_text,
    setting_names,
    share_kv_as_told,
)
from hshare_jax.models.kv_sharing import layer_passes, write_notation

if TYPE_CHECKING:
    from hshare_jax.evaluation.text_windows import Window
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model, ModelFiles

# What only one command needs is imported by it: a start stays short.

_CONTEXT, _MAX_WINDOWS = 512, 16  # of --perplexity: tokens of a window, and windows


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `convert`."""
    parser.set_defaults(run=run_convert)
    parser.add_argument("model", help="built-in name, GGUF file, directory or hub id")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add_model(parser)
    sharing = parser.add_argument_group("cross-layer KV sharing; the result must be trained before it is of use")
    add_kv_sharing(sharing, weights=True)
    sharing.add_argument("--perplexity", metavar="TEXTFILE", help="tell a text's perplexity before and after")


def add_info(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `info`."""
    parser.set_defaults(run=run_info)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_model(parser)
    add_kv_sharing(parser.add_argument_group("as it would be with cross-layer KV sharing"), weights=False)
    parser.add_argument("--plan", dest="show_plan", action="store_true", help="show which list copies which")
    group = add_settings(parser, kind="--plan-kind")
    group.title = "with --plan, which list copies which, as decoding a prompt would"
    parser.set_defaults(prompt=[])
    add_prompt_files(parser)


def run_convert(options: argparse.Namespace) -> int:
    """Writes a checkpoint, and returns the exit status."""
    from hshare_jax.models.orbax_checkpoint import is_orbax_directory

    check_output(options.output, overwrite=options.overwrite, may_replace=is_orbax_directory)
    check_kv_sharing(options)
    text = None if options.perplexity is None else read_text(options.perplexity, "--perplexity ")
    files = open_named(options)
    config = share_kv_as_told(options, files.config)
    windows = [] if text is None else _cut_windows(options, files, text)
    from hshare_jax.models.pretrained import save_model

    model = files.load(options.dtype)
    if options.kv_sharing is not None:
        from hshare_jax.training.start import share_layers

        name = f"{model.name}+{options.kv_sharing}"
        shared = share_layers(model, config, init=options.init or "mean", name=name)
        if windows:
            _tell_perplexities(windows, model, shared)
        model = shared
    save_model(model, options.output, overwrite=options.overwrite)
    print(f"wrote {model.name} ({model.dtype}) to {options.output}", file=sys.stderr)
    if config.kv_layer_map != files.config.kv_layer_map:
        print(
            f"WARNING: {len(config.kv_layers)} of {config.num_layers} layers have keys and values, and the others were "
            "not made for them: untrained, this model is of no use. Train it before you judge it.",
            file=sys.stderr,
        )
    elif config.windows != files.config.windows:
        print("WARNING: this model was made for other sliding windows; train it before you judge it.", file=sys.stderr)
    return 0


def _cut_windows(options: argparse.Namespace, files: "ModelFiles", text: str) -> "list[Window]":
    """Returns windows of a text: as many as fit, no more than `_MAX_WINDOWS`; a short text is one."""
    from hshare_jax.evaluation.text_windows import cut_windows, encode_text

    name = options.perplexity
    check_not_empty([name], [text])
    try:
        if files.tokenizer is None:
            raise ValueError(f"{files.name} has no tokeniser, so text cannot be given to it")
        ids, prefix = encode_text(files.tokenizer, text)
        context = max(2, min(_CONTEXT, files.config.max_positions, len(prefix) + len(ids) - 1))
        count = max(1, min(_MAX_WINDOWS, len(ids) // (context + 1 - len(prefix))))
        return cut_windows(files, name, text, context=context, count=count)
    except ValueError as error:
        raise UsageError(f"--perplexity {name}: {error}") from error


def _tell_perplexities(windows: "list[Window]", *models: "Model") -> None:
    from hshare_jax.training.loss import perplexity

    tokens = np.array([window.tokens for window in windows], np.int32)
    before, after = (perplexity(model.params, tokens, config=model.config) for model in models)
    print(
        f"perplexity {before:.3f} before, {after:.3f} after, of {len(tokens)} x {tokens.shape[1] - 1} tokens",
        file=sys.stderr,
    )


def run_info(options: argparse.Namespace) -> int:
    """Prints what a model is, or would be sharing keys and values, and returns the exit status."""
    check_kv_sharing(options)
    if options.show_plan:
        if options.kv_sharing is not None:
            raise UsageError(
                "--kv-sharing shows a model that has no weights yet, and --plan needs them; leave out either"
            )
        return show_plan(options)
    given = [name for name in setting_names() if hasattr(options, name)]
    given += [name for name in ("prompt_file", "system", "no_chat_template") if getattr(options, name)]
    if given:
        name = "--plan-kind" if given[0] == "plan" else option_name(given[0])
        raise UsageError(f"{name} is for showing a plan; add --plan")
    files = open_named(options)
    if options.kv_sharing is None:
        facts = _facts(files.config, files, options.dtype or files.dtype, files.identify(options.dtype))
    else:
        facts = _facts(share_kv_as_told(options, files.config), files, options.dtype or files.dtype, None)
    if options.json:
        print(json.dumps(facts))
        return 0
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


def _facts(config: "ModelConfig", files: "ModelFiles", dtype: str, identity: str | None) -> dict[str, Any]:
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    of_sharing = ("kv_layer_map", "forward_passes", "backward_passes")
    sizes = {
        key: value for key, value in dataclasses.asdict(config).items() if key not in ("windows", "rope", *of_sharing)
    }
    facts = {"model": files.name, "identity": identity, **sizes}
    if config.kv_layer_map is not None:
        facts |= {name: getattr(config, name) for name in of_sharing} | {"kv_layer_map": write_notation(config)}
    is_unbounded = config.kv_layer_map is not None and config.forward_passes is None
    return facts | {
        "num_kv_layers": len(config.kv_layers),
        # layers that a prompt of a chunk or more evaluates, of the model without sharing; None where that depends on it
        "relative_prefill_cost": None if is_unbounded else round(sum(layer_passes(config, 512)) / config.num_layers, 2),
        "sliding_windows": sorted({window for window in config.windows if window is not None}),
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "parameters": config.num_parameters,
        "kv_parameters": len(config.kv_layers)
        * 2
        * config.num_kv_heads
        * config.head_dim
        * (config.width + config.qkv_bias),
        "dtype": dtype,
        "parameter_bytes": config.num_parameters * size,
        "cache_bytes_per_token": config.cache_bytes_per_token(size),
        "eos_token_ids": list(files.eos_token_ids),
        "chat_template": bool(files.tokenizer is not None and files.tokenizer.chat_template),
    }
