"""Generation: prompts in, text out, with an account of time, tokens read and lists chosen."""

import dataclasses
import math
import operator
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from hshare_jax.compile_clock import compile_clock
from hshare_jax.decode_loop import NO_TOKEN, NOT_FINITE, LoopState, decode_tokens, refresh_interval, take_token
from hshare_jax.decode_state import state_for
from hshare_jax.errors import SettingError, check_whole
from hshare_jax.files.texts import check_text
from hshare_jax.kernels.api import check_impl
from hshare_jax.mesh import check_rows_divide, put, to_host
from hshare_jax.methods.base import Choices, Method, count_dense
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.prefill import prefill_prompts, refit
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.sampling import SamplingParams
from hshare_jax.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hshare_jax.models.pretrained import Model

STREAM_STEPS = 4  # the host looks at the tokens after so many steps, to show text or find stop strings
REPORT_STEPS = 64  # the same, where the host only draws a progress bar


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that a generation took. Tracing and compiling are counted apart."""

    prompt_tokens: int
    decoded_tokens: int  # all but the first token of each row, which prefill gives
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second, over all rows."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second, over all rows."""
        return self.decoded_tokens / max(self.decode_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What decode steps read and chose, over all rows. All numbers are 0 where prefill gave the only token.

    Steps between a stop string and the next look from the host count too.
    """

    reads: list[float]  # tokens read by each row, the mean over layers, heads and steps
    mean_reads: float  # the same, over the steps of all rows
    mean_length: float  # tokens that dense decoding without a window would have read
    refreshes: int  # steps of a row that chose lists anew
    selections: int  # lists that were chosen
    possible_selections: int  # lists chosen if every list of every sparse layer chose on each step; 0 if none share


@dataclasses.dataclass(frozen=True)
class Generation:
    """The continuation of each prompt."""

    tokens: list[list[int]]  # an end token is included where a row met one
    texts: list[str]  # empty without a tokenizer
    finish_reasons: list[Literal["stop", "length"]]
    timing: Timing
    usage: Usage


@dataclasses.dataclass(frozen=True)
class StreamedText:
    """One piece of a stream."""

    texts: list[str]  # the new text of every row; the pieces of a row join to `Generation.texts`
    result: Generation | None  # of the last piece, the whole generation


def generate(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    method: Method | None = HShare(),  # noqa: B008 (frozen)
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    impl: str = "auto",
) -> Generation:
    """Continues a batch of prompts.

    Args:
        model: from `load_model`.
        prompts: texts or token ids, of any lengths; they form one batch.
        max_new_tokens: a row ends here at the latest.
        method: how decode steps read the cache (`hshare_jax.methods`); None decodes dense.
        sampling: how tokens are drawn; greedy unless told otherwise.
        seeds: one seed a row; None means 0, 1, 2, ... The output of a row does not depend on its batch.
        stop: a row ends before the first of these strings; special tokens may be among them.
        capacity: cache slots per row, to keep one compiled program over calls of different lengths. None takes what is
            needed, in coarse steps.
        impl: which implementation computes decode steps, and what they need of the prompt, as for `decode_step`.

    Raises:
        ValueError: an empty batch or prompt, a text that is not Unicode, a token id that is no whole number or outside
            the vocabulary, more tokens than the model has positions, a method that does not fit the model, or an `impl`
            that cannot run here. All are found before anything is computed.
        FloatingPointError: the model computes logits that are no finite numbers.
    """
    options = _Options(max_new_tokens, method, sampling, seeds, stop, capacity, impl)
    run = _Run(model, prompts, options)
    with tqdm(total=max_new_tokens, desc="decode", unit="token", leave=False, disable=None) as bar:
        for num_tokens in run.steps(STREAM_STEPS if stop else REPORT_STEPS):
            bar.update(num_tokens - bar.n)
    return run.result()


def stream(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    method: Method | None = HShare(),  # noqa: B008 (frozen)
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    impl: str = "auto",
) -> Iterator[StreamedText]:
    """Continues a batch of prompts and yields new text every few tokens; the last piece holds the whole result.

    See `generate` for arguments and errors. The model must have a tokenizer.
    """
    options = _Options(max_new_tokens, method, sampling, seeds, stop, capacity, impl)
    run = _Run(model, prompts, options)
    if not run.streams:
        raise ValueError("stream needs a model with a tokenizer; this one has none, so use generate")
    return run.pieces()


@dataclasses.dataclass(frozen=True)
class _Options:
    """The options of `generate` and `stream`."""

    max_new_tokens: int
    method: Method | None
    sampling: SamplingParams
    seeds: Sequence[int] | None
    stop: Sequence[str]
    capacity: int | None
    impl: str


class _Run:
    """One call of generate or stream. It checks everything first, then computes and keeps the clock."""

    def __init__(self, model: "Model", prompts: Sequence[Prompt], options: _Options) -> None:
        check_impl(options.impl)
        self._model, self._options = model, options
        self._prompts = encode_prompts(model, prompts)
        check_rows_divide("prompts", len(prompts), model.mesh)
        check_whole("max_new_tokens", options.max_new_tokens, 1)
        self._capacity = choose_capacity(model.config, self._prompts, options.max_new_tokens, options.capacity)
        self._seeds = _check_seeds(options.seeds, len(prompts))
        tokenizer = _check_tokenizer(model, options.stop)
        self._end_tokens = _find_end_tokens(model, tokenizer, options.stop)
        self._try_method()
        self.streams = [] if tokenizer is None else [TextStream(tokenizer, options.stop) for _ in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._choices = Choices(0, 0, 0)
        self._counted_steps = np.zeros(len(prompts), np.int64)  # of each row, in `_choices`
        self._prefill_seconds = self._decode_seconds = self._compile_seconds = 0.0

    def steps(self, num_steps: int) -> Iterator[int]:
        """Decodes, ends stopped rows every `num_steps` steps, and yields the number of tokens in the longest row."""
        end_tokens = jnp.asarray(self._end_tokens or (NO_TOKEN,), jnp.int32)
        limit = jnp.int32(self._options.max_new_tokens)
        with compile_clock() as clock:
            began = time.perf_counter()
            loop = self._start(end_tokens, limit)
            loop = self._take_over(loop)
            self._prefill_seconds = time.perf_counter() - began - clock.seconds
            self._compile_seconds += clock.seconds
        yield max(map(len, self._tokens))
        method = self._options.method
        block, interval = refresh_interval(loop.state), None if method is None else method.refit_interval
        blocks, since_refit = -(-num_steps // block), 0
        until_refit = math.inf if interval is None else interval // block
        while bool(loop.is_active.any()):
            with compile_clock() as clock:
                began = time.perf_counter()
                if since_refit == until_refit:
                    loop, since_refit = self._refit(loop), 0
                num_blocks = int(min(blocks, until_refit - since_refit))
                loop = decode_tokens(
                    self._model.params, loop, jnp.int32(num_blocks), end_tokens, limit,
                    config=self._model.config, sampling=self._options.sampling, impl=self._options.impl,
                )  # fmt: skip
                since_refit += num_blocks
                loop = self._take_over(loop)
                self._decode_seconds += time.perf_counter() - began - clock.seconds
                self._compile_seconds += clock.seconds
            yield max(map(len, self._tokens))
        self._usage = self._count_usage(loop)

    def _try_method(self) -> None:
        """Raises ValueError if the method does not fit the model. Nothing is computed."""
        sizes, method = (len(self._prompts), self._capacity), self._options.method
        jax.eval_shape(lambda: jax.tree.leaves(state_for(self._model, *sizes, method=method)))

    def _start(self, end_tokens: Array, limit: Array) -> LoopState:
        """Prefills the prompts and samples the first token of each row."""
        model, sampling, B = self._model, self._options.sampling, len(self._prompts)
        longest = max(map(len, self._prompts))
        with tqdm(total=longest, desc="prefill", unit="token", leave=False, disable=None) as bar:
            logits, state = prefill_prompts(
                model, self._prompts, self._capacity,
                method=self._options.method, progress=bar.update, impl=self._options.impl,
            )  # fmt: skip
        seen = None
        if sampling.repetition_penalty != 1.0:
            seen = np.zeros((B, model.config.vocab_size), bool)
            for row, prompt in enumerate(self._prompts):
                seen[row, prompt] = True
            seen = put(seen, "B V", model.mesh)
        # Its size is rounded up to whole 64s, so that a slightly different limit does not compile anew.
        output = np.full((B, -(-self._options.max_new_tokens // 64) * 64), NO_TOKEN, np.int32)
        seeds = put(np.asarray(self._seeds, np.uint32), "B", model.mesh)
        loop = LoopState(
            state=state,
            token=put(np.zeros(B, np.int32), "B", model.mesh),
            output=put(output, "B", model.mesh),
            count=put(np.zeros(B, np.int32), "B", model.mesh),
            is_active=put(np.ones(B, bool), "B", model.mesh),
            seen=seen,
            random_keys=jax.vmap(jax.random.key)(seeds),
            reads=put(np.zeros(B, np.float32), "B", model.mesh),
        )
        return take_token(logits, loop, end_tokens, limit, sampling=sampling)

    def _refit(self, loop: LoopState) -> LoopState:
        """Finds anew what the method found from the prompts; the last tokens of each row are read once more."""
        model, method, lengths = self._model, self._options.method, to_host(loop.state.cache.lengths)
        assert method is not None
        self._count_choices(loop)
        output = to_host(loop.output)
        texts = [[*prompt, *of_row.tolist()] for prompt, of_row in zip(self._prompts, output, strict=True)]
        last = [text[max(end - REFIT_TOKENS, 0) : end] for text, end in zip(texts, lengths.tolist(), strict=True)]
        tokens, sizes = pad_prompts(last)
        tokens, sizes = put(tokens, "B T", model.mesh), put(sizes, "B", model.mesh)
        state = refit(
            model.params, tokens, sizes, loop.state,
            config=model.config, method=method, impl=self._options.impl,
        )  # fmt: skip
        # One pass over the cache serves all tokens that are read once more.
        reads = jnp.where(loop.is_active, count_dense(state.cache, model.config).mean(axis=0), 0)
        return dataclasses.replace(loop, state=state, reads=loop.reads + reads)

    def _take_over(self, loop: LoopState) -> LoopState:
        """Copies new tokens to the host, and ends the rows whose text met a stop string.

        Raises:
            FloatingPointError: a row ended because its logits are no finite numbers.
        """
        output, count = to_host(loop.output), to_host(loop.count)
        for row, tokens in enumerate(self._tokens):
            if self.streams and self.streams[row].is_stopped:
                continue
            for token in output[row, len(tokens) : count[row]].tolist():
                if token == NOT_FINITE:
                    raise FloatingPointError(
                        f"the logits of {self._model.name} are no finite numbers after {len(tokens)} new tokens of row "
                        f"{row}, computed in {self._model.dtype}: its weights are damaged, or they need bfloat16 or "
                        "float32"
                    )
                tokens.append(token)
                if self.streams:
                    self.streams[row].push(token)
                    if self.streams[row].is_stopped:
                        break
        if not any(stream.is_stopped for stream in self.streams):
            return loop
        is_stopped = put(np.array([stream.is_stopped for stream in self.streams]), "B", self._model.mesh)
        return dataclasses.replace(loop, is_active=loop.is_active & ~is_stopped)

    def _count_choices(self, loop: LoopState) -> None:
        """Counts what was chosen since the plan was found, before another one is found."""
        steps, lengths = to_host(loop.count).astype(np.int64) - 1, to_host(loop.state.cache.lengths)
        if loop.state.method_state is not None:
            new = loop.state.method_state.count_choices(steps - self._counted_steps, lengths, self._model.config)
            self._choices = Choices(*map(operator.add, self._choices, new))
        self._counted_steps = steps

    def _count_usage(self, loop: LoopState) -> Usage:
        self._count_choices(loop)
        steps = self._counted_steps
        prompts = np.array([len(prompt) for prompt in self._prompts])
        num_steps = max(int(steps.sum()), 1)
        reads = to_host(loop.reads).astype(np.float64)
        return Usage(
            reads=(reads / np.maximum(steps, 1)).tolist(),
            mean_reads=float(reads.sum()) / num_steps,
            mean_length=float((steps * prompts + steps * (steps + 1) / 2).sum()) / num_steps,
            refreshes=self._choices.refreshes,
            selections=self._choices.selections,
            possible_selections=self._choices.possible,
        )

    def pieces(self) -> Iterator[StreamedText]:
        """Yields the new text of every row as it comes, and at last the result."""
        shown = [0] * len(self.streams)
        for _ in self.steps(STREAM_STEPS):
            texts = [stream.text for stream in self.streams]
            if any(len(text) > size for text, size in zip(texts, shown, strict=True)):
                yield StreamedText([text[size:] for text, size in zip(texts, shown, strict=True)], None)
                shown = [len(text) for text in texts]
        result = self.result()
        yield StreamedText([text[size:] for text, size in zip(result.texts, shown, strict=True)], result)

    def result(self) -> Generation:
        """The generation, once `steps` has run out."""
        is_stopped = [stream.is_stopped for stream in self.streams] or [False] * len(self._tokens)
        return Generation(
            tokens=self._tokens,
            texts=[stream.finish() for stream in self.streams],
            finish_reasons=[
                "stop" if stopped or tokens[-1] in self._end_tokens else "length"
                for stopped, tokens in zip(is_stopped, self._tokens, strict=True)
            ],
            timing=Timing(
                prompt_tokens=sum(len(prompt) for prompt in self._prompts),
                decoded_tokens=sum(len(tokens) - 1 for tokens in self._tokens),
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                compile_seconds=self._compile_seconds,
            ),
            usage=self._usage,
        )


def _check_seeds(seeds: Sequence[int] | None, num_prompts: int) -> list[int]:
    try:
        checked = list(range(num_prompts)) if seeds is None else [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise SettingError("seeds", seeds, "must be whole numbers, one for each prompt") from error
    if len(checked) != num_prompts:
        raise ValueError(f"seeds has {len(checked)} entries; it needs one for each of the {num_prompts} prompts")
    if not all(0 <= seed < 2**31 for seed in checked):
        raise SettingError("seeds", checked, "must lie in [0, 2**31)")
    return checked


def _check_tokenizer(model: "Model", stop: Sequence[str]) -> "PreTrainedTokenizerFast | None":
    """The model's tokenizer, if it has one. ValueError where stop strings or streams are not possible with it."""
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
        raise SettingError("stop", stop, "must be a sequence of strings; put a single one in a list")
    if stop and model.tokenizer is None:
        raise ValueError("stop strings need a model with a tokenizer; this one has none, so use its end tokens")
    if not all(stop):
        raise ValueError("stop holds an empty string, which would end every row at once; leave it out")
    for index, text in enumerate(stop):
        check_text(text, f"stop[{index}]")
    if model.tokenizer is None:
        return None
    from transformers import PreTrainedTokenizerFast

    if not isinstance(model.tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"{model.name} has a {type(model.tokenizer).__name__}; only tokenizers of the tokenizers library stream"
        )
    return model.tokenizer


def _find_end_tokens(
    model: "Model", tokenizer: "PreTrainedTokenizerFast | None", stop: Sequence[str]
) -> tuple[int, ...]:
    """Token ids at which a row ends: the model's end tokens, and stop strings that are special tokens.

    A special token has no text, so no search in the text would find it.
    """
    added = {} if tokenizer is None else tokenizer.added_tokens_decoder
    special = {token.content: index for index, token in added.items() if token.special}
    return (*model.eos_token_ids, *(special[text] for text in stop if text in special))
