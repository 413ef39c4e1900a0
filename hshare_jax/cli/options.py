"""What the commands share: options of models, prompts and settings, and their errors in the user's words."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hshare_jax.methods.registry import METHODS, has_use_for, method_named
from hshare_jax.models.kv_sharing import INITS, KNOWN_SPECS, share_kv

if TYPE_CHECKING:
    import numpy as np

    from hshare_jax.evaluation.run import Settings
    from hshare_jax.methods.hshare.settings import HShareSettings
    from hshare_jax.methods.hshare.share_plan import SharePlan
    from hshare_jax.models.config import ModelConfig
    from hshare_jax.models.pretrained import Model, ModelFiles

# What only one command needs is imported by it: a start stays short.

DEFAULT_MODEL = "smollm2-135m-instruct"
USAGE, FAILURE = 2, 1


class UsageError(Exception):
    """What the user asked for cannot be done as written."""


class Parser(argparse.ArgumentParser):
    """One clear line for a mistake, without the whole usage above it."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]  # of a subcommand, the command's
        self.exit(USAGE, f"{program}: error: {message} (see {self.prog} --help)\n")


def number(kind: Callable[[str], object], name: str) -> Callable[[str], object]:
    """Returns an argument's type for argparse, whose error says that the text "is not" so named."""

    def parse(text: str) -> object:
        try:
            return kind(text)
        except (ValueError, KeyError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None

    return parse


whole, real = number(int, "a whole number"), number(float, "a number")
fraction = number(Fraction, "a fraction such as 1/8")
bits = number({"4": 4, "8": 8, "none": None}.__getitem__, "4, 8 or none")
passes = number(lambda text: text if text == "exact" else int(text), "a whole number or exact")
probes = number(lambda text: text if text == "all" else int(text), "a whole number or all")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that loads a model takes."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: a converted model's, else float32"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--cache-dir", type=Path,
        help="where models are kept (default: $HSHARE_JAX_CACHE, or hshare-jax in the user's cache; the hub: its own)",
    )  # fmt: skip


def add_named_model(parser: argparse.ArgumentParser) -> None:
    """Adds --model, and what every command that loads a model takes."""
    parser.add_argument("--model", "-m", default=DEFAULT_MODEL, help="built-in name, GGUF file, directory or hub id")
    add_model(parser)


def add_kv_sharing(group: argparse._ArgumentGroup, *, weights: bool) -> None:
    """Adds the options of cross-layer KV sharing; with `weights`, where the shared projections come from."""
    group.add_argument("--kv-sharing", metavar="SPEC", help=f"which layers share keys and values: {KNOWN_SPECS}")
    group.add_argument("--kv-window", type=whole, metavar="N", help="of yoco, and of entries such as 1s")
    group.add_argument(
        "--forward-passes", type=passes, metavar="N|exact",
        help="over layers that look up, in prompts; in training those without gradient (7); exact: until equal",
    )  # fmt: skip
    group.add_argument("--backward-passes", type=whole, metavar="N", help="in training, those with gradient (2)")
    if weights:
        group.add_argument(
            "--init", choices=INITS, help="a KV layer takes the mean of those it serves, or its own (mean)"
        )


def check_kv_sharing(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that needs --kv-sharing and lacks it."""
    names = ("kv_window", "forward_passes", "backward_passes", "init", "perplexity")
    given = [name for name in names if getattr(options, name, None) is not None]
    if given and options.kv_sharing is None:
        raise UsageError(f"{option_name(given[0])} is for sharing keys and values; add --kv-sharing")


def share_kv_as_told(options: argparse.Namespace, config: "ModelConfig") -> "ModelConfig":
    """Returns the configuration that --kv-sharing and its options ask for, if they do; UsageError if it cannot be."""
    if options.kv_sharing is None:
        return config
    given = {name: getattr(options, name) for name in ("forward_passes", "backward_passes")}
    changes = {name: None if value == "exact" else value for name, value in given.items() if value is not None}
    try:
        return share_kv(dataclasses.replace(config, **changes), options.kv_sharing, window=options.kv_window)
    except ValueError as error:
        message = str(error).replace(f"spec={options.kv_sharing!r}", f"--kv-sharing {options.kv_sharing}", 1)
        message = message.replace("window=", "--kv-window ").replace("or None: until", "or exact: until")
        raise UsageError(re.sub(r"\b(\w+_passes)=", lambda match: f"{option_name(match[1])} ", message)) from error


def add_prompt_files(parser: argparse.ArgumentParser) -> None:
    """Adds prompts from files, and how they become a conversation."""
    parser.add_argument("--prompt-file", "-f", action="append", default=[], metavar="FILE", help="a prompt; - is stdin")
    parser.add_argument("--system", help="system message of the chat template")
    parser.add_argument("--no-chat-template", action="store_true", help="give the prompt to the model as it is")


def add_settings(parser: argparse.ArgumentParser, kind: str = "--plan") -> argparse._ArgumentGroup:
    """Adds the options of HShareSettings; those that are not given leave no trace, so that a preset keeps its own."""
    group = parser.add_argument_group("sparse decoding", argument_default=argparse.SUPPRESS)
    group.add_argument("--preset", choices=("hshare-paper",), help="the paper's method; other options change it")
    group.add_argument("--num-sinks", type=whole, metavar="N", help="first tokens always read (8)")
    group.add_argument("--num-critical", type=whole, metavar="N", help="tokens chosen by score (88)")
    group.add_argument("--num-recent", type=whole, metavar="N", help="last tokens always read (32)")
    group.add_argument(
        "--budget-ratio", type=fraction, metavar="A/B", help="and list critical tokens up to this share of a text"
    )
    group.add_argument(
        "--sharing-ratio", metavar="L-H-Q",
        help="fractions of layers, heads and steps that choose for themselves (1/2-1-1)",
    )  # fmt: skip
    group.add_argument("--refresh-interval", type=whole, metavar="N", help="steps that a choice serves (1)")
    group.add_argument("--lists-per", choices=("kv_head", "query_head"), help="who chooses (kv_head)")
    group.add_argument(
        kind, dest="plan", choices=("units", "published", "anchors"),
        help="any list copies any; or layers, then heads; or layers from the best anchor layers (units)",
    )  # fmt: skip
    group.add_argument("--plan-scope", choices=("sequence", "batch"), help="a plan for each prompt, or one for all")
    group.add_argument("--dense-layers", type=whole, metavar="N", help="first layers that read everything (1)")
    group.add_argument("--min-length", type=whole, metavar="N", help="shorter texts read everything (0)")
    group.add_argument("--dilate", action=argparse.BooleanOptionalAction, help="also want the token after a good one")
    group.add_argument("--scoring", choices=("labels", "exact"), help="score label channels, or whole keys")
    group.add_argument("--label-channels", type=whole, metavar="R", help="channels of a head in its labels")
    group.add_argument("--label-bits", type=bits, metavar="4|8|none", help="of a label channel (4)")
    group.add_argument("--num-probes", type=probes, metavar="N|all", help="queries the plan is found from (64)")
    return group


def read_text(name: str, option: str = "") -> str:
    """Returns the text of a file, or of standard input for -; UsageError where there is none."""
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option}{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option}{name} is not UTF-8 text (byte {error.start})") from error


def check_not_empty(names: Sequence[str], texts: Sequence[str]) -> None:
    """Raises UsageError, with its name, for a text of nothing but blanks."""
    for name, text in zip(names, texts, strict=True):
        if not text.strip():
            raise UsageError(f"{'standard input' if name == '-' else name} is empty")


def check_output(
    path: Path, *, overwrite: bool, may_replace: Callable[[Path], bool] = lambda path: not path.is_dir()
) -> None:
    """Raises UsageError for what is there already, and for a place that nothing can be written to."""
    if path.exists() and not may_replace(path):
        raise UsageError(f"{path} exists, and is nothing that this command writes; name another path")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; give --overwrite to replace it")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise UsageError(f"{path} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK):
        raise UsageError(f"{path} cannot be written: no permission to write in {nearest}")


def setting_names() -> list[str]:
    """Returns the arguments that belong to sparse decoding."""
    from hshare_jax.methods.hshare.settings import HShareSettings

    return [
        "preset",
        "sharing_ratio",
        "channels_file",
        "plan_file",
        *(f.name for f in dataclasses.fields(HShareSettings)),
    ]


def option_name(name: str) -> str:
    """Returns an argument's name as it is typed: `num_critical` is --num-critical."""
    return "--" + name.replace("_", "-")


def as_usage_error(error: ValueError) -> UsageError:
    """Returns a library's complaint in the user's words: `num_critical=0` is `--num-critical 0`."""
    from hshare_jax.sampling import SamplingParams

    names = {*setting_names(), *(f.name for f in dataclasses.fields(SamplingParams))} - {"layer_ratio", "head_ratio"}
    names |= {"max_new_tokens", "block_length", "max_blocks", "revision", "impl", "context", "steps", "limit"}
    message = re.sub(rf"\b({'|'.join(names)})=", lambda match: f"{option_name(match[1])} ", str(error))
    return UsageError(re.sub(r"\b(layer|head)_ratio=", r"the \1 ratio of --sharing-ratio, ", message))


def read_settings(options: argparse.Namespace) -> "HShareSettings":
    """Returns the preset's settings, or the default ones, changed by the options that were given."""
    from hshare_jax.methods.hshare.settings import HShareSettings

    settings = HShareSettings.published() if hasattr(options, "preset") else HShareSettings()
    fields = {field.name for field in dataclasses.fields(settings)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    if hasattr(options, "sharing_ratio"):
        try:
            settings = settings.with_sharing_ratio(options.sharing_ratio)
        except ValueError as error:
            raise UsageError(f"--sharing-ratio {options.sharing_ratio}: {error}") from error
        if given.get("refresh_interval", settings.refresh_interval) != settings.refresh_interval:
            raise UsageError(
                f"--refresh-interval {given['refresh_interval']} contradicts --sharing-ratio {options.sharing_ratio}, "
                f"whose last part means {settings.refresh_interval}; leave either out"
            )
    try:
        settings = dataclasses.replace(settings, **given)
    except ValueError as error:
        raise as_usage_error(error) from error
    check_effect(options, settings)
    return settings


def check_effect(options: argparse.Namespace, settings: "HShareSettings") -> None:
    """Refuses options that the others leave without effect."""
    has_labels = settings.scoring == "labels" or "double_sparsity" in getattr(options, "method", ())
    reasons = {
        ("label_channels", "label_bits"): (not has_labels, "--scoring exact reads keys and has no labels"),
        ("dilate",): (settings.refresh_interval == 1, "dilation is for lists that later steps reuse; here none is"),
    }  # fmt: skip
    for names, (is_idle, reason) in reasons.items():
        if given := [name for name in names if is_idle and getattr(options, name, False) is not False]:
            raise UsageError(f"{option_name(given[0])} has no effect: {reason}")


# Options that a plan is found with, and the settings that they mean.
_FIND_PLAN = {
    "sharing_ratio": ("layer_ratio", "head_ratio"),
    **{name: (name,) for name in ("plan", "plan_scope", "num_probes")},
}


def read_constants(
    options: argparse.Namespace, model: "Model | ModelFiles", hshare: "HShareSettings | None"
) -> "tuple[SharePlan | None, np.ndarray | None]":
    """Returns the plan and the channels that files give; of ModelFiles, a file's model is not compared."""
    from hshare_jax.calibration import differing_settings, load_channels, load_plan
    from hshare_jax.methods.hshare.shared_lists import check_channels

    plan = channels = None
    if hshare is not None and hasattr(options, "plan_file"):
        plan, found_with = load_plan(options.plan_file, model, hshare), differing_settings(options.plan_file, hshare)
        for option, names in _FIND_PLAN.items():
            differing = [name for name in names if name in found_with]
            if hasattr(options, option) and differing:
                raise UsageError(
                    f"{option_name(option)} {getattr(options, option)} has no effect: {options.plan_file} says which "
                    f"list copies which, found with {differing[0]} {found_with[differing[0]]}; leave it out"
                )
    if hshare is not None and hasattr(options, "channels_file"):
        channels = load_channels(options.channels_file, model)
        check_channels(channels, model.config, hshare.num_label_channels(model.config))
    return plan, channels


def open_named(options: argparse.Namespace) -> "ModelFiles":
    """Returns the model's configuration and tokeniser; its weights are not read yet."""
    from hshare_jax.models.builtin_model import cache_directory
    from hshare_jax.models.pretrained import check_model_name, open_model

    try:
        check_model_name(options.model, revision=options.revision)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:
        raise as_usage_error(error) from error
    keep_compiled_programs(cache_directory(options.cache_dir) / "compiled")
    return open_model(options.model, cache_dir=options.cache_dir, revision=options.revision)


def keep_compiled_programs(directory: Path) -> None:
    """Lets a second start find its programs compiled."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def apply_chat_template(model: "ModelFiles", prompts: list[str], options: argparse.Namespace) -> list[list[int]]:
    """Returns the token ids of prompts, each as a user's turn where there is a chat template."""
    if model.tokenizer is None:
        raise ValueError(f"{model.name} has no tokeniser, so text cannot be given to it")
    if options.no_chat_template or not model.tokenizer.chat_template:
        if options.system:
            raise UsageError("--system needs a chat template; this model or --no-chat-template gives none")
        return [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    system = [{"role": "system", "content": options.system}] if options.system else []
    conversations = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    from jinja2 import TemplateError

    try:
        texts = model.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:  # what a template raises of itself too: some know no system message
        way_out = "leave out --system, or give --no-chat-template" if system else "give --no-chat-template"
        raise UsageError(f"the chat template of {model.name} refuses: {error}; {way_out}") from error
    # The template writes the special tokens itself.
    return [model.tokenizer(str(text), add_special_tokens=False)["input_ids"] for text in texts]


def check_method(options: argparse.Namespace, names: Sequence[str], hshare: "HShareSettings") -> None:
    """Raises UsageError for settings that nothing has a use for, or a budget too small for a method."""
    for name in setting_names():
        if hasattr(options, name) and not any(has_use_for(method, name) for method in names):
            takers = [method for method in METHODS if has_use_for(method, name)]
            whom = "sparse decoding" if list(names) == ["dense"] else f"--method {' or '.join(takers)}"
            raise UsageError(f"{option_name(name)} is for {whom}, not {' or '.join(names)}; leave it out")
    if hshare.scoring == "exact" and hasattr(options, "channels_file"):
        raise UsageError("--channels-file has no effect: --scoring exact reads keys and has no labels")
    for name in names:
        choose_method(name, hshare)


def choose_method(name: str, hshare: "HShareSettings", *, max_new_tokens: int | None = None) -> "Settings":
    """Returns a method's settings by its name; UsageError for a budget that is too small for it."""
    try:
        return method_named(name, hshare, max_new_tokens=max_new_tokens)
    except ValueError as error:
        raise as_usage_error(error) from error


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Returns the prompts of arguments and files, or else of standard input; UsageError for empty ones."""
    prompts, names = list(options.prompt), [f"prompt {row}" for row in range(1, len(options.prompt) + 1)]
    files = options.prompt_file
    if not prompts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give one as an argument, with --prompt-file, or on standard input")
        files = ["-"]
    prompts += [read_text(name, "--prompt-file ") for name in files]
    check_not_empty([*names, *files], prompts)
    return prompts


def check_fit(
    files: "ModelFiles", prompts: list[list[int]], options: argparse.Namespace, hshare: "HShareSettings | None"
) -> None:
    """Raises UsageError unless prompts, answers and settings fit the model, before its weights are loaded."""
    from hshare_jax.kernels.api import check_impl
    from hshare_jax.prompts import choose_capacity

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
