"""The model `hshare_jax` of lm-evaluation-harness: its tasks, decoded sparsely.

    python -m hshare_jax.evaluation.lm_eval_model run --model hshare_jax --tasks gsm8k --apply_chat_template \
        --model_args pretrained=smollm2-135m-instruct,sharing_ratio=1/3-1-1

This is lm-evaluation-harness's own command line, with the model registered. The package also declares an entry point,
for versions of lm-evaluation-harness that look for one; 0.4.13, the newest at the time of writing, does not.
"""

import contextlib
import dataclasses
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from hshare_jax.errors import SettingError, check_one_of
from hshare_jax.evaluation.likelihood import Request, log_likelihoods
from hshare_jax.generate import generate
from hshare_jax.mesh import make_mesh
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.plan_files import with_files
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.names import METHODS, takes_setting
from hshare_jax.methods.registry import method_named, notes_on_short_texts
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.prompts import tokenize
from hshare_jax.sampling_params import SamplingParams

_DEFAULTS = {field.name: field.default for part in (HShareSettings, PlanSearch) for field in dataclasses.fields(part)}
_RATIOS = ("layer_ratio", "head_ratio", "refresh_interval")  # the settings that `sharing_ratio` gives
_NO_CHOICE = ("device", "max_batch_size", "settings")  # parameters that no user has to know
_log = logging.getLogger(__name__)


class HShareLM(TemplateLM):
    """A model of `load_model` for lm-evaluation-harness.

    Answers are decoded by `generate`. Log-likelihoods come from decode steps (`log_likelihoods`). A rolling
    log-likelihood starts from a context of one token, so its whole text is decoded token by token. No plan can be found
    from so short a context, and label channels only badly: give files of both.
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
        quantize: str = "auto",
        kv_cache_dtype: str = "auto",
        batch_size: int | str = 1,
        max_length: int | str | None = None,
        revision: str | int | None = None,
        cache_dir: str | None = None,
        plan_file: str | None = None,
        channels_file: str | None = None,
        tensor_parallel_size: int | str = 1,
        impl: str = "auto",
        device: object = None,
        max_batch_size: object = None,
        **settings: object,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: a name or path as for `load_model`, or the model itself.
            method: one of `hshare_jax.methods.names.METHODS`. Each takes the settings that it has a use for: `dense`
                none, the others at least the budget.
            preset: `hshare-paper` takes the paper's method instead of the defaults; the settings change it.
            sharing_ratio: layer-head-query, such as `7/8-3/4-1/2`.
            dtype, quantize, kv_cache_dtype, revision, cache_dir: as for `load_model`; not used if a model is given.
            batch_size: requests that are computed together.
            max_length: the most tokens of context and output together; None takes all positions of the model.
            plan_file, channels_file: files of `hshare-jax calibrate`, used instead of a plan and channels found from
                each prompt.
            tensor_parallel_size: devices that divide the model's heads among themselves; a model that is given says
                itself where it is.
            impl: which implementation computes decode steps, as for `decode_step`.
            device, max_batch_size: not used. The command line gives them to every model; JAX chooses the device.
            settings: fields of HShareSettings and PlanSearch by their names, as values or as text.

        Raises:
            ValueError: an argument that does not exist, contradicts another argument or is out of range; or a
                model or file that `load_model` or `with_files` refuses.
        """
        super().__init__()
        if unknown := [name for name in settings if name not in _DEFAULTS]:
            known = [name for name in inspect.signature(HShareLM).parameters if name not in _NO_CHOICE]
            known += _DEFAULTS
            raise ValueError(f"unknown model arguments {', '.join(unknown)}; there are {', '.join(known)}")
        files = {"plan_file": plan_file, "channels_file": channels_file}
        self._files = {name: path for name, path in files.items() if path is not None}
        with _as_model_arguments():
            _check_use(method, {"preset": preset, "sharing_ratio": sharing_ratio, **settings, **self._files})
            # Methods are compared at equal reads, so no row reads everything unless asked to.
            hshare = _read_hshare(preset, sharing_ratio, {"min_length": 0, **settings})
            self._method_name, self._description = method, repr(method_named(method, hshare))  # without files
            self.batch_size = _read_whole("batch_size", batch_size, 1)
            length = None if max_length is None else _read_whole("max_length", max_length, 2)
            parts, devices = _read_whole("tensor_parallel_size", tensor_parallel_size, 1), jax.devices()
            if parts > len(devices):
                raise SettingError("tensor_parallel_size", parts, f"must be at most the {len(devices)} that jax finds")
        if not isinstance(pretrained, Model):
            revision = None if revision is None else str(revision)
            how: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "kv_cache_dtype": kv_cache_dtype}
            how |= {"cache_dir": cache_dir, "revision": revision}
            mesh = None if parts == 1 else make_mesh(model=parts, devices=devices[:parts])
            pretrained = load_model(pretrained, mesh=mesh, **how)
        if pretrained.tokenizer is None:
            raise ValueError(f"{pretrained.name} has no tokenizer, and lm-evaluation-harness gives texts")
        self.model, self.tokenizer, self._impl = pretrained, pretrained.tokenizer, impl
        positions = pretrained.config.max_positions
        with _as_model_arguments():
            given = {*settings, *(_RATIOS if sharing_ratio is not None else ())}
            self._hshare = with_files(hshare, pretrained, **self._files, given=given)
            if length is not None and length > positions:
                raise SettingError("max_length", length, f"must be at most the model's {positions} positions")
        self.method = method_named(method, self._hshare)
        self.max_length = positions if length is None else length

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer, unless the task says otherwise."""
        return 256

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return end if isinstance(end, int) else self.model.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: the one that begins texts, or else the one that ends them."""
        begin = self.tokenizer.bos_token_id
        return begin if isinstance(begin, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-evaluation-harness caches requests."""
        return self.model.name.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """Facts that lm-evaluation-harness writes beside the results."""
        info = {"model_identity": self.model.identity, "model_dtype": self.model.dtype, "method": self._description}
        return info | {"kv_cache_dtype": self.model.kv_cache_dtype} | self._files

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat in the tokenizer's template, as text. Without a generation prompt the last message stays open."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # pyright: ignore[reportReturnType] (text, without tokenize)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text. None adds the tokenizer's special tokens, unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        return tokenize(self.tokenizer, string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would choose it."""
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
        """The log-likelihood of each whole text, in windows of `max_length` that predict every token once."""
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
        """The scores of all pairs. Each score is given to `keep` as soon as it is known."""
        # The last token of a context is decoded, and the last token of a continuation is only predicted.
        self._warn_of_short([(max(len(start) - 1, 1), len(start) + len(end) - 1) for start, end in pairs])
        with tqdm(total=len(pairs), desc="log-likelihoods", disable=disable_tqdm or None) as bar:

            def keep_batch(scores: dict[int, tuple[float, bool]]) -> None:
                for index, score in scores.items():
                    keep(index, score)
                bar.update(len(scores))

            return log_likelihoods(
                self.model, pairs, method=self.method, batch_size=self.batch_size, impl=self._impl, progress=keep_batch
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt, up to the first stop string of the prompt.

        A prompt that leaves no room for `max_gen_toks` loses its beginning. A sampled answer depends on where its
        request stands among all requests, not on its batch. So repeats of one prompt differ.
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
                        impl=self._impl,
                    )  # fmt: skip
                    for index, text in zip(batch, result.texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", given[index], text)
                    bar.update(len(batch))
        self._warn_of_cuts(num_cut, len(requests))
        return answers

    def _warn_of_short(self, sizes: Sequence[tuple[int, int]]) -> None:
        if isinstance(self.method, HShare):
            for note in notes_on_short_texts(self._hshare, self.model.config, sizes, names=[self._method_name]):
                _log.warning(note)

    def _warn_of_cuts(self, num_cut: int, num_requests: int) -> None:
        if num_cut:
            _log.warning(
                "%d of %d prompts were cut from the left: with their output they are longer than max_length=%d",
                num_cut, num_requests, self.max_length,
            )  # fmt: skip


register_model("hshare_jax")(HShareLM)  # as a decorator it would hide the class from type checkers


@contextlib.contextmanager
def _as_model_arguments() -> Iterator[None]:
    """Tells a SettingError as model arguments are written: `layer_ratio=1/8`."""
    try:
        yield
    except SettingError as error:
        raise ValueError(error.told(lambda name, value: f"{name}={'none' if value is None else value}")) from error


def _check_use(method: str, arguments: Mapping[str, object]) -> None:
    """Raises ValueError for an unknown method, or for arguments that the method does not take."""
    check_one_of("method", method, METHODS)
    idle = [name for name, value in arguments.items() if value is not None and not takes_setting(method, name)]
    if idle:
        takers = [taker for taker in METHODS if all(takes_setting(taker, name) for name in idle)]
        whom = "sparse decoding" if method == "dense" else f"method={' or '.join(takers)}"
        raise ValueError(f"{', '.join(idle)} is for {whom}; leave it or method={method} out")


def _read_hshare(preset: str | None, sharing_ratio: str | None, settings: Mapping[str, object]) -> HShare:
    """HShare with the preset, the sharing ratio and the settings that the model arguments give.

    Raises:
        SettingError: a value outside its range.
        ValueError: a setting that the sharing ratio gives too.
    """
    if preset not in (None, "hshare-paper"):
        raise SettingError("preset", preset, "must be hshare-paper")
    hshare = HShare() if preset is None else HShare.paper()
    if sharing_ratio is not None:
        if doubled := [name for name in _RATIOS if name in settings]:
            raise ValueError(f"sharing_ratio={sharing_ratio} sets {doubled[0]} too; leave either out")
        hshare = hshare.with_sharing_ratio(str(sharing_ratio))
    return hshare.with_settings({name: _read_value(name, value) for name, value in settings.items()})


def _read_value(name: str, value: object) -> object:
    """The value of a setting that may be given as text. The setting's range is not checked here."""
    text = str(value).strip()
    constants = {"none": None, "true": True, "false": False}
    if isinstance(_DEFAULTS[name], bool) and text.lower() not in ("true", "false"):
        raise SettingError(name, value, "must be true or false")
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text
    return number if name.endswith("_ratio") or number.denominator > 1 else int(number)


def _read_whole(name: str, value: object, least: int) -> int:
    """A whole number that may be given as text; SettingError if it is none, or less than `least`."""
    number = int(str(value)) if str(value).isdecimal() else -1
    if number < least:
        raise SettingError(name, value, f"must be at least {least}, a whole number")
    return number


def _read_gen_kwargs(gen_kwargs: dict[str, Any], max_gen_toks: int) -> tuple[list[str], int, SamplingParams]:
    """Stop strings, the most new tokens and the sampling, from a task's generation_kwargs."""
    kwargs: dict[str, Any] = {**normalize_gen_kwargs(gen_kwargs, max_gen_toks)}
    until = [text for text in kwargs.pop("until") if text]
    max_gen_toks = kwargs.pop("max_gen_toks")
    del kwargs["do_sample"]  # without it the temperature is 0
    if kwargs.get("num_beams") == 1:
        del kwargs["num_beams"]
    kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(SamplingParams)}
    if unknown := [name for name in kwargs if name not in kinds]:
        raise ValueError(f"unknown generation_kwargs {', '.join(unknown)}; for sampling there are {', '.join(kinds)}")
    if not float(kwargs.get("temperature", 0)):  # greedy, so that a task's top_p=0 means nothing
        kwargs = {name: value for name, value in kwargs.items() if name == "repetition_penalty"}
    return until, max_gen_toks, SamplingParams(**{name: kinds[name](value) for name, value in kwargs.items()})


def main() -> None:
    """Runs lm-evaluation-harness's command line, which then knows the model `hshare_jax`."""
    cli_evaluate()


if __name__ == "__main__":
    main()
