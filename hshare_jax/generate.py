"""Generation: prompts in, text out, and an account of time, tokens read and lists chosen."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hshare_jax.compile_clock import compile_clock
from hshare_jax.decode_loop import NO_TOKEN, Progress, decode_tokens, refresh_interval, take_token
from hshare_jax.decode_state import DecodeState, for_decoding, init_state
from hshare_jax.kernels.api import check_impl
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.sampling import SamplingConfig
from hshare_jax.text_stream import TextStream

STREAM_STEPS = 4  # decode steps between two looks at the tokens from the host, to show them or to find stop strings
REPORT_STEPS = 64  # the same where it is only to tell how far it is


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where the time of a generation went, in seconds; tracing and compiling stand apart."""

    prompt_tokens: int
    decoded_tokens: int  # all but the first of each row, which falls to prefill
    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Returns prompt tokens per second, over all rows."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Returns decoded tokens per second, over all rows."""
        return self.decoded_tokens / max(self.decode_seconds, 1e-9)


@dataclasses.dataclass(frozen=True)
class ReadStatistics:
    """What decode steps read and chose, over all rows; a step that followed a stop string unseen counts too."""

    reads: list[float]  # tokens, of each row the mean over its layers, heads and steps
    mean_reads: float  # the same over the steps of all rows; all numbers are 0 where prefill gave the only token
    mean_length: float  # tokens that dense decoding without a window would have read
    refreshes: int  # steps of a row that chose lists anew
    selections: int  # lists that were chosen
    possible_selections: int  # were each list of every sparse layer chosen on each step; 0 for dense decoding


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came of each prompt. `tokens` holds an end token where one was met; `texts` is empty without a tokenizer."""

    tokens: list[list[int]]
    texts: list[str]
    finish_reasons: list[Literal["stop", "length"]]
    timing: Timing
    usage: ReadStatistics


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    method: HShareSettings | Method | None = HShareSettings(),  # noqa: B008 (frozen)
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    impl: str = "auto",
) -> Generation:
    """Returns the continuations of a batch of prompts.

    Args:
        model: from `load_model`.
        prompts: texts, or token ids, of any lengths; they form one batch.
        max_new_tokens: where a row ends at the latest.
        method: how critical tokens are shared, or another method of `hshare_jax.methods`; None decodes dense.
        plan: which lists copy which, from `calibrate` or `load_plan`. None: found for each prompt.
        channels: label channels, from `calibrate` or `load_channels`. None: those of each prompt.
        sampling: greedy unless told otherwise.
        seeds: one a row; a row's output does not depend on its batch. None: 0, 1, 2, ...
        stop: a row ends before the first of these strings; special tokens may be among them.
        capacity: cache slots per row, to keep one compiled program over calls of different lengths. None: as needed, in
            coarse steps.
        impl: what computes decode steps, as for `decode_step`.

    Raises:
        ValueError: an empty batch or prompt, an id outside the vocabulary, more tokens than the model has positions, a
            plan or channels that do not fit, or an `impl` that cannot run here; before anything is computed.
    """
    run = _Run(model, prompts, max_new_tokens, method, plan, channels, sampling, seeds, stop, capacity, impl)
    with tqdm(total=max_new_tokens, desc="decode", unit="token", leave=False, disable=None) as bar:
        for num_tokens in run.steps(STREAM_STEPS if stop else REPORT_STEPS):
            bar.update(num_tokens - bar.n)
    return run.result()


def stream(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    method: HShareSettings | Method | None = HShareSettings(),  # noqa: B008 (frozen)
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    capacity: int | None = None,
    impl: str = "auto",
) -> Iterator[list[str]]:
    """Yields the new text of every row each few tokens; the pieces of a row join to what `generate` returns.

    The generator's return value (`result = yield from stream(...)`) is the Generation. Arguments and errors are those
    of `generate`, and it needs a model with a tokenizer.
    """
    run = _Run(model, prompts, max_new_tokens, method, plan, channels, sampling, seeds, stop, capacity, impl)
    if not run.streams:
        raise ValueError("stream needs a model with a tokenizer; this one has none, so use generate")
    return run.pieces()


class _Run:
    """One call of generate or stream: checks everything first, then computes and keeps the clock."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        method: HShareSettings | Method | None,
        plan: SharePlan | None,
        channels: Array | np.ndarray | None,
        sampling: SamplingConfig,
        seeds: Sequence[int] | None,
        stop: Sequence[str],
        capacity: int | None,
        impl: str,
    ) -> None:
        check_impl(impl)
        self._model, self._method, self._sampling, self._impl = model, method, sampling, impl
        self._plan, self._channels = plan, channels
        self._max_new_tokens = max_new_tokens
        self._prompts = encode_prompts(model, prompts)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} must be at least 1, a whole number")
        self._capacity = choose_capacity(model.config, self._prompts, max_new_tokens, capacity)
        self._seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(self._seeds) != len(prompts):
            raise ValueError(
                f"seeds has {len(self._seeds)} entries; it needs one for each of the {len(prompts)} prompts"
            )
        if not all(0 <= seed < 2**31 for seed in self._seeds):
            raise ValueError(f"seeds={self._seeds} must lie in [0, 2**31)")
        if stop and model.tokenizer is None:
            raise ValueError("stop strings need a model with a tokenizer; this one has none, so use its end tokens")
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r} must be a sequence of strings; put a single one in a list")
        if not all(stop):
            raise ValueError("stop holds an empty string, which would end every row at once; leave it out")
        tokenizer = model.tokenizer
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{model.name} has a {type(tokenizer).__name__}; only tokenisers of the tokenizers library stream"
            )
        # A special token has no text, so that no stop string is found there.
        added = {} if tokenizer is None else tokenizer.added_tokens_decoder
        special = {token.content: index for index, token in added.items() if token.special}
        self._ends = (*model.eos_token_ids, *(special[text] for text in stop if text in special))
        jax.eval_shape(lambda: jax.tree.leaves(self._init_state()))  # refuses a plan or channels that do not fit
        self.streams = [] if tokenizer is None else [TextStream(tokenizer, stop) for _ in prompts]
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._seconds = [0.0, 0.0, 0.0]

    def steps(self, num_steps: int) -> Iterator[int]:
        """Decodes, and every `num_steps` steps yields the tokens of the longest row, with stopped rows ended."""
        model, sampling = self._model, self._sampling
        ends = jnp.asarray(self._ends or (NO_TOKEN,), jnp.int32)
        limit = jnp.int32(self._max_new_tokens)
        with compile_clock() as clock:
            began = time.perf_counter()
            progress = self._start(ends, limit)
            num_blocks = jnp.int32(-(-num_steps // refresh_interval(progress.state)))
            progress = self._take_over(progress)
            self._seconds[0] = time.perf_counter() - began - clock.seconds
            self._seconds[2] += clock.seconds
        yield max(map(len, self._tokens))
        while bool(progress.is_active.any()):
            with compile_clock() as clock:
                began = time.perf_counter()
                progress = decode_tokens(
                    model.params, progress, num_blocks, ends, limit,
                    config=model.config, sampling=sampling, impl=self._impl,
                )  # fmt: skip
                progress = self._take_over(progress)
                self._seconds[1] += time.perf_counter() - began - clock.seconds
                self._seconds[2] += clock.seconds
            yield max(map(len, self._tokens))
        self._usage = self._count_usage(progress)

    def _init_state(self) -> DecodeState:
        model = self._model
        return init_state(
            model.config, len(self._prompts), self._capacity,
            method=self._method, plan=self._plan, channels=self._channels, dtype=jnp.dtype(model.dtype),
        )  # fmt: skip

    def _start(self, ends: Array, limit: Array) -> Progress:
        model, B = self._model, len(self._prompts)
        tokens, lengths = pad_prompts(self._prompts)
        state = self._init_state()
        with tqdm(total=tokens.shape[1], desc="prefill", unit="token", leave=False, disable=None) as bar:
            logits, state = prefill(
                model.params, jnp.asarray(tokens), jnp.asarray(lengths), state, config=model.config, progress=bar.update
            )
        seen = None
        if self._sampling.repetition_penalty != 1.0:
            seen = np.zeros((B, model.config.vocab_size), bool)
            for row, prompt in enumerate(self._prompts):
                seen[row, prompt] = True
            seen = jnp.asarray(seen)
        progress = Progress(
            state=for_decoding(state),
            token=jnp.zeros((B,), jnp.int32),
            # Whole steps of 64, so that a slightly different limit does not compile anew.
            output=jnp.full((B, -(-self._max_new_tokens // 64) * 64), NO_TOKEN, jnp.int32),
            count=jnp.zeros((B,), jnp.int32),
            is_active=jnp.ones((B,), bool),
            seen=seen,
            keys=jnp.stack([jax.random.key(seed) for seed in self._seeds]),
            reads=jnp.zeros((B,), jnp.float32),
        )
        return take_token(logits, progress, ends, limit, sampling=self._sampling)

    def _take_over(self, progress: Progress) -> Progress:
        """Copies new tokens to the host and ends the rows whose text met a stop string."""
        output, count = np.asarray(progress.output), np.asarray(progress.count)
        for row, tokens in enumerate(self._tokens):
            if self.streams and self.streams[row].is_stopped:
                continue
            for token in output[row, len(tokens) : count[row]].tolist():
                tokens.append(token)
                if self.streams:
                    self.streams[row].push(token)
                    if self.streams[row].is_stopped:
                        break
        if not any(stream.is_stopped for stream in self.streams):
            return progress
        is_stopped = jnp.asarray([stream.is_stopped for stream in self.streams])
        return dataclasses.replace(progress, is_active=progress.is_active & ~is_stopped)

    def _count_usage(self, progress: Progress) -> ReadStatistics:
        config, shared = self._model.config, progress.state.method_state
        steps = np.asarray(progress.count, np.int64) - 1
        prompts = np.array([len(prompt) for prompt in self._prompts])
        num_steps = max(int(steps.sum()), 1)
        refreshes = chosen = np.zeros_like(steps)
        num_layers, num_lists = 0, 0
        if isinstance(shared, SharedLists):
            hshare = shared.config
            num_layers, num_lists = hshare.num_sparse_layers(config), hshare.num_lists(config)
            source = np.asarray(shared.source)
            is_own = source == np.arange(config.num_layers * num_lists).reshape(1, -1, num_lists)
            refreshes = -(-steps // hshare.refresh_interval)
            chosen = refreshes * is_own[:, hshare.dense_layers :].sum(axis=(1, 2))
        reads = np.asarray(progress.reads, np.float64)
        return ReadStatistics(
            reads=(reads / np.maximum(steps, 1)).tolist(),
            mean_reads=float(reads.sum()) / num_steps,
            mean_length=float((steps * prompts + steps * (steps + 1) / 2).sum()) / num_steps,
            refreshes=int(refreshes.sum()),
            selections=int(chosen.sum()),
            possible_selections=num_layers * num_lists * int(steps.sum()),
        )

    def pieces(self) -> Iterator[list[str]]:
        """Yields the new text of every row; returns the result."""
        shown = [0] * len(self.streams)
        for _ in self.steps(STREAM_STEPS):
            texts = [stream.text for stream in self.streams]
            if any(len(text) > size for text, size in zip(texts, shown, strict=True)):
                yield [text[size:] for text, size in zip(texts, shown, strict=True)]
                shown = [len(text) for text in texts]
        result = self.result()
        if any(len(text) > size for text, size in zip(result.texts, shown, strict=True)):
            yield [text[size:] for text, size in zip(result.texts, shown, strict=True)]
        return result

    def result(self) -> Generation:
        """Returns the generation, once `steps` has run out."""
        is_stopped = [stream.is_stopped for stream in self.streams] or [False] * len(self._tokens)
        return Generation(
            tokens=self._tokens,
            texts=[stream.finish() for stream in self.streams],
            finish_reasons=[
                "stop" if stopped or tokens[-1] in self._ends else "length"
                for stopped, tokens in zip(is_stopped, self._tokens, strict=True)
            ],
            timing=Timing(
                prompt_tokens=sum(len(prompt) for prompt in self._prompts),
                decoded_tokens=sum(len(tokens) - 1 for tokens in self._tokens),
                prefill_seconds=self._seconds[0],
                decode_seconds=self._seconds[1],
                compile_seconds=self._seconds[2],
            ),
            usage=self._usage,
        )
