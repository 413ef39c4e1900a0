"""`hshare-jax generate`: continues or answers prompts, and tells how many tokens were read and how fast."""

import argparse
import dataclasses
import resource
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.devices import add_devices, read_mesh, start_processes
from hshare_jax.cli.errors import UsageError, option_name, usage_errors
from hshare_jax.cli.options import (
    add_fields,
    add_files,
    add_impl,
    add_kv_cache_dtype,
    add_named_model,
    add_prompt_files,
    add_settings,
    apply_chat_template,
    check_method,
    open_named,
    read_files,
    read_method,
    read_prompts,
    read_quantize,
    unicode_text,
    whole,
)
from hshare_jax.files.texts import to_json
from hshare_jax.methods.names import METHODS
from hshare_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from hshare_jax.generate import Generation
    from hshare_jax.methods.base import Method
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model

# jax and the modules that need it are imported in the functions that run after the options have been read.


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `generate`."""
    parser.set_defaults(run=run_generate)
    parser.add_argument("prompt", nargs="*", type=unicode_text, help="one or more prompts; none reads standard input")
    add_prompt_files(parser)
    add_named_model(parser)
    add_kv_cache_dtype(parser)
    parser.add_argument(
        "--max-new-tokens", "-n", type=whole, default=128, metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )  # fmt: skip
    add_impl(parser)
    parser.add_argument(
        "--stop", action="append", type=unicode_text, default=[], metavar="TEXT",
        help="end an answer before this text; give it again for another text",
    )  # fmt: skip
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--compare-dense", action="store_true", help="also decode densely and greedily, and tell how far both agree"
    )
    add_devices(parser, rows=True, processes=True)
    sampling = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    add_fields(sampling, SamplingParams)
    sampling.add_argument(
        "--seed", type=whole, default=0, metavar="N",
        help="seed of the first prompt; the seeds of further prompts count up (default: %(default)s)",
    )  # fmt: skip
    group = add_settings(parser)
    group.add_argument(
        "--method", choices=METHODS, default="hshare", metavar="NAME",
        help=f"{', '.join(METHODS)}; each reads as many tokens as HShare would (default: %(default)s)",
    )  # fmt: skip
    add_files(group)


def run_generate(options: argparse.Namespace) -> int:
    """Prints the answers. Returns the exit status."""
    texts = read_prompts(options)
    _check_options(options, len(texts))
    sampling, hshare = _read_sampling(options), read_method(options)
    check_method(options, [options.method], hshare)
    start_processes(options)
    files = open_named(options)
    mesh = read_mesh(options, files.config)
    config = files.config.for_parts(options.tensor_parallel_size)
    prompts = apply_chat_template(files, texts, options)
    from hshare_jax.mesh import check_rows_divide
    from hshare_jax.methods.registry import method_named

    with usage_errors():
        _check_fit(options, config, prompts)
        check_rows_divide("prompts", len(prompts), mesh)
        hshare.settings.check(config)
        hshare, origins = read_files(options, files, hshare)
        method = method_named(options.method, hshare, max_new_tokens=options.max_new_tokens)
        if method is not None and mesh is not None:
            method.check_mesh(config, mesh)
    model = files.load(options.dtype, read_quantize(options, files), mesh, options.kv_cache_dtype)
    for origin in origins:
        origin.check(model)
    is_streamed = len(prompts) == 1 and not options.json and not options.no_stream
    show = _show if is_streamed else None
    result = _decode(options, model, prompts, method, sampling, show)
    if is_streamed:
        print(flush=True)
    statistics = _statistics(result, model, options.method, method, options.impl)
    if options.compare_dense:
        # Dense decoding is streamed if the method was, so that both return to the host as often.
        dense = _decode(options, model, prompts, None, SamplingParams(), _ignore if is_streamed else None)
        statistics |= _compare(options, model, prompts, method, dense, statistics["decode_tokens_per_second"])
    if options.json:
        _print_json(model, result, statistics)
    elif not is_streamed:
        for row, text in enumerate(result.texts, start=1):
            if len(prompts) > 1:
                print(f"==> {row} <==")
            print(text)
    print(_statistics_line(statistics), file=sys.stderr)
    return 0


def _check_options(options: argparse.Namespace, num_prompts: int) -> None:
    """Raises UsageError for a mistake that the options alone show."""
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not all(options.stop):
        raise UsageError("--stop is empty and would end every answer at once; leave it out")
    if not 0 <= options.seed <= 2**31 - num_prompts:
        raise UsageError(f"--seed {options.seed} must lie between 0 and {2**31 - num_prompts}")
    if options.compare_dense and options.method == "dense":
        raise UsageError("--compare-dense compares with dense decoding; choose another --method")


def _read_sampling(options: argparse.Namespace) -> SamplingParams:
    given = {field.name: field for field in dataclasses.fields(SamplingParams) if hasattr(options, field.name)}
    with usage_errors():
        sampling = SamplingParams(**{name: getattr(options, name) for name in given})
    idle = [
        name for name in ("top_k", "top_p", "min_p") if name in given and getattr(sampling, name) != given[name].default
    ]
    if sampling.temperature == 0 and idle:
        raise UsageError(
            f"{option_name(idle[0])} has no effect at --temperature 0, which is greedy; give a temperature"
        )
    return sampling


def _check_fit(options: argparse.Namespace, config: "ModelConfig", prompts: list[list[int]]) -> None:
    """Raises SettingError for an implementation that cannot run here, or more tokens than the model has positions."""
    from hshare_jax.kernels.api import check_impl
    from hshare_jax.prompts import choose_capacity

    check_impl(options.impl)
    choose_capacity(config, prompts, options.max_new_tokens, None)


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _ignore(text: str) -> None:
    pass


def _decode(
    options: argparse.Namespace,
    model: "Model",
    prompts: list[list[int]],
    method: "Method | None",
    sampling: SamplingParams,
    show: Callable[[str], None] | None,
) -> "Generation":
    """The answers. With `show` there is one prompt, and its answer is streamed: `show` gets each piece of new text."""
    from hshare_jax.generate import generate, stream

    arguments: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens, "method": method, "sampling": sampling, "stop": options.stop,
        "seeds": [options.seed + row for row in range(len(prompts))], "impl": options.impl,
    }  # fmt: skip
    if show is None:
        return generate(model, prompts, **arguments)
    result = None
    for piece in stream(model, prompts, **arguments):
        show(piece.texts[0])
        result = piece.result
    assert result is not None  # the last piece has the result
    return result


def _statistics(result: "Generation", model: "Model", name: str, method: "Method | None", impl: str) -> dict[str, Any]:
    import jax

    from hshare_jax.kernels.api import describe
    from hshare_jax.methods.hshare.method import HShare

    timing, usage = result.timing, result.usage
    statistics: dict[str, Any] = {"method": name}
    if isinstance(method, HShare):
        settings = method.settings
        # The lists that were computed, not those that were asked for: a prompt too short for a plan shares nothing.
        computed = usage.selections / max(usage.refreshes, 1)
        statistics |= {
            "sharing_ratio": method.sharing_ratio if method.plan is None else None,
            "budget": settings.budget,
            "computed_lists": round(computed, 1),
            "lists": settings.num_sparse_layers(model.config) * settings.num_lists(model.config),
            "refresh_interval": settings.refresh_interval,
            "refreshes": usage.refreshes,
            "selections": usage.selections,
            "possible_selections": usage.possible_selections,
        }
    return statistics | {
        "dtype": model.dtype,
        "kv_cache_dtype": model.kv_cache_dtype,
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        "impl": describe(impl),
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
    options: argparse.Namespace,
    model: "Model",
    prompts: list[list[int]],
    method: "Method | None",
    dense: "Generation",
    decode_rate: float,
) -> dict[str, Any]:
    """How far the method agrees with dense, greedy decoding, and both speeds."""
    from hshare_jax.evaluation.teacher_forcing import token_agreement

    rows = [row for row, tokens in enumerate(dense.tokens) if len(tokens) > 1]
    if not rows:
        return {"agreement_with_dense": None}
    compared, continuations = [prompts[row] for row in rows], [dense.tokens[row] for row in rows]
    agreements = token_agreement(model, compared, continuations, method=method, impl=options.impl)
    sizes = [len(tokens) - 1 for tokens in continuations]
    agreement = sum(share * size for share, size in zip(agreements, sizes, strict=True)) / sum(sizes)
    rate = round(dense.timing.decode_rate, 1)
    return {
        "agreement_with_dense": round(agreement, 4),
        "dense_decode_tokens_per_second": rate,
        "times_dense": round(decode_rate / rate, 2) if rate else None,
    }


def _peak_memory() -> int:
    """The peak bytes of the accelerator, or of this process if the CPU computes."""
    import jax

    if stats := jax.local_devices()[0].memory_stats():
        return stats.get("peak_bytes_in_use", 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print_json(model: "Model", result: "Generation", statistics: dict[str, object]) -> None:
    outputs = [
        {"text": text, "tokens": tokens, "finish_reason": reason}
        for text, tokens, reason in zip(result.texts, result.tokens, result.finish_reasons, strict=True)
    ]
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a stand-in for standard output may have none
    print(to_json({"model": model.name, "outputs": outputs, "statistics": statistics}, encoding))


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
        f"kernels {s['impl']}",
        f"compile {s['compile_seconds']} s",
        f"peak memory {s['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    if s.get("agreement_with_dense") is not None:
        parts.append(
            f"agrees with dense on {s['agreement_with_dense']:.1%} of tokens, {s['times_dense']} times dense "
            f"({s['dense_decode_tokens_per_second']} tokens/s)"
        )
    return " | ".join(parts)
