"""The command line: `hshare-jax generate`, `convert` and `info`."""

import argparse
import dataclasses
import functools
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from hshare_jax.config import HShareConfig
    from hshare_jax.generate import Generation
    from hshare_jax.models.pretrained import Model, ModelFiles
    from hshare_jax.sampling import SamplingConfig

# JAX and transformers are imported by the commands, after the arguments have been checked: a mistake is told at once.

DEFAULT_MODEL = "smollm2-135m-instruct"
USAGE, FAILURE = 2, 1


class UsageError(Exception):
    """What the user asked for cannot be done as written."""


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


class _Parser(argparse.ArgumentParser):
    """One clear line for a mistake, without the whole usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"hshare-jax: error: {message} (see {self.prog} --help)\n")


def _number(kind: type, name: str) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None

    return parse


_whole, _real = _number(int, "a whole number"), _number(float, "a number")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hshare-jax", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hshare-jax {version('hshare-jax')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands.add_parser("generate", help="continue or answer prompts"))
    _add_convert(commands.add_parser("convert", help="write a model as an Orbax checkpoint that loads fast"))
    _add_info(commands.add_parser("info", help="show a model's shape and what its cache takes"))
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: a converted model's, else float32"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--cache-dir", type=Path, help="where models are kept (default: $HSHARE_JAX_CACHE)")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", nargs="*", help="one or more prompts; none reads standard input")
    parser.add_argument("--prompt-file", "-f", action="append", default=[], metavar="FILE", help="a prompt; - is stdin")
    parser.add_argument("--model", "-m", default=DEFAULT_MODEL, help="built-in name, GGUF file, directory or hub id")
    _add_model(parser)
    parser.add_argument("--max-new-tokens", "-n", type=_whole, default=128, metavar="N", help="end at the latest here")
    parser.add_argument("--system", help="system message of the chat template")
    parser.add_argument("--no-chat-template", action="store_true", help="give the prompt to the model as it is")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text")
    parser.add_argument("--no-stream", action="store_true", help="print when all is done")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--compare-dense", action="store_true", help="also decode dense and greedily, and tell how far they agree"
    )
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--temperature", type=_real, default=0.0, help="0 is greedy (default)")
    drawing.add_argument("--top-k", type=_whole, default=0, help="keep the k likeliest")
    drawing.add_argument("--top-p", type=_real, default=1.0, help="keep the fewest that hold this probability")
    drawing.add_argument("--min-p", type=_real, default=0.0, help="keep those this times as likely as the likeliest")
    drawing.add_argument("--repetition-penalty", type=_real, default=1.0, help="make what was seen less likely")
    drawing.add_argument("--seed", type=_whole, default=0, help="of the first prompt; the next ones count up")
    sharing = parser.add_argument_group("sparse decoding")
    sharing.add_argument("--method", choices=("hshare", "dense"), default="hshare")
    sharing.add_argument("--num-sinks", type=_whole, default=8, metavar="N", help="first tokens always read")
    sharing.add_argument("--num-critical", type=_whole, default=88, metavar="N", help="tokens chosen by score")
    sharing.add_argument("--num-recent", type=_whole, default=32, metavar="N", help="last tokens always read")
    sharing.add_argument(
        "--sharing-ratio", default="7/8-3/4-1/2", metavar="L-H-Q",
        help="fractions of layers, heads and steps that choose for themselves (default 7/8-3/4-1/2)",
    )  # fmt: skip
    sharing.add_argument("--lists-per", choices=("kv_head", "query_head"), default="kv_head")
    sharing.add_argument("--label-channels", type=_whole, metavar="R", help="channels scored (default: a quarter)")
    sharing.add_argument("--num-probes", type=_whole, default=32, metavar="N", help="queries the plan is found from")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_convert)
    parser.add_argument("model", help="built-in name, GGUF file, directory or hub id")
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    _add_model(parser)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_info)
    parser.add_argument("model", nargs="?", default=DEFAULT_MODEL)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    _add_model(parser)


def _generate(options: argparse.Namespace) -> int:
    prompts = _read_prompts(options)
    if options.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if not all(options.stop):
        raise UsageError("--stop is empty and would end every answer at once; leave it out")
    if options.seed < 0 or options.seed >= 2**31:
        raise UsageError(f"--seed {options.seed} must lie between 0 and {2**31 - 1}")
    if options.compare_dense and options.method == "dense":
        raise UsageError("--compare-dense compares with dense decoding; it needs --method hshare")
    hshare, sampling = _settings(options)
    files = _open(options)
    texts = _apply_chat_template(files, prompts, options)
    _check_fit(files, texts, options.max_new_tokens, hshare)
    model = files.load(options.dtype)
    seeds = [options.seed + row for row in range(len(texts))]
    is_streamed = len(texts) == 1 and not options.json and not options.no_stream
    result = _decode(model, texts, hshare, sampling, seeds, options, is_streamed)
    statistics = _statistics(result, model, hshare)
    if options.compare_dense:
        statistics |= _compare(model, texts, hshare, options)
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
    for name in files:
        try:
            prompts.append(sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"--prompt-file {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--prompt-file {name} is not UTF-8 text (byte {error.start})") from error
        names.append("standard input" if name == "-" else name)
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt.strip():
            raise UsageError(f"{name} is empty")
    return prompts


def _settings(options: argparse.Namespace) -> "tuple[HShareConfig | None, SamplingConfig]":
    from hshare_jax.config import HShareConfig
    from hshare_jax.sampling import SamplingConfig

    try:
        sampling = SamplingConfig(**{f.name: getattr(options, f.name) for f in dataclasses.fields(SamplingConfig)})
        names = ("num_sinks", "num_critical", "num_recent", "lists_per", "label_channels", "num_probes")
        hshare = HShareConfig(**{name: getattr(options, name) for name in names})
        hshare = hshare.with_sharing_ratio(options.sharing_ratio)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return (hshare if options.method == "hshare" else None), sampling


def _open(options: argparse.Namespace) -> "ModelFiles":
    from hshare_jax.models.builtin_model import cache_directory
    from hshare_jax.models.pretrained import check_model_name, open_model

    try:
        check_model_name(options.model, revision=options.revision)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    _keep_compiled_programs(cache_directory(options.cache_dir) / "compiled")
    return open_model(options.model, cache_dir=options.cache_dir, revision=options.revision)


def _check_fit(
    files: "ModelFiles", prompts: list[list[int]], max_new_tokens: int, hshare: "HShareConfig | None"
) -> None:
    from hshare_jax.generate import choose_capacity

    try:
        choose_capacity(files.config, prompts, max_new_tokens, None)
        if hshare is not None:
            hshare.num_label_channels(files.config)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _keep_compiled_programs(directory: Path) -> None:
    """Lets a second start find its programs compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _apply_chat_template(model: "ModelFiles", prompts: list[str], options: argparse.Namespace) -> list[list[int]]:
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokeniser, so text cannot be given to it")
    if options.no_chat_template or not model.tokenizer.chat_template:
        if options.system:
            raise UsageError("--system needs a chat template; this model or --no-chat-template gives none")
        return [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    conversations = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = model.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return [model.tokenizer(str(text), add_special_tokens=False)["input_ids"] for text in texts]


def _decode(
    model: "Model",
    prompts: list[list[int]],
    hshare: "HShareConfig | None",
    sampling: "SamplingConfig",
    seeds: list[int],
    options: argparse.Namespace,
    is_streamed: bool,
) -> "Generation":
    from hshare_jax.generate import Generation, generate, stream

    decode = functools.partial(
        stream if is_streamed else generate,
        max_new_tokens=options.max_new_tokens, hshare=hshare, sampling=sampling, seeds=seeds, stop=options.stop,
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


def _statistics(result: "Generation", model: "Model", hshare: "HShareConfig | None") -> dict[str, object]:
    timing = result.timing
    return {
        "method": "dense" if hshare is None else "hshare",
        "sharing_ratio": None if hshare is None else hshare.sharing_ratio,
        "budget": None if hshare is None else hshare.budget,
        "dtype": model.dtype,
        "prompt_tokens": timing.prompt_tokens,
        "prompt_tokens_per_second": round(timing.prefill_rate, 1),
        "new_tokens": sum(len(tokens) for tokens in result.tokens),
        "decode_tokens_per_second": round(timing.decode_rate, 1),
        "compile_seconds": round(timing.compile_seconds, 2),
        "peak_memory_bytes": _peak_memory(),
    }


def _compare(
    model: "Model", prompts: list[list[int]], hshare: "HShareConfig | None", options: argparse.Namespace
) -> dict[str, object]:
    from hshare_jax.agreement import token_agreement
    from hshare_jax.generate import generate

    dense = generate(model, prompts, max_new_tokens=options.max_new_tokens, hshare=None)
    rows = [row for row, tokens in enumerate(dense.tokens) if len(tokens) > 1]
    if not rows:
        return {"agreement_with_dense": None}
    continuations = [dense.tokens[row] for row in rows]
    agreements = token_agreement(model, [prompts[row] for row in rows], continuations, hshare=hshare)
    sizes = [len(tokens) - 1 for tokens in continuations]
    agreement = sum(a * size for a, size in zip(agreements, sizes, strict=True)) / sum(sizes)
    return {
        "agreement_with_dense": round(agreement, 4),
        "dense_decode_tokens_per_second": round(dense.timing.decode_rate, 1),
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


def _statistics_line(statistics: dict[str, object]) -> str:
    s = statistics
    sharing = f" {s['sharing_ratio']} budget {s['budget']}" if s["method"] == "hshare" else ""
    line = (
        f"{s['method']}{sharing} | prompt {s['prompt_tokens']} tokens, {s['prompt_tokens_per_second']} tokens/s | "
        f"new {s['new_tokens']} tokens, {s['decode_tokens_per_second']} tokens/s | compile {s['compile_seconds']} s | "
        f"peak memory {s['peak_memory_bytes'] / 2**30:.2f} GiB"  # pyright: ignore[reportOperatorIssue]
    )
    if s.get("agreement_with_dense") is not None:
        agreement: float = s["agreement_with_dense"]  # pyright: ignore[reportAssignmentType]
        line += (
            f" | agrees with dense on {agreement:.1%} of tokens (dense {s['dense_decode_tokens_per_second']} tokens/s)"
        )
    return line


def _convert(options: argparse.Namespace) -> int:
    if options.output.exists() and not options.overwrite:
        raise UsageError(f"{options.output} exists; give --overwrite to replace it")
    from hshare_jax.models.pretrained import save_model

    model = _open(options).load(options.dtype)
    save_model(model, options.output, overwrite=options.overwrite)
    print(f"wrote {model.name} ({model.dtype}) to {options.output}", file=sys.stderr)
    return 0


def _info(options: argparse.Namespace) -> int:
    model = _open(options).load(options.dtype)
    config = model.config
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[model.dtype]
    facts = {
        "model": model.name,
        "identity": model.identity,
        **{key: value for key, value in dataclasses.asdict(config).items() if key not in ("windows", "rope")},
        "sliding_windows": sorted({window for window in config.windows if window is not None}),
        "rope": config.rope.kind,
        "rope_theta": config.rope.theta,
        "parameters": config.num_parameters,
        "dtype": model.dtype,
        "parameter_bytes": config.num_parameters * size,
        "cache_bytes_per_token": config.cache_bytes_per_token(size),
        "eos_token_ids": list(model.eos_token_ids),
        "chat_template": bool(model.tokenizer is not None and model.tokenizer.chat_template),
    }
    if options.json:
        print(json.dumps(facts))
        return 0
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
