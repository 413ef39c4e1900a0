"""Passkeys: a number hidden in a long text, asked for at its end (Mohtashami and Jaggi, 2023, arXiv 2305.16300)."""

import dataclasses
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from hshare_jax.decode_state import DecodeState
from hshare_jax.decode_step import decode_step
from hshare_jax.errors import SettingError
from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
from hshare_jax.methods.base import Method
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prompts import encode_text

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER_TOKENS = 8

_OWN = -1  # stands for the token that the step before has chosen


@dataclasses.dataclass(frozen=True)
class Passkey:
    """A text with a hidden number. The question stands apart, because it is decoded and not prefilled."""

    seed: int
    text: tuple[int, ...]
    question: tuple[int, ...]
    key: str
    depth: float  # where the number stands in the text, from 0 to 1

    @property
    def id(self) -> str:
        """Tells the passkey from the other passkeys of the same book."""
        return f"seed {self.seed}, {len(self.text) + len(self.question)} tokens"


def make_passkeys(
    tokenizer: PreTrainedTokenizerBase,
    book: str,
    context: int,
    seeds: Sequence[int],
    *,
    depth: float | None = None,
) -> list[Passkey]:
    """A passkey for each seed, in a stretch of the book. Text and question are `context` tokens long together.

    The seed draws the stretch, the number and the depth. Depths are drawn evenly from 0 to 1, unless one is given.

    Raises:
        SettingError: a context that is too short for the number and its question, or longer than the book.
    """
    filler, prefix = encode_text(tokenizer, book)
    question = tuple(tokenizer(QUESTION, add_special_tokens=False)["input_ids"])
    passkeys = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        key = str(rng.integers(10_000, 100_000))
        needle = tokenizer(NEEDLE.format(key=key), add_special_tokens=False)["input_ids"]
        others = len(prefix) + len(needle) + len(question)  # tokens that are not the book's
        room = context - others
        if not 0 < room < len(filler):
            rule = (
                f"must lie between {others + 1} tokens, for the number and its question, and "
                f"{len(filler) + others - 1}, for which the book has text"
            )
            raise SettingError("context", context, rule)
        start, where = int(rng.integers(0, len(filler) - room)), rng.random()
        where = where if depth is None else depth
        rest = filler[start : start + room]
        cut = round(where * room)
        text = (*prefix, *rest[:cut], *needle, *rest[cut:])
        passkeys.append(Passkey(seed, tuple(map(int, text)), question, key, float(where)))
    return passkeys


def read_passkeys(
    model: Model, passkeys: Sequence[Passkey], methods: Sequence[Method | None], *, impl: str = "auto"
) -> Prefilled:
    """Reads the texts of passkeys of one length densely, once, so that any of `methods` may be asked."""
    tokens = jnp.asarray([passkey.text for passkey in passkeys], jnp.int32)
    lengths = jnp.full((len(passkeys),), tokens.shape[1], jnp.int32)
    capacity = tokens.shape[1] + len(passkeys[0].question) + ANSWER_TOKENS
    return prefill_for(model, tokens, lengths, capacity, methods, impl=impl)


def answer(
    model: Model,
    passkeys: Sequence[Passkey],
    prefilled: Prefilled,
    method: Method | None,
    *,
    impl: str = "auto",
) -> list[str]:
    """A method's answer to each of the passkeys.

    Args:
        model: from `load_model`.
        passkeys: the passkeys that `read_passkeys` read.
        prefilled: the result of `read_passkeys`.
        method: one of the methods that `prefilled` was made for.
        impl: as for `decode_step`.
    """
    assert model.tokenizer is not None
    state = prefilled.start(method)
    tokens, state = ask(model.params, passkeys[0].question, state, config=model.config, impl=impl)
    prefilled.take_back(state)
    return list(map(str, model.tokenizer.batch_decode(tokens)))


def ask(
    params: dict, question: Sequence[int], state: DecodeState, *, config: ModelConfig, impl: str = "auto"
) -> tuple[Int[np.ndarray, "B answer"], DecodeState]:
    """Greedy answers to a question that decode steps read after each row's text, and the last state, in one dispatch.

    The steps that read the question are sparse. A method that chose its tokens before the question could not know it.

    Args:
        params: the decoder's parameters.
        question: token ids.
        state: holds the texts, and has room for the question and `ANSWER_TOKENS` more. It is donated, so use the
            returned state.
        config: the model.
        impl: as for `decode_step`.
    """
    B = state.cache.lengths.shape[0]
    asked = jnp.tile(jnp.asarray(question, jnp.int32)[:, None], (1, B))
    tokens, state = _ask(params, asked, state, config=config, impl=impl)
    return np.asarray(tokens).T, state


@functools.partial(jax.jit, static_argnames=("config", "impl"), donate_argnames=("state",))
def _ask(
    params: dict, question: Array, state: DecodeState, *, config: ModelConfig, impl: str
) -> tuple[Array, DecodeState]:
    B = question.shape[1]

    def step(carry: tuple[Array, DecodeState], given: Array) -> tuple[tuple[Array, DecodeState], Array]:
        token, state = carry
        token = jnp.where(given == _OWN, token, given)
        logits, state = decode_step(params, token, state, config=config, impl=impl)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (token, state), token

    given = jnp.concatenate([question, jnp.full((ANSWER_TOKENS - 1, B), _OWN, jnp.int32)])
    (_, state), tokens = lax.scan(step, (jnp.zeros((B,), jnp.int32), state), given)
    return tokens[-ANSWER_TOKENS:], state


def is_found(passkey: Passkey, answer: str) -> bool:
    """Whether the answer begins with the number. A number with more digits behind it is another number."""
    number = re.match(r"\s*(\d+)", answer)
    return number is not None and number[1] == passkey.key
