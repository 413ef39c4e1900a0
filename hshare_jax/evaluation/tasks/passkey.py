"""Passkey: a number hidden in a long text, asked for at its end (Mohtashami and Jaggi, 2023, arXiv 2305.16300)."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from hshare_jax.decode_state import DecodeState, for_decoding
from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prompts import encode_text

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Passkey:
    """One text with its hidden number; the question stands apart, because it is decoded and not prefilled."""

    seed: int
    text: tuple[int, ...]
    question: tuple[int, ...]
    key: str
    depth: float  # where the number stands in the text, from 0 to 1

    @property
    def id(self) -> str:
        """Returns what tells it from others of its book."""
        return f"seed {self.seed}, {len(self.text) + len(self.question)} tokens"


def make_passkeys(
    tokenizer: PreTrainedTokenizerBase,
    book: str,
    context: int,
    seeds: Sequence[int],
    *,
    depth: float | None = None,
) -> list[Passkey]:
    """Returns a passkey for each seed: a stretch of the book, question included `context` tokens long.

    Stretch, number and depth are drawn by the seed, depths evenly from 0 to 1 unless one is given.

    Raises:
        ValueError: a book or a context too short.
    """
    filler, prefix = encode_text(tokenizer, book)
    question = tuple(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    passkeys = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        key = str(rng.integers(10_000, 100_000))
        needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False)["input_ids"]
        room = context - len(prefix) - len(needle) - len(question)
        if not 0 < room < len(filler):
            raise ValueError(
                f"context={context} must lie between {context - room + 1} tokens, for the number and its question, and "
                f"{len(filler) + context - room - 1}, for which the book has text"
            )
        start, where = int(rng.integers(0, len(filler) - room)), rng.random()
        where = where if depth is None else depth
        rest = filler[start : start + room]
        cut = round(where * room)
        text = (*prefix, *rest[:cut], *needle, *rest[cut:])
        passkeys.append(Passkey(seed, tuple(map(int, text)), question, key, float(where)))
    return passkeys


@functools.partial(jax.jit, static_argnames=("config", "impl"), donate_argnames=("state",))
def _ask(
    params: dict, question: Array, state: DecodeState, *, config: ModelConfig, impl: str
) -> tuple[Array, DecodeState]:
    B = question.shape[1]

    def step(carry: tuple[Array, DecodeState], given: Array) -> tuple[tuple[Array, DecodeState], Array]:
        token, state = carry
        token = jnp.where(given >= 0, given, token)
        logits, state = decode_step(params, token, state, config=config, impl=impl)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, state), token

    asked = jnp.concatenate([question, jnp.full((ANSWER_TOKENS - 1, B), -1, jnp.int32)])
    (_, state), tokens = lax.scan(step, (jnp.zeros((B,), jnp.int32), state), asked)
    return tokens[-ANSWER_TOKENS:], state


def ask(
    params: dict, question: Sequence[int], state: DecodeState, *, config: ModelConfig, impl: str = "auto"
) -> tuple[Int[np.ndarray, "B answer"], DecodeState]:
    """Returns (greedy answers to a question that decode steps read after every row's text, the state); one dispatch.

    The question is read by sparse steps: a method that chose its tokens before it cannot have known what is asked for.

    Args:
        params: the decoder's parameters.
        question: token ids.
        state: with the texts in it, and room for the question and `ANSWER_TOKENS` more; it is donated: use the
            returned one.
        config: the model.
        impl: as for `decode_step`.
    """
    B = state.cache.lengths.shape[0]
    asked = jnp.tile(jnp.asarray(question, jnp.int32)[:, None], (1, B))
    tokens, state = _ask(params, asked, for_decoding(state), config=config, impl=impl)
    return np.asarray(tokens).T, state


def read_passkeys(
    model: Model, passkeys: Sequence[Passkey], methods: Sequence[HShareSettings | Method | None]
) -> Prefilled:
    """Returns the texts of passkeys of one length, read densely once, from which any of `methods` may be asked."""
    tokens = jnp.asarray([passkey.text for passkey in passkeys], jnp.int32)
    lengths = jnp.full((len(passkeys),), tokens.shape[1], jnp.int32)
    capacity = tokens.shape[1] + len(passkeys[0].question) + ANSWER_TOKENS
    return prefill_for(model, tokens, lengths, capacity, methods)


def answer(
    model: Model,
    passkeys: Sequence[Passkey],
    prefilled: Prefilled,
    method: HShareSettings | Method | None,
    *,
    impl: str = "auto",
    **given: Any,
) -> list[str]:
    """Returns what a method answers to each of the passkeys that were read.

    Args:
        model, passkeys: as for `read_passkeys`, which returned `prefilled`.
        method: one of those that it was made for.
        impl: as for `decode_step`.
        given: a plan or channels, as for `Prefilled.start`.
    """
    assert model.tokenizer is not None
    state = prefilled.start(method, **given)
    tokens, state = ask(model.params, passkeys[0].question, state, config=model.config, impl=impl)
    prefilled.take_back(state)
    return list(map(str, model.tokenizer.batch_decode(tokens)))


def is_found(passkey: Passkey, answer: str) -> bool:
    """Returns whether the answer begins with the number; one that goes on with more digits is another number."""
    number = re.match(r"\s*(\d+)", answer)
    return number is not None and number[1] == passkey.key
