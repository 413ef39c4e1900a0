"""The model `hshare_jax` of lm-evaluation-harness: its tasks, decoded sparsely.

    python -m hshare_jax.evaluation.lm_eval_model run --model hshare_jax --tasks gsm8k --apply_chat_template \
        --model_args pretrained=smollm2-135m-instruct,sharing_ratio=1/2-1-1,num_critical=432

This is lm-evaluation-harness's own command line with the model registered. For versions that look for entry points one
is declared; 0.4.13, the newest at the time of writing, does not.
"""

import dataclasses
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hshare_jax.calibration import differing_settings, load_channels, load_plan
from hshare_jax.evaluation.likelihood import Request, log_likelihoods
from hshare_jax.generate import generate
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.registry import METHODS, has_use_for, method_named, tell_short
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.sampling import SamplingParams

_FIELDS = {field.name: field.default for field in dataclasses.fields(HShareSettings)}
_RATIOS = ("layer_ratio", "head_ratio", "refresh_interval")
_NO_CHOICE = ("device", "max_batch_size", "settings")
_log = logging.getLogger(__name__)


class HShareLM(TemplateLM):
    """A model of `load_model` for lm-evaluation-harness.

    `method` is one of `evaluation.methods.METHODS`. Answers are decoded by `generate`, and log-likelihoods are those of
    decode steps (`log_likelihoods`). A rolling one has a single token of context, so all of its text is decoded, token
    by token. No plan can be found from so short a context, and label channels only badly: give files of both.
    """

    tokenizer: PreTrainedTokenizerBase  # pyright: ignore[reportIncompatibleVariableOverride] (None there)

    def __init__(
        self,
        pretrained: str | Model,
        *,
        method: str = "hshare",
        preset: str | None = None,
        sharing_ratio: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_length: int | str | None = None,
        revision: str | int | None = None,
        cache_dir: str | None = None,
        plan_file: str | None = None,
        channels_file: str | None = None,
        impl: str = "auto",
        device: object = None,
        max_batch_size: object = None,
        **settings: object,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: a name or path as for `load_model`, or the model itself.
            method: one of `evaluation.methods.METHODS`; each takes the settings that it has
                a use for: `dense` none, the others the budget's.
            preset: `hshare-paper`, the paper's method instead of the defaults; the settings change it.
            sharing_ratio: layer-head-query, such as `7/8-3/4-1/2`.
            dtype, revision, cache_dir: as for `load_model`.
            batch_size: requests that are computed together.
            max_length: tokens of context and output together, at most. None: as many as the model has positions.
            plan_file, channels_file: of `hshare-jax calibrate`, in place of what is found from each prompt.
            impl: what computes decode steps, as for `decode_step`.
            device, max_batch_size: not used; the command line gives them to every model. JAX chooses the device.
            settings: fields of HShareSettings by their names, as values or as text.

        Raises:
            ValueError: an argument that does not exist, contradicts another or is out of range. For the model and the
                files, the errors of `load_model`, `load_plan` and `load_channels`.
        """
        super().__init__()
        if unknown := [name for name in settings if name not in _FIELDS]:
            known = [name for name in inspect.signature(HShareLM).parameters if name not in _NO_CHOICE]
            raise ValueError(f"unknown model arguments {', '.join(unknown)}; there are {', '.join([*known, *_FIELDS])}")
        files = {"plan_file": plan_file, "channels_file": channels_file}
        self._files = {name: path for name, path in files.items() if path is not None}
        self.method = _choose_method(method, preset, sharing_ratio, settings | self._files)
        self.batch_size = _whole("batch_size", batch_size, 1)
        self._impl = impl
        if not isinstance(pretrained, Model):
            revision = None if revision is None else str(revision)
            pretrained = load_model(pretrained, dtype=dtype, cache_dir=cache_dir, revision=revision)  # pyright: ignore[reportArgumentType]
        if pretrained.tokenizer is None:
            raise ValueError(f"{pretrained.name} has no tokenizer, and lm-evaluation-harness gives texts")
        self.model, self.tokenizer = pretrained, pretrained.tokenizer
        self._constants: dict[str, Any] = {}
        if isinstance(self.method, HShareSettings):
            given = {*settings, *(_RATIOS if sharing_ratio is not None else ())}
            self._constants = _read_constants(self._files, pretrained, self.method, given)
        positions = pretrained.config.max_positions
        self.max_length = positions if max_length is None else _whole("max_length", max_length, 2)
        if self.max_length > positions:
            raise ValueError(f"max_length={self.max_length} must be at most the model's {positions} positions")

    @property
    def max_gen_toks(self) -> int:
        """Returns how long an answer may be where the task does not tell."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """Returns the token that ends a text."""
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else self.model.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Returns the token that a text without context is conditioned on: the one that begins texts, or ends them."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Returns the name that cached requests are kept under."""
        return self.model.name.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """Returns what is written beside the results."""
        info = {"model_identity": self.model.identity, "model_dtype": self.model.dtype, "method": repr(self.method)}
        return info | self._files

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the prompt that the tokenizer's template makes of a chat; its last message may be left open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # pyright: ignore[reportReturnType] (text, without tokenize)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Returns a text's token ids; None adds the tokenizer's special tokens unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether greedy decoding would choose it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        pairs, num_cut = [], 0
        texts = [text for text, _, _ in requests]
        for _, context, continuation in requests:
            room = max(self.max_length + 1 - len(continuation), 1)  # the last token is only predicted
            num_cut += len(context) > room
            pairs.append((context[-room:] or [self.prefix_token_id], continuation))
        self._warn_of_cuts(num_cut, len(pairs))
        return self._score(
            pairs, disable_tqdm, lambda index, score: self.cache_hook.add_partial("loglikelihood", texts[index], score)
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of `max_length` that predict every token once."""
        pairs: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs += map(make_disjoint_window, windows)
            owners += [index] * (len(pairs) - len(owners))
        totals, num_left = [0.0] * len(requests), Counter(owners)

        def add(pair: int, score: tuple[float, bool]) -> None:
            index = owners[pair]
            totals[index] += score[0]
            num_left[index] -= 1
            if not num_left[index]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])

        self._score(pairs, disable_tqdm, add)
        return totals

    def _score(
        self, pairs: Sequence[Request], disable_tqdm: bool, keep: Callable[[int, tuple[float, bool]], object]
    ) -> list[tuple[float, bool]]:
        """Returns the scores of all pairs, and gives each to `keep` as soon as it is known."""
        # The last token of a context is decoded, and the last of all is only predicted.
        self._warn_of_short([(max(len(start) - 1, 1), len(start) + len(end) - 1) for start, end in pairs])
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None) as bar:

            def keep_batch(scores: dict[int, tuple[float, bool]]) -> None:
                for index, score in scores.items():
                    keep(index, score)
                bar.update(len(scores))

            return log_likelihoods(
                self.model, pairs,
                method=self.method, batch_size=self.batch_size, impl=self._impl, progress=keep_batch,
                **self._constants,
            )  # fmt: skip

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each prompt, up to the first of its stop strings.

        Prompts that leave no room for `max_gen_toks` lose their beginning. A sampled answer depends on its place among
        the requests, so repeats of one prompt differ, and not on its batch.
        """
        given: list[Any] = [request.args for request in requests]
        prompts = [self.tok_encode(prompt) or [self.prefix_token_id] for prompt, _ in given]
        groups: dict[str, list[int]] = {}
        for index in sorted(range(len(requests)), key=lambda index: len(prompts[index]), reverse=True):
            groups.setdefault(repr(given[index][1]), []).append(index)
        answers, num_cut = [""] * len(requests), 0
        limits = {name: _read_gen_kwargs(given[indices[0]][1], self.max_gen_toks) for name, indices in groups.items()}
        for name, (_, max_gen_toks, _) in limits.items():
            room = self.max_length - max_gen_toks
            if room < 1:
                raise ValueError(f"max_gen_toks={max_gen_toks} must be less than max_length={self.max_length}")
            num_cut += sum(len(prompts[index]) > room for index in groups[name])
        sizes = [(len(prompts[i]), len(prompts[i]) + limits[name][1]) for name, group in groups.items() for i in group]
        self._warn_of_short(sizes)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm or None) as bar:
            for name, indices in groups.items():
                until, max_gen_toks, sampling = limits[name]
                room = self.max_length - max_gen_toks
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    result = generate(
                        self.model, [prompts[index][-room:] for index in batch],
                        max_new_tokens=max_gen_toks, method=self.method, sampling=sampling, seeds=batch, stop=until,
                        impl=self._impl, **self._constants,
                    )  # fmt: skip
                    for index, text in zip(batch, result.texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", given[index], text)
                    bar.update(len(batch))
        self._warn_of_cuts(num_cut, len(requests))
        return answers

    def _warn_of_short(self, sizes: Sequence[tuple[int, int]]) -> None:
        if isinstance(self.method, HShareSettings):
            for note in tell_short(self.method, self.model.config, sizes, needs_plan="plan" not in self._constants):
                _log.warning(note)

    def _warn_of_cuts(self, num_cut: int, num_requests: int) -> None:
        if num_cut:
            _log.warning(
                "%d of %d prompts were cut from the left: with their output they are longer than max_length=%d",
                num_cut, num_requests, self.max_length,
            )  # fmt: skip


register_model("hshare_jax")(HShareLM)  # as a decorator it would hide the class from type checkers


def _read_constants(
    files: Mapping[str, str], model: Model, hshare: HShareSettings, given: Collection[str]
) -> dict[str, Any]:
    """Returns the plan and the channels that files give; ValueError where they leave a given setting without effect."""
    found: dict[str, Any] = {}
    if (plan_file := files.get("plan_file")) is not None:
        found["plan"] = load_plan(plan_file, model, hshare)
        differing = differing_settings(plan_file, hshare)
        if idle := [name for name in differing if name in given]:
            raise ValueError(
                f"{idle[0]}={getattr(hshare, idle[0])} has no effect: {plan_file} says which list copies which, found "
                f"with {differing[idle[0]]}; leave it out"
            )
    if (channels_file := files.get("channels_file")) is not None:
        if hshare.scoring == "exact":
            raise ValueError(f"channels_file={channels_file} has no effect: scoring=exact reads keys and has no labels")
        found["channels"] = load_channels(channels_file, model)
    return found


def _choose_method(
    name: str, preset: str | None, sharing_ratio: str | None, settings: Mapping[str, object]
) -> HShareSettings | Method | None:
    """Returns the method that the model arguments ask for."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} must be one of {', '.join(METHODS)}")
    if preset not in (None, "hshare-paper"):
        raise ValueError(f"preset={preset!r} must be 'hshare-paper'")
    options = {"preset": preset, "sharing_ratio": sharing_ratio, **settings}
    given = [key for key, value in options.items() if value is not None and not has_use_for(name, key)]
    if given:
        takers = [method for method in METHODS if all(has_use_for(method, key) for key in given)]
        whom = "sparse decoding" if name == "dense" else f"method={' or '.join(takers)}"
        raise ValueError(f"{', '.join(given)} is for {whom}; leave it or method={name} out")
    config = HShareSettings() if preset is None else HShareSettings.published()
    if sharing_ratio is not None:
        if doubled := [key for key in _RATIOS if key in settings]:
            raise ValueError(f"sharing_ratio={sharing_ratio} sets {doubled[0]} too; leave either out")
        config = config.with_sharing_ratio(str(sharing_ratio))
    fields = {key: _parse(key, value) for key, value in settings.items() if key in _FIELDS}
    config = dataclasses.replace(config, **fields)  # pyright: ignore[reportArgumentType]
    return method_named(name, config)


def _parse(name: str, value: object) -> object:
    """Returns the value of a setting that may be text; HShareSettings checks what may stand where."""
    text = str(value).strip()
    constants = {"none": None, "true": True, "false": False}
    if isinstance(_FIELDS[name], bool) and text.lower() not in ("true", "false"):
        raise ValueError(f"{name}={value!r} must be true or false")
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text
    return number if name.endswith("_ratio") or number.denominator > 1 else int(number)


def _whole(name: str, value: object, least: int) -> int:
    number = int(str(value)) if str(value).isdecimal() else -1
    if number < least:
        raise ValueError(f"{name}={value!r} must be at least {least}, a whole number")
    return number


def _read_gen_kwargs(gen_kwargs: dict[str, Any], max_gen_toks: int) -> tuple[list[str], int, SamplingParams]:
    """Returns (stop strings, most new tokens, sampling) of a task's generation_kwargs."""
    kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, max_gen_toks)}
    until = [text for text in kwargs.pop("until") if text]
    max_gen_toks = kwargs.pop("max_gen_toks")
    del kwargs["do_sample"]  # without it the temperature is 0
    if kwargs.get("num_beams") == 1:
        del kwargs["num_beams"]
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(SamplingParams)}
    if unknown := [name for name in kwargs if name not in kinds]:
        raise ValueError(f"unknown generation_kwargs {', '.join(unknown)}; for sampling there are {', '.join(kinds)}")
    if not float(kwargs.get("temperature", 0)):  # greedy: a task's top_p=0 means nothing then
        kwargs = {name: value for name, value in kwargs.items() if name == "repetition_penalty"}
    return until, max_gen_toks, SamplingParams(**{name: kinds[name](value) for name, value in kwargs.items()})


def main() -> None:
    """Runs lm-evaluation-harness's command line, which then knows the model `hshare_jax`."""
    cli_evaluate()


if __name__ == "__main__":
    main()
