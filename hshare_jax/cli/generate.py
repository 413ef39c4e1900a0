"""`hshare-jax generate`: continues or answers prompts, and tells what was read and how fast."""

import argparse
import dataclasses
import functools
import json
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.options import (
    UsageError,
    add_named_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    as_usage_error,
    check_fit,
    check_method,
    choose_method,
    open_named,
    option_name,
    read_constants,
    read_prompts,
    read_settings,
    real,
    whole,
)
from hshare_jax.methods.registry import METHODS

if TYPE_CHECKING:
    import numpy as np

    from hshare_jax.evaluation.run import Settings
    from hshare_jax.generate import Generation
    from hshare_jax.methods.hshare.share_plan import SharePlan
    from hshare_jax.models.pretrained import Model
    from hshare_jax.sampling import SamplingParams

# What only one command needs is imported by it: a start stays short.


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    parser.set_defaults(run=run_generate)
    parser.add_argument("prompt", nargs="*", help="one or more prompts; none reads standard input")
    add_prompt_files(parser)
    add_named_model(parser)
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


def run_generate(options: argparse.Namespace) -> int:
    """Prints the answers, and returns the exit status."""
    prompts = read_prompts(options)
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not all(options.stop):
        raise UsageError("--stop is empty and would end every answer at once; leave it out")
    if not 0 <= options.seed <= 2**31 - len(prompts):
        raise UsageError(f"--seed {options.seed} must lie between 0 and {2**31 - len(prompts)}")
    if options.compare_dense and options.method == "dense":
        raise UsageError("--compare-dense compares with dense decoding; choose another --method")
    hshare, sampling = read_settings(options), _sampling(options)
    check_method(options, [options.method], hshare)
    files = open_named(options)
    texts = apply_chat_template(files, prompts, options)
    check_fit(files, texts, options, hshare)
    model = files.load(options.dtype)
    method = choose_method(options.method, hshare, max_new_tokens=options.max_new_tokens)
    constants = read_constants(options, model, hshare)
    seeds = [options.seed + row for row in range(len(texts))]
    is_streamed = len(texts) == 1 and not options.json and not options.no_stream
    show = functools.partial(print, end="", flush=True) if is_streamed else None
    result = _decode(model, texts, method, constants, sampling, seeds, options, show)
    if is_streamed:
        print(flush=True)
    statistics = _statistics(result, model, options.method, method, constants[0])
    if options.compare_dense:
        statistics |= _compare(model, texts, method, constants, statistics, options, is_streamed)
    if options.json:
        _print_json(model, result, statistics)
    elif not is_streamed:
        for row, text in enumerate(result.texts, start=1):
            if len(texts) > 1:
                print(f"==> {row} <==")
            print(text)
    print(_statistics_line(statistics), file=sys.stderr)
    return 0


def _sampling(options: argparse.Namespace) -> "SamplingParams":
    from hshare_jax.sampling import SamplingParams

    try:
        sampling = SamplingParams(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingParams)})
    except ValueError as error:
        raise as_usage_error(error) from error
    idle = [name for name in ("top_k", "top_p", "min_p") if getattr(sampling, name) != getattr(SamplingParams(), name)]
    if sampling.temperature == 0 and idle:
        raise UsageError(
            f"{option_name(idle[0])} has no effect at --temperature 0, which is greedy; give a temperature"
        )
    return sampling


def _decode(
    model: "Model",
    prompts: list[list[int]],
    method: "Settings",
    constants: "tuple[SharePlan | None, np.ndarray | None]",
    sampling: "SamplingParams",
    seeds: list[int],
    options: argparse.Namespace,
    show: Callable[[str], object] | None,
) -> "Generation":
    """Decodes, and shows new text of the one prompt as it comes, if asked to."""
    from hshare_jax.generate import Generation, generate, stream

    decode = functools.partial(
        generate if show is None else stream,
        max_new_tokens=options.max_new_tokens, method=method, plan=constants[0], channels=constants[1],
        sampling=sampling, seeds=seeds, stop=options.stop, impl=options.impl,
    )  # fmt: skip
    pieces = decode(model, prompts)
    if isinstance(pieces, Generation):
        return pieces
    assert show is not None
    while True:
        try:
            show(next(pieces)[0])
        except StopIteration as end:
            return end.value


def _statistics(
    result: "Generation", model: "Model", name: str, hshare: "Settings", plan: "SharePlan | None"
) -> dict[str, Any]:
    from hshare_jax.methods.hshare.settings import HShareSettings

    timing, usage = result.timing, result.usage
    statistics: dict[str, Any] = {"method": name}
    if isinstance(hshare, HShareSettings):
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
    is_streamed: bool,
) -> dict[str, Any]:
    from hshare_jax.evaluation.teacher_forcing import token_agreement
    from hshare_jax.sampling import SamplingParams

    # As the sparse run was decoded, back to the host as often.
    show = (lambda text: None) if is_streamed else None
    seeds = list(range(len(prompts)))
    dense = _decode(model, prompts, None, (None, None), SamplingParams(), seeds, options, show)
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
