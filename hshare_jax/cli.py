"""The command line: `hshare-jax generate`, `calibrate`, `convert`, `eval`, `plot` and `info`."""

import argparse
import dataclasses
import functools
import json
import os
import re
import resource
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hshare_jax.cli_eval import add_eval
from hshare_jax.cli_options import (
    DEFAULT_MODEL,
    FAILURE,
    USAGE,
    Parser,
    UsageError,
    add_model,
    add_named_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    as_usage_error,
    check_method,
    check_not_empty,
    choose_method,
    open_named,
    option_name,
    read_constants,
    read_settings,
    read_text,
    real,
    setting_names,
    whole,
)
from hshare_jax.cli_plot import add_plot
from hshare_jax.evaluation.methods import METHODS
from hshare_jax.models.kv_sharing import (
    INITS,
    KNOWN_SPECS,
    relative_prefill_cost,
    share_kv,
    share_weights,
    write_notation,
)

if TYPE_CHECKING:
    import numpy as np

    from hshare_jax.config import HShareConfig
    from hshare_jax.evaluation.run import Settings
    from hshare_jax.evaluation.text_windows import Window
    from hshare_jax.generate import Generation
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model, ModelFiles
    from hshare_jax.sampling import SamplingConfig
    from hshare_jax.share_plan import SharePlan

# What only one command needs is imported by it: a start stays short.

_CONTEXT, _MAX_WINDOWS = 512, 16  # of --perplexity: tokens of a window, and windows


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 for a failure, 2 for a mistake in how it was called."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UsageError as error:
        return _complain(str(error), USAGE)
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILURE
        if isinstance(error, OSError) and error.filename is not None:
            return _complain(f"{error.filename}: {error.strerror}", FAILURE)
        return _complain(str(error) or type(error).__name__, FAILURE)
    except KeyboardInterrupt:
        return 130


def _complain(message: str, status: int) -> int:
    print(f"hshare-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hshare-jax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hshare-jax {version('hshare-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_generate(commands.add_parser("generate", help="continue or answer prompts"))
    _add_calibrate(commands.add_parser("calibrate", help="make label channels and a plan for all prompts from texts"))
    _add_convert(commands.add_parser("convert", help="write a model as an Orbax checkpoint that loads fast"))
    add_eval(commands.add_parser("eval", help="measure what sparse decoding costs, on tasks and on any text"))
    add_plot(
        commands.add_parser("plot", help="draw how alike the choices are, a plan, and quality against reads or time")
    )
    _add_info(commands.add_parser("info", help="show a model's shape and what its cache takes"))
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="one or more prompts; none reads standard input")
    add_prompt_files(parser)
    add_named_model(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    _add_prompts(parser)
    parser.add_argument("--max-new-tokens", "-n", type=whole, default=128, metavar="N", help="end at the latest here")
    parser.add_argument(
        "--impl", choices=("auto", "pallas", "reference", "interpret"), default="auto",
        help="what computes decode steps: auto takes Pallas kernels on an NVIDIA GPU, plain jnp elsewhere",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.add_argument("--no-stream", action="store_true", help="print when all is done")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--compare-dense", action="store_true", help="also decode dense and greedily, and tell how far they agree"
    )
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--temperature", type=real, default=0.0, help="0 is greedy (default)")
    drawing.add_argument("--top-k", type=whole, default=0, help="keep the k likeliest")
    drawing.add_argument("--top-p", type=real, default=1.0, help="keep the fewest that hold this probability")
    drawing.add_argument("--min-p", type=real, default=0.0, help="keep those this times as likely as the likeliest")
    drawing.add_argument("--repetition-penalty", type=real, default=1.0, help="make what was seen less likely")
    drawing.add_argument("--seed", type=whole, default=0, help="of the first prompt; the next ones count up")
    sharing = add_settings(parser)
    sharing.add_argument(
        "--method", choices=METHODS, default="hshare", metavar="NAME",
        help=f"{', '.join(METHODS)}: all at HShare's budget (hshare)",
    )  # fmt: skip
    sharing.add_argument("--channels-file", metavar="FILE", help="label channels, from calibrate or as published")
    sharing.add_argument("--plan-file", metavar="FILE", help="a plan, from calibrate or as published")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_calibrate)
    parser.add_argument("text", nargs="+", metavar="TEXTFILE", help="what to calibrate on; - is standard input")
    add_named_model(parser)
    parser.add_argument("--channels-file", type=Path, metavar="OUT", help="where label channels are written")
    parser.add_argument("--plan-file", type=Path, metavar="OUT", help="where the plan is written")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    parser.add_argument("--block-length", type=whole, metavar="N", help="tokens prefilled together (default 2048)")
    parser.add_argument("--max-blocks", type=whole, metavar="N", help="read no more than these first blocks")
    add_settings(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_convert)
    parser.add_argument("model", help="built-in name, GGUF file, directory or hub id")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    add_model(parser)
    sharing = parser.add_argument_group("cross-layer KV sharing; the result must be trained before it is of use")
    _add_kv_sharing(sharing)
    sharing.add_argument(
        "--init", choices=INITS, help="a KV layer takes the mean of those it serves, or its own (mean)"
    )
    sharing.add_argument("--perplexity", metavar="TEXTFILE", help="tell a text's perplexity before and after")


def _add_kv_sharing(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--kv-sharing", metavar="SPEC",
        help=f"which layers share keys and values: {KNOWN_SPECS}",
    )  # fmt: skip
    group.add_argument("--kv-window", type=whole, metavar="N", help="of yoco, and of entries such as 1s")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_info)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    add_model(parser)
    _add_kv_sharing(parser.add_argument_group("as it would be with cross-layer KV sharing"))
    parser.add_argument("--plan", dest="show_plan", action="store_true", help="show which list copies which")
    group = add_settings(parser, kind="--plan-kind")
    group.title = "with --plan, which list copies which, as decoding a prompt would"
    parser.set_defaults(prompt=[])
    add_prompt_files(parser)


def _generate(options: argparse.Namespace) -> int:
    prompts = _read_prompts(options)
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not all(options.stop):
        raise UsageError("--stop is empty and would end every answer at once; leave it out")
    if options.seed < 0 or options.seed >= 2**31:
        raise UsageError(f"--seed {options.seed} must lie between 0 and {2**31 - 1}")
    if options.compare_dense and options.method == "dense":
        raise UsageError("--compare-dense compares with dense decoding; choose another --method")
    hshare, sampling = read_settings(options), _sampling(options)
    check_method(options, [options.method], hshare)
    files = open_named(options)
    texts = apply_chat_template(files, prompts, options)
    _check_fit(files, texts, options, hshare)
    model = files.load(options.dtype)
    method = choose_method(options.method, hshare, max_new_tokens=options.max_new_tokens)
    constants = read_constants(options, model, hshare)
    seeds = [options.seed + row for row in range(len(texts))]
    is_streamed = len(texts) == 1 and not options.json and not options.no_stream
    result = _decode(model, texts, method, constants, sampling, seeds, options, is_streamed)
    statistics = _statistics(result, model, options.method, method, constants[0])
    if options.compare_dense:
        statistics |= _compare(model, texts, method, constants, statistics, options)
    if options.json:
        _print_json(model, result, statistics)
    elif not is_streamed:
        for row, text in enumerate(result.texts, start=1):
            if len(texts) > 1:
                print(f"==> {row} <==")
            print(text)
    print(_statistics_line(statistics), file=sys.stderr)
    return 0


def _read_prompts(options: argparse.Namespace) -> list[str]:
    prompts, names = list(options.prompt), [f"prompt {row}" for row in range(1, len(options.prompt) + 1)]
    files = options.prompt_file
    if not prompts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give one as an argument, with --prompt-file, or on standard input")
        files = ["-"]
    prompts += [read_text(name, "--prompt-file ") for name in files]
    check_not_empty([*names, *files], prompts)
    return prompts


def _sampling(options: argparse.Namespace) -> "SamplingConfig":
    from hshare_jax.sampling import SamplingConfig

    try:
        return SamplingConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingConfig)})
    except ValueError as error:
        raise as_usage_error(error) from error


def _check_fit(
    files: "ModelFiles", prompts: list[list[int]], options: argparse.Namespace, hshare: "HShareConfig | None"
) -> None:
    from hshare_jax.generate import choose_capacity
    from hshare_jax.kernels.api import check_impl

    try:
        check_impl(getattr(options, "impl", "auto"))
        choose_capacity(files.config, prompts, getattr(options, "max_new_tokens", 1), None)
        if hshare is not None:
            hshare.num_label_channels(files.config)
        read_constants(options, files, hshare)
    except ValueError as error:
        raise as_usage_error(error) from error
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error


def _decode(
    model: "Model",
    prompts: list[list[int]],
    method: "Settings",
    constants: "tuple[SharePlan | None, np.ndarray | None]",
    sampling: "SamplingConfig",
    seeds: list[int],
    options: argparse.Namespace,
    is_streamed: bool,
) -> "Generation":
    from hshare_jax.generate import Generation, generate, stream

    decode = functools.partial(
        stream if is_streamed else generate,
        max_new_tokens=options.max_new_tokens, method=method, plan=constants[0], channels=constants[1],
        sampling=sampling, seeds=seeds, stop=options.stop, impl=options.impl,
    )  # fmt: skip
    pieces = decode(model, prompts)
    if isinstance(pieces, Generation):
        return pieces
    while True:
        try:
            print(next(pieces)[0], end="", flush=True)
        except StopIteration as end:
            print(flush=True)
            return end.value


def _statistics(
    result: "Generation", model: "Model", name: str, hshare: "Settings", plan: "SharePlan | None"
) -> dict[str, Any]:
    from hshare_jax.config import HShareConfig

    timing, usage = result.timing, result.usage
    statistics: dict[str, Any] = {"method": name}
    if isinstance(hshare, HShareConfig):
        # What was computed and not what was asked for: a prompt too short for a plan shares nothing.
        computed = usage.selections / max(usage.refreshes, 1)
        statistics |= {
            "sharing_ratio": hshare.sharing_ratio if plan is None else None,
            "budget": hshare.budget,
            "computed_lists": round(computed, 1),
            "lists": hshare.num_sparse_layers(model.config) * hshare.num_lists(model.config),
            "refresh_interval": hshare.refresh_interval,
            "refreshes": usage.refreshes,
            "selections": usage.selections,
            "possible_selections": usage.possible_selections,
        }
    return statistics | {
        "dtype": model.dtype,
        "prompt_tokens": timing.prompt_tokens,
        "prompt_tokens_per_second": round(timing.prefill_rate, 1),
        "new_tokens": sum(len(tokens) for tokens in result.tokens),
        "decode_tokens_per_second": round(timing.decode_rate, 1),
        "mean_tokens_read": round(usage.mean_reads, 1),
        "mean_length": round(usage.mean_length, 1),
        "compile_seconds": round(timing.compile_seconds, 2),
        "peak_memory_bytes": _peak_memory(),
    }


def _compare(
    model: "Model",
    prompts: list[list[int]],
    method: "Settings",
    constants: "tuple[SharePlan | None, np.ndarray | None]",
    statistics: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    from hshare_jax.agreement import token_agreement
    from hshare_jax.generate import generate

    dense = generate(model, prompts, max_new_tokens=options.max_new_tokens, method=None, impl=options.impl)
    rows = [row for row, tokens in enumerate(dense.tokens) if len(tokens) > 1]
    if not rows:
        return {"agreement_with_dense": None}
    continuations = [dense.tokens[row] for row in rows]
    agreements = token_agreement(
        model, [prompts[row] for row in rows], continuations,
        method=method, plan=constants[0], channels=constants[1], impl=options.impl,
    )  # fmt: skip
    sizes = [len(tokens) - 1 for tokens in continuations]
    agreement = sum(a * size for a, size in zip(agreements, sizes, strict=True)) / sum(sizes)
    rate = round(dense.timing.decode_rate, 1)
    return {
        "agreement_with_dense": round(agreement, 4),
        "dense_decode_tokens_per_second": rate,
        "times_dense": round(statistics["decode_tokens_per_second"] / rate, 2) if rate else None,
    }


def _peak_memory() -> int:
    """Returns the peak bytes of the accelerator, or of this process where the processor computes."""
    import jax

    if stats := jax.devices()[0].memory_stats():
        return stats.get("peak_bytes_in_use", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print_json(model: "Model", result: "Generation", statistics: dict[str, object]) -> None:
    outputs = [
        {"text": text, "tokens": tokens, "finish_reason": reason}
        for text, tokens, reason in zip(result.texts, result.tokens, result.finish_reasons, strict=True)
    ]
    print(json.dumps({"model": model.name, "outputs": outputs, "statistics": statistics}, ensure_ascii=False))


def _statistics_line(s: dict[str, Any]) -> str:
    parts, is_hshare = [s["method"]], "sharing_ratio" in s
    if is_hshare:
        every = "every step" if s["refresh_interval"] == 1 else f"every {s['refresh_interval']} steps"
        parts = [
            f"{s['method']} {s['sharing_ratio'] or 'plan from a file'} budget {s['budget']}",
            f"computes {s['computed_lists']:g} of {s['lists']} lists {every}",
        ]
    if s["method"] != "dense":
        parts.append(f"reads {s['mean_tokens_read']} of {s['mean_length']} tokens")
    if is_hshare:
        parts.append(f"{s['refreshes']} refreshes, {s['selections']} of {s['possible_selections']} selections")
    parts += [
        f"prompt {s['prompt_tokens']} tokens, {s['prompt_tokens_per_second']} tokens/s",
        f"new {s['new_tokens']} tokens, {s['decode_tokens_per_second']} tokens/s",
        f"compile {s['compile_seconds']} s",
        f"peak memory {s['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    if s.get("agreement_with_dense") is not None:
        parts.append(
            f"agrees with dense on {s['agreement_with_dense']:.1%} of tokens, {s['times_dense']} times dense "
            f"({s['dense_decode_tokens_per_second']} tokens/s)"
        )
    return " | ".join(parts)


def _calibrate(options: argparse.Namespace) -> int:
    outputs = [path for path in (options.channels_file, options.plan_file) if path is not None]
    if not outputs:
        raise UsageError("nothing to write: give --channels-file, --plan-file or both")
    if len(outputs) == 2 and outputs[0] == outputs[1]:
        raise UsageError(f"--channels-file and --plan-file are both {outputs[0]}; they need a file each")
    if there := [path for path in outputs if path.exists() and not options.overwrite]:
        raise UsageError(f"{there[0]} exists; give --overwrite to replace it")
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
        f"calibrated {model.name} on {found.num_tokens} tokens: {_count_lists(found.plan, hshare)} | "
        f"wrote {' and '.join(map(str, outputs))}",
        file=sys.stderr,
    )
    return 0


def _show_plan(options: argparse.Namespace) -> int:
    prompts, hshare = _read_prompts(options), read_settings(options)
    files = open_named(options)
    texts = apply_chat_template(files, prompts, options)
    _check_fit(files, texts, options, hshare)
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
        print(_count_lists(plan, hshare))
        if not probed and hshare.plan_scope == "sequence":
            print(
                f"the prompt has {len(text)} tokens; below {hshare.first_probe + 1} there is no plan: nothing is shared"
            )
    return 0


def _draw_plan(plan: "SharePlan", hshare: "HShareConfig") -> list[str]:
    lines = []
    for layer, lists in enumerate(plan.source):
        J = len(lists)
        cells = ["own" if unit == layer * J + j else f"{unit // J}.{unit % J}" for j, unit in enumerate(lists)]
        cells = cells if layer >= hshare.dense_layers else ["dense"]
        lines.append(f"layer {layer:3}" + "".join(f"{cell:>7}" for cell in cells))
    return lines


def _own_lists(plan: "SharePlan", hshare: "HShareConfig") -> list[int]:
    """Returns how many lists of each sparse layer are computed there."""
    J = len(plan.source[0])
    return [
        sum(unit == layer * J + j for j, unit in enumerate(lists))
        for layer, lists in enumerate(plan.source)
        if layer >= hshare.dense_layers
    ]


def _count_lists(plan: "SharePlan", hshare: "HShareConfig") -> str:
    own = _own_lists(plan, hshare)
    num_lists = len(own) * len(plan.source[0])
    return f"computes {sum(own)} of {num_lists} lists; {own.count(0)} of {len(own)} layers compute none"


def _convert(options: argparse.Namespace) -> int:
    if options.output.exists() and not options.overwrite:
        raise UsageError(f"{options.output} exists; give --overwrite to replace it")
    _check_kv_options(options, ("kv_window", "init", "perplexity"))
    text = None if options.perplexity is None else read_text(options.perplexity, "--perplexity ")
    files = open_named(options)
    config = _share_kv(options, files.config)
    windows = [] if text is None else _cut_windows(options, files, text)
    from hshare_jax.models.pretrained import save_model

    model = files.load(options.dtype)
    if options.kv_sharing is not None:
        params = share_weights(model.params, model.config, config, options.init or "mean")
        if windows:
            _tell_perplexities(windows, (model.config, model.params), (config, params))
        name = f"{model.name}+{options.kv_sharing}"
        model = dataclasses.replace(model, config=config, params=params, name=name)
    save_model(model, options.output, overwrite=options.overwrite)
    print(f"wrote {model.name} ({model.dtype}) to {options.output}", file=sys.stderr)
    if options.kv_sharing is not None:
        print(
            f"WARNING: {len(config.kv_layers)} of {config.num_layers} layers have keys and values, and the others were "
            "not made for them: untrained, this model is of no use. Train it before you judge it.",
            file=sys.stderr,
        )
    return 0


def _check_kv_options(options: argparse.Namespace, names: Sequence[str]) -> None:
    given = [name for name in names if getattr(options, name) is not None]
    if given and options.kv_sharing is None:
        raise UsageError(f"{option_name(given[0])} is for sharing keys and values; add --kv-sharing")


def _share_kv(options: argparse.Namespace, config: "ModelConfig") -> "ModelConfig":
    """Returns the configuration that --kv-sharing asks for, if it does."""
    if options.kv_sharing is None:
        return config
    try:
        return share_kv(config, options.kv_sharing, window=options.kv_window)
    except ValueError as error:
        message = str(error).replace(f"spec={options.kv_sharing!r}", f"--kv-sharing {options.kv_sharing}", 1)
        raise UsageError(re.sub(r"\bwindow=", "--kv-window ", message)) from error


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


def _tell_perplexities(windows: "list[Window]", *models: "tuple[ModelConfig, dict[str, Any]]") -> None:
    from hshare_jax.evaluation.perplexity import perplexity

    before, after = (perplexity(config, params, windows) for config, params in models)
    print(
        f"perplexity {before:.3f} before, {after:.3f} after, of {len(windows)} x {len(windows[0].tokens) - 1} tokens",
        file=sys.stderr,
    )


def _info(options: argparse.Namespace) -> int:
    _check_kv_options(options, ("kv_window",))
    if options.show_plan:
        if options.kv_sharing is not None:
            raise UsageError(
                "--kv-sharing shows a model that has no weights yet, and --plan needs them; leave out either"
            )
        return _show_plan(options)
    given = [name for name in setting_names() if hasattr(options, name)]
    given += [name for name in ("prompt_file", "system", "no_chat_template") if getattr(options, name)]
    if given:
        raise UsageError(f"{option_name(given[0])} is for showing a plan; add --plan")
    files = open_named(options)
    if options.kv_sharing is None:
        model = files.load(options.dtype)
        facts = _facts(model.config, files, model.dtype, model.identity)
    else:
        facts = _facts(_share_kv(options, files.config), files, options.dtype or files.dtype, None)
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
        # of the model without sharing; None where the passes depend on the prompt
        "relative_prefill_cost": None if is_unbounded else round(relative_prefill_cost(config), 2),
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


if __name__ == "__main__":
    sys.exit(main())
