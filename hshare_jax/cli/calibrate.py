"""`hshare-jax calibrate`, and `info --plan`: plans and label channels, made from texts or shown for prompts."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hshare_jax.cli.options import (
    UsageError,
    add_named_model,
    add_settings,
    apply_chat_template,
    as_usage_error,
    check_fit,
    check_not_empty,
    check_output,
    open_named,
    read_prompts,
    read_settings,
    read_text,
    whole,
)

if TYPE_CHECKING:
    from hshare_jax.methods.hshare.settings import HShareSettings
    from hshare_jax.methods.hshare.share_plan import SharePlan

# What only one command needs is imported by it: a start stays short.


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `calibrate`."""
    parser.set_defaults(run=run_calibrate)
    parser.add_argument("text", nargs="+", metavar="TEXTFILE", help="what to calibrate on; - is standard input")
    add_named_model(parser)
    parser.add_argument("--channels-file", type=Path, metavar="OUT", help="where label channels are written")
    parser.add_argument("--plan-file", type=Path, metavar="OUT", help="where the plan is written")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--block-length", type=whole, metavar="N", help="tokens prefilled together (default 2048)")
    parser.add_argument("--max-blocks", type=whole, metavar="N", help="read no more than these first blocks")
    add_settings(parser)


def run_calibrate(options: argparse.Namespace) -> int:
    """Writes label channels, a plan or both, and returns the exit status."""
    outputs = [path for path in (options.channels_file, options.plan_file) if path is not None]
    if not outputs:
        raise UsageError("nothing to write: give --channels-file, --plan-file or both")
    if len(outputs) == 2 and outputs[0] == outputs[1]:
        raise UsageError(f"--channels-file and --plan-file are both {outputs[0]}; they need a file each")
    for path in outputs:
        check_output(path, overwrite=options.overwrite)
    texts = [read_text(name) for name in options.text]
    check_not_empty(options.text, texts)
    hshare = read_settings(options)
    files = open_named(options)
    from hshare_jax.calibration import calibrate, cut_blocks, save_channels, save_plan

    limits = {"block_length": options.block_length, "max_blocks": options.max_blocks}
    try:
        hshare.num_label_channels(files.config)
        cut_blocks(files, texts, hshare=hshare, **limits)
    except ValueError as error:
        raise as_usage_error(error) from error
    model = files.load(options.dtype)
    found = calibrate(model, texts, hshare=hshare, **limits)
    if options.channels_file is not None:
        save_channels(options.channels_file, found.channels, model, overwrite=options.overwrite)
    if options.plan_file is not None:
        save_plan(options.plan_file, found.plan, model, hshare, overwrite=options.overwrite)
    print(
        f"calibrated {model.name} on {found.num_tokens} tokens: {count_lists(found.plan, hshare)} | "
        f"wrote {' and '.join(map(str, outputs))}",
        file=sys.stderr,
    )
    return 0


def show_plan(options: argparse.Namespace) -> int:
    """Prints which list copies which in each prompt's plan, and returns the exit status."""
    prompts, hshare = read_prompts(options), read_settings(options)
    files = open_named(options)
    texts = apply_chat_template(files, prompts, options)
    check_fit(files, texts, options, hshare)
    from hshare_jax.calibration import find_plans

    model = files.load(options.dtype)
    plans = find_plans(model, texts, hshare=hshare)
    has_probes = [len(text) > hshare.first_probe for text in texts]
    if options.json:
        found = [
            {"prompt_tokens": len(text), "has_probes": probed, "source": plan.source}
            for text, probed, plan in zip(texts, has_probes, plans, strict=True)
        ]
        print(json.dumps({"model": model.name, "dense_layers": hshare.dense_layers, "plans": found}))
        return 0
    print("own: computed there; 4.1: copied from layer 4, list 1; dense: reads everything")
    for row, (text, probed, plan) in enumerate(zip(texts, has_probes, plans, strict=True), start=1):
        if len(texts) > 1:
            print(f"==> {row} <==")
        print("\n".join(_draw_plan(plan, hshare)))
        print(count_lists(plan, hshare))
        if not probed and hshare.plan_scope == "sequence":
            print(
                f"the prompt has {len(text)} tokens; below {hshare.first_probe + 1} there is no plan: nothing is shared"
            )
    return 0


def _draw_plan(plan: "SharePlan", hshare: "HShareSettings") -> list[str]:
    lines = []
    for layer, lists in enumerate(plan.source):
        J = len(lists)
        cells = ["own" if unit == layer * J + j else f"{unit // J}.{unit % J}" for j, unit in enumerate(lists)]
        cells = cells if layer >= hshare.dense_layers else ["dense"]
        lines.append(f"layer {layer:3}" + "".join(f"{cell:>7}" for cell in cells))
    return lines


def own_lists(plan: "SharePlan", hshare: "HShareSettings") -> list[int]:
    """Returns how many lists of each sparse layer are computed there."""
    J = len(plan.source[0])
    return [
        sum(unit == layer * J + j for j, unit in enumerate(lists))
        for layer, lists in enumerate(plan.source)
        if layer >= hshare.dense_layers
    ]


def count_lists(plan: "SharePlan", hshare: "HShareSettings") -> str:
    """Returns in words how many lists and layers a plan computes."""
    own = own_lists(plan, hshare)
    num_lists = len(own) * len(plan.source[0])
    return f"computes {sum(own)} of {num_lists} lists; {own.count(0)} of {len(own)} layers compute none"
