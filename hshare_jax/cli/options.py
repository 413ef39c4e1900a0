"""Options that several commands take, and what these options stand for.

The options of settings are made from dataclasses: type, default and help text are written once, beside the setting.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import types
import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hshare_jax.cli.errors import UsageError, option_name, usage_errors
from hshare_jax.files.texts import check_text, decode_text
from hshare_jax.files.texts import read_text as read_text_file
from hshare_jax.kernels.implementations import IMPLS
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.names import METHODS, takes_setting
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.kv_sharing import INITS, KNOWN_SPECS, YOCO_WINDOW, share_kv

if TYPE_CHECKING:
    from hshare_jax.methods.hshare.method import HShare
    from hshare_jax.methods.hshare.plan_files import FileOrigin
    from hshare_jax.models.pretrained import Model, ModelFiles
    from hshare_jax.models.weights import Quantize

# This file imports nothing slow, because a mistake in an option is told at once. jax and the modules that need it are
# imported in the functions that run after the options have been read.

DEFAULT_MODEL = "smollm2-135m-instruct"
_NUMBERS = {
    # a type, what it is called in a mistake, and in the help
    int: ("a whole number", "N"),
    float: ("a number", "X"),
    Fraction: ("a fraction such as 1/8", "A/B"),
}
_ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of what zstd packed
_PARTS_OF_RATIO = ("layer_ratio", "head_ratio")  # settings that --sharing-ratio gives


def reader(kind: type | None, words: Mapping[str, object] | None = None) -> Callable[[str], object]:
    """A type for argparse that reads numbers, certain words, or both. A mistake is told as `'x' is not a number`.

    Args:
        kind: int, float or Fraction; None reads words alone.
        words: what each word stands for.
    """
    words = words or {}
    names = [_NUMBERS[kind][0]] if kind else []
    names += words

    def read(text: str) -> object:
        if text in words:
            return words[text]
        try:
            if kind is not None:
                return kind(text)
        except (ValueError, ZeroDivisionError):
            pass
        name = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}")

    return read


whole, real, fraction = reader(int), reader(float), reader(Fraction)


def unicode_text(argument: str) -> str:
    """A type for argparse that takes Unicode text. Its byte order mark, which a shell keeps, is left out.

    An argument whose bytes are UTF-8 is read as UTF-8, whatever the locale says, and any other one in the locale's
    encoding.
    """
    if sys.getfilesystemencoding() != "utf-8":
        with contextlib.suppress(UnicodeError):
            argument = os.fsencode(argument).decode()
    try:
        check_text(argument, "the text")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return argument.removeprefix("\ufeff")


def add_fields(group: argparse._ActionsContainer, record: type, *, leave_out: Sequence[str] = ()) -> None:
    """Adds an option for every field of a dataclass that is made with `setting`.

    Args:
        group: where the options are added. With `argument_default=SUPPRESS`, options that are not given leave no trace.
        record: the dataclass.
        leave_out: fields that get no option.
    """
    for field in dataclasses.fields(record):
        if field.name not in leave_out:
            help = field.metadata["help"].replace("%", "%%") + default_of(field.default)
            group.add_argument(option_name(field.name), help=help, **argument_of(field.type))


def default_of(value: object) -> str:
    """The default of a field, for a help text. The help text of a field whose default is None says what None means."""
    if value is None:
        return ""
    text = ("no", "yes")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
    return f" (default: {text})"


def argument_of(annotation: Any) -> dict[str, Any]:
    """How argparse reads a value of this type, as arguments of `add_argument`.

    The type is bool, a number, Literal words or numbers, None, or a union of those; or a sequence of texts, or None.
    """
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kind, words = None, {}
    for part in typing.get_args(annotation) if is_union else (annotation,):
        if part is types.NoneType:
            words["none"] = None
        elif typing.get_origin(part) is Sequence:
            return {"nargs": "+", "metavar": "NAME"}
        elif typing.get_origin(part) is typing.Literal:
            words |= {str(value): value for value in typing.get_args(part)}
        else:
            kind = part
    if kind is None and all(isinstance(value, str) for value in words.values()):
        return {"choices": tuple(words)}
    return {"type": reader(kind, words), "metavar": "|".join([*([_NUMBERS[kind][1]] if kind else []), *words])}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that opens a model."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"),
        help="dtype to compute in (default: the dtype of a converted model, else float32)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=("auto", "stored", "none", "int8", "int8-channel"), default="auto",
        help="bits of the weights: stored, 4 and 8 bits of a file stay, the rest is floats; none, floats; int8, the "
        "rest gets 8 bits and a scale for each 32 weights; int8-channel, a scale for each output, for GPUs; auto "
        "(default), stored where the native kernels run, else none",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR",
        help="directory of fetched models (default: $HSHARE_JAX_CACHE, or hshare-jax in the user's cache directory; "
        "for a hub id the cache of the hub)",
    )  # fmt: skip


def add_kv_cache_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --kv-cache-dtype."""
    parser.add_argument(
        "--kv-cache-dtype", choices=("auto", "int8"), default="auto",
        help="dtype of cached keys and values: auto (default), that of --dtype; int8, 8 bits with a scale for each "
        "token and head",
    )  # fmt: skip


def read_quantize(options: argparse.Namespace, files: "ModelFiles") -> "Quantize":
    """The bits of weights that a command loads. `auto` is for the native kernels, so with others it means floats.

    Raises:
        UsageError: bits that the model's widths do not allow.
    """
    from hshare_jax.models.weights import resolve_quantize

    if options.quantize == "auto" and getattr(options, "impl", "auto") not in ("auto", "native"):
        return "none"
    parts = getattr(options, "tensor_parallel_size", None) or 1
    with usage_errors():
        return resolve_quantize(options.quantize, files.config.for_parts(parts).part(parts))


def add_named_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, and the options of every command that opens a model."""
    parser.add_argument(
        "--model", "-m", default=DEFAULT_MODEL, metavar="NAME",
        help="built-in name, GGUF file, directory or hub id (default: %(default)s)",
    )  # fmt: skip
    add_model(parser)


def add_impl(parser: argparse.ArgumentParser) -> None:
    """Adds --impl, with the names of the table of implementations."""
    parser.add_argument(
        "--impl", choices=IMPLS, default="auto", metavar="NAME",
        help="what computes decode steps, and what they need of the prompt: auto (default) takes Pallas kernels on an "
        "NVIDIA GPU, native kernels on a CPU where they are compiled, else plain jnp; or pallas, native, reference "
        "(plain jnp), interpret (Pallas' kernels without a GPU, slowly), triton (kernels in Triton, for NVIDIA GPUs), "
        "or triton-interpret (those without a GPU, slowly)",
    )  # fmt: skip


def add_kv_sharing(group: argparse._ArgumentGroup, *, weights: bool) -> None:
    """Adds the options of cross-layer KV sharing. With `weights` also --init, which says how weights are shared."""
    group.add_argument(
        "--kv-sharing", metavar="SPEC", help=f"which layers use keys and values of other layers: {KNOWN_SPECS}"
    )
    group.add_argument(
        "--kv-window", type=whole, metavar="N",
        help="sliding-window size for yoco and for entries that end in s "
        f"(default: {YOCO_WINDOW} for yoco, for entries the model's window)",
    )  # fmt: skip
    group.add_argument(
        "--forward-passes", type=reader(int, {"exact": "exact"}), metavar="N|exact",
        help="passes over layers that look up, in training those without gradient; exact repeats until nothing changes "
        f"(default: {ModelConfig.forward_passes})",
    )  # fmt: skip
    group.add_argument(
        "--backward-passes", type=whole, metavar="N",
        help=f"passes with gradient that follow in training (default: {ModelConfig.backward_passes})",
    )  # fmt: skip
    if weights:
        group.add_argument(
            "--init", choices=INITS,
            help="a KV layer starts from the mean of the layers that will use it, or from a copy of itself "
            "(default: mean)",
        )  # fmt: skip


def check_kv_sharing(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that needs --kv-sharing and lacks it."""
    names = ("kv_window", "forward_passes", "backward_passes", "init", "perplexity")
    given = [name for name in names if getattr(options, name, None) is not None]
    if given and options.kv_sharing is None:
        raise UsageError(f"{option_name(given[0])} is for sharing keys and values; add --kv-sharing")


def share_kv_as_told(options: argparse.Namespace, config: ModelConfig) -> ModelConfig:
    """The configuration with the KV sharing that the options ask for; UsageError if the model cannot share so."""
    if options.kv_sharing is None:
        return config
    given = {name: getattr(options, name) for name in ("forward_passes", "backward_passes")}
    changes = {name: None if value == "exact" else value for name, value in given.items() if value is not None}
    with usage_errors():
        return share_kv(dataclasses.replace(config, **changes), options.kv_sharing, window=options.kv_window)


def add_prompt_files(parser: argparse.ArgumentParser) -> None:
    """Adds prompts from files, and how a prompt becomes a conversation."""
    parser.add_argument(
        "--prompt-file", "-f", action="append", default=[], metavar="FILE",
        help="file that holds a prompt, such as a text and a question below it, or - for standard input; give it again "
        "for another prompt",
    )  # fmt: skip
    parser.add_argument("--system", type=unicode_text, metavar="TEXT", help="system message of the chat template")
    parser.add_argument("--no-chat-template", action="store_true", help="give the model the prompt without a template")


def add_settings(parser: argparse.ArgumentParser, *, title: str = "sparse decoding") -> argparse._ArgumentGroup:
    """Adds the options of HShare. Options that are not given leave no trace, so that a preset keeps its values."""
    group = parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
    steps, search = Fraction(1, HShareSettings().refresh_interval), PlanSearch()
    group.add_argument(
        "--preset", choices=("hshare-paper",), help="the method of the paper; the other options change it"
    )
    group.add_argument(
        "--sharing-ratio", metavar="L-H-Q",
        help="three fractions, such as 7/8-3/4-1/2: the first two multiplied are the share of the lists that is "
        f"computed, the third is the share of the steps (default: {search.layer_ratio}-{search.head_ratio}-{steps})",
    )  # fmt: skip
    add_fields(group, HShareSettings)
    add_fields(group, PlanSearch, leave_out=_PARTS_OF_RATIO)
    return group


def add_files(group: argparse._ArgumentGroup, *, plan: bool = True) -> None:
    """Adds the files of label channels and, unless `plan` is False, of a plan, to the group of `add_settings`."""
    group.add_argument("--channels-file", metavar="FILE", help="label channels, from calibrate or as published")
    if plan:
        group.add_argument("--plan-file", metavar="FILE", help="a plan, from calibrate or as published")


def _field_names() -> list[str]:
    """The settings that have an option of their own."""
    names = [field.name for record in (HShareSettings, PlanSearch) for field in dataclasses.fields(record)]
    return [name for name in names if name not in _PARTS_OF_RATIO]


def setting_names() -> list[str]:
    """The names of all options that belong to sparse decoding."""
    return ["preset", "sharing_ratio", "channels_file", "plan_file", *_field_names()]


def read_method(options: argparse.Namespace) -> "HShare":
    """HShare with the settings of the preset, or the defaults, changed by the options that were given.

    Raises:
        UsageError: a value outside its range, two options that contradict each other, or an option without effect.
    """
    from hshare_jax.methods.hshare.method import HShare

    given = {name: getattr(options, name) for name in _field_names() if hasattr(options, name)}
    with usage_errors():
        method = HShare.paper() if hasattr(options, "preset") else HShare()
        if hasattr(options, "sharing_ratio"):
            method = method.with_sharing_ratio(options.sharing_ratio)
            interval = method.settings.refresh_interval
            if given.get("refresh_interval", interval) != interval:
                raise UsageError(
                    f"--refresh-interval {options.refresh_interval} contradicts --sharing-ratio "
                    f"{options.sharing_ratio}, whose last part means {interval}; leave either out"
                )
        method = method.with_settings(given)
    _check_effect(options, method.settings)
    return method


def _check_effect(options: argparse.Namespace, settings: HShareSettings) -> None:
    """Raises UsageError for an option that other options leave without effect."""
    has_labels = settings.scoring == "labels" or "double_sparsity" in getattr(options, "method", ())
    reasons = {
        ("label_channels", "label_bits"): (not has_labels, "--scoring exact reads keys and has no labels"),
        ("dilate",): (settings.refresh_interval == 1, "dilation is for lists that later steps reuse; here none is"),
        ("tail_rank",): (settings.tail is None, "it is for tails, and there are none without --tail fitted"),
    }
    for names, (is_idle, reason) in reasons.items():
        if given := [name for name in names if is_idle and getattr(options, name, False) is not False]:
            raise UsageError(f"{option_name(given[0])} has no effect: {reason}")


def check_method(options: argparse.Namespace, names: Sequence[str], hshare: "HShare") -> None:
    """Raises UsageError for an option that none of the methods takes, or a budget that is too small for a method.

    Args:
        options: the options.
        names: the methods that are used.
        hshare: from `read_method`.
    """
    from hshare_jax.methods.registry import method_named

    for name in setting_names():
        if hasattr(options, name) and not any(takes_setting(method, name) for method in names):
            takers = [method for method in METHODS if takes_setting(method, name)]
            whom = "sparse decoding" if list(names) == ["dense"] else f"--method {' or '.join(takers)}"
            raise UsageError(f"{option_name(name)} is for {whom}, not {' or '.join(names)}; leave it out")
    if hshare.settings.scoring == "exact" and hasattr(options, "channels_file"):
        reason = "--scoring exact reads keys and has no labels"
        raise UsageError(f"--channels-file {options.channels_file} has no effect: {reason}: leave it out")
    with usage_errors():
        for name in names:
            method_named(name, hshare)


def read_files(
    options: argparse.Namespace, model: "Model | ModelFiles", hshare: "HShare"
) -> "tuple[HShare, list[FileOrigin]]":
    """HShare with the plan and the channels of the files that the options name, and the models they were made with.

    The files are read here, before the weights. Once the model is loaded, `FileOrigin.check` compares it.

    Raises:
        UsageError: a file that cannot be read or does not fit the model's shapes, or an option without effect.
    """
    from hshare_jax.methods.hshare.plan_files import read_files

    given = {field.name for field in dataclasses.fields(PlanSearch) if hasattr(options, field.name)}
    given |= set(_PARTS_OF_RATIO) if hasattr(options, "sharing_ratio") else set()
    plan_file, channels_file = (getattr(options, name, None) for name in ("plan_file", "channels_file"))
    with usage_errors():
        return read_files(hshare, model, plan_file=plan_file, channels_file=channels_file, given=given)


def read_text(name: str, option: str = "") -> str:
    """The text of a file, or of standard input for -; UsageError where there is no text.

    Both are UTF-8, whatever the locale says.

    Args:
        name: the file.
        option: the option that named the file and a blank, for the message.
    """
    if name == "-":
        if sys.stdin is None:
            raise UsageError(f"{option}-: standard input is closed")
        with usage_errors():
            return decode_text(sys.stdin.buffer.read(), "standard input")
    try:
        return read_text_file(name)
    except OSError as error:
        raise UsageError(f"{option}{name}: {error.strerror}") from error
    except ValueError as error:  # also a name that no file can have
        raise UsageError(f"{option}{error}") from error


def check_not_empty(names: Sequence[str], texts: Sequence[str]) -> None:
    """Raises UsageError for a text that is empty or blank, by its name."""
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UsageError(f"{'standard input' if name == '-' else name} is empty")


def check_output(
    path: Path,
    *,
    inputs: Sequence[str | Path | None],
    overwrite: bool,
    may_replace: Callable[[Path], bool] = lambda path: not path.is_dir(),
) -> None:
    """Raises UsageError if a file cannot be written, is there already, or is one that the command reads.

    Args:
        path: the file or directory that a command will write.
        inputs: what the command reads, for `check_not_input`.
        overwrite: whether an existing one may be replaced.
        may_replace: whether what exists is something that this command may replace.
    """
    if path.exists() and not may_replace(path):
        raise UsageError(f"{path} exists, and is nothing that this command writes; name another path")
    check_not_input(path, inputs)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; give --overwrite to replace it")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"{path} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"{path} cannot be written: no permission to write in {nearest}")


def check_not_input(path: Path, inputs: Sequence[str | Path | None]) -> None:
    """Raises UsageError if a path is a file or a model that the same command reads. Links of all kinds are followed.

    Args:
        path: the file or directory that a command will write.
        inputs: files, - for standard input, and models, which may be names of no file; None is no input.
    """
    for name in inputs:
        found = Path("/dev/stdin" if name == "-" else os.path.expanduser(name or ""))
        if name and path.exists() and found.exists() and path.samefile(found):
            raise UsageError(f"{path} would replace {name}, which this command reads; name another path")


def is_same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, which need not exist yet."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def open_named(options: argparse.Namespace, *, weights: bool = True) -> "ModelFiles":
    """The model's configuration and tokenizer. Its weights are not read yet; they may be absent if not wanted."""
    from hshare_jax.models.builtin_model import cache_directory
    from hshare_jax.models.pretrained import check_model_name, open_model

    with usage_errors():
        check_model_name(options.model, revision=options.revision, weights=weights)
    keep_compiled_programs(cache_directory(options.cache_dir) / "compiled")
    return open_model(options.model, cache_dir=options.cache_dir, revision=options.revision, weights=weights)


def keep_compiled_programs(directory: Path) -> None:
    """Keeps compiled programs in a directory, so that the next start need not compile them."""
    import jax

    _remove_half_written(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _remove_half_written(directory: Path) -> None:
    """Removes compiled programs of which a kill or a full disk left only a part.

    JAX would neither use nor replace them, and would warn of them at each start. A kill leaves a part of the newest
    one, and a full disk leaves empty files too.
    """
    try:
        entries = sorted(directory.glob("*-cache"), key=lambda path: path.stat().st_mtime_ns)
        for path in entries:
            if path.stat().st_size == 0 or (path == entries[-1] and not _is_whole(path.read_bytes())):
                path.unlink()
    except OSError:
        return  # another process removes or writes them, or they may only be read: what is left costs a warning


def _is_whole(program: bytes) -> bool:
    """Whether a compiled program can be unpacked. One that is packed with zstd, as later Pythons do, is not tried."""
    if program.startswith(_ZSTD):
        return True
    unpacked = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        unpacked.decompress(program)
    return unpacked.eof


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts in arguments and files, or else in standard input.

    Raises:
        UsageError: no prompt, or a prompt that is empty or not UTF-8.
    """
    prompts, names = list(options.prompt), [f"prompt {row}" for row in range(1, len(options.prompt) + 1)]
    files = options.prompt_file
    if not prompts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give one as an argument, with --prompt-file, or on standard input")
        files = ["-"]
    prompts += [read_text(name, "--prompt-file ") for name in files]
    check_not_empty([*names, *files], prompts)
    return prompts


def apply_chat_template(model: "ModelFiles", prompts: Sequence[str], options: argparse.Namespace) -> list[list[int]]:
    """The token ids of prompts. Where there is a chat template, a prompt is the user's turn of a conversation.

    Raises:
        UsageError: the template refuses the conversation, no template is the default, or --system without a template.
        ValueError: a model without a tokenizer.
    """
    from hshare_jax.prompts import encode_chat, tokenize

    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.name} has no tokenizer, so text cannot be given to it")
    if options.no_chat_template or not tokenizer.chat_template:
        if options.system:
            raise UsageError("--system needs a chat template; this model or --no-chat-template gives none")
        return [tokenize(tokenizer, prompt) for prompt in prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    try:
        return [encode_chat(tokenizer, [*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    except ValueError as error:
        way_out = "leave out --system, or give --no-chat-template" if system else "give --no-chat-template"
        raise UsageError(f"{model.name}: {error}; {way_out}") from error
