"""Prompts: texts, chats or token ids become one padded batch, and the cache capacity that batch and answers need."""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hshare_jax.errors import SettingError, check_whole
from hshare_jax.files.texts import check_text
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, ModelFiles
from hshare_jax.shapes import round_up_coarsely

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int]


def encode_prompts(model: Model | ModelFiles, prompts: Sequence[Prompt], *, name: str = "prompts") -> list[list[int]]:
    """Token ids of prompts, checked. A text is encoded with the tokenizer's special tokens.

    Args:
        model: the model; its tokenizer encodes texts, and ids must lie in its vocabulary.
        prompts: texts or token ids.
        name: the argument that errors speak of.

    Raises:
        ValueError: no prompt, an empty prompt, a text without a tokenizer or that is not Unicode, ids that are not
            whole numbers, or an id outside the vocabulary.
    """
    is_batch = hasattr(prompts, "__len__") and not isinstance(prompts, str | bytes)
    if not is_batch or len(prompts) == 0 or isinstance(prompts[0], int):
        raise ValueError(f"{name}={prompts!r} must be a sequence of at least one prompt; put a single one in a list")
    encoded = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError(f"{name}[{row}] is text, but the model has no tokenizer; give token ids")
            prompt = tokenize(model.tokenizer, prompt, name=f"{name}[{row}]")
        ids = _whole_numbers(prompt, f"{name}[{row}]")
        if not ids:
            raise ValueError(f"{name}[{row}] is empty; it must hold at least one token")
        check_ids(f"{name}[{row}]", ids, model.config)
        encoded.append(ids)
    return encoded


def check_ids(name: str, ids: Sequence[int], config: ModelConfig) -> None:
    """Raises ValueError, which names the ids, if one of them is outside the vocabulary."""
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        outside = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(f"{name} holds token id {outside}; ids must lie in [0, vocab_size={config.vocab_size})")


def _whole_numbers(ids: Sequence[int], name: str) -> list[int]:
    """Token ids as a list of int; ValueError for anything that would have to be rounded or decoded first."""
    try:
        if isinstance(ids, bytes | bytearray):  # a sequence of whole numbers, but never of token ids
            raise TypeError("bytes are no token ids")
        return [operator.index(token) for token in ids]
    except TypeError as error:
        raise ValueError(f"{name} must be a str or a sequence of token ids, whole numbers: {error}") from error


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, name: str = "text", add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a text. Every text that comes from outside is encoded here.

    Raises:
        ValueError: the text is not Unicode; `name` says whose text it is.
    """
    check_text(text, name)
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and lengths [B], int32, padded on the right with token 0.

    Take them to the device by `jax.device_put`, because `jnp.asarray` compiles a program for every length.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def choose_capacity(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int, capacity: int | None) -> int:
    """The cache slots that a generation needs: `capacity`, or as many as needed in coarse steps.

    Raises:
        ValueError: prompts and answers that do not fit into the capacity or the model's positions.
    """
    if capacity is not None:
        check_whole("capacity", capacity, 1)
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    needed = len(prompts[longest]) + max_new_tokens
    if needed > config.max_positions:
        rule = (
            f"is too much after the {len(prompts[longest])} tokens of prompts[{longest}]: together they are beyond the "
            f"model's {config.positions_told}; shorten either"
        )
        raise SettingError("max_new_tokens", max_new_tokens, rule)
    if capacity is None:
        return min(round_up_coarsely(needed, 256), config.max_positions)
    if capacity > config.max_positions:
        rule = f"must be at most the model's max_positions={config.max_positions}"
        raise SettingError("capacity", capacity, rule)
    if capacity < needed:
        rule = f"must be at least {needed}: prompts[{longest}] and max_new_tokens together"
        raise SettingError("capacity", capacity, rule)
    return capacity


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text without special tokens, and the ids that must precede any stretch of it (<s>, or none)."""
    ids, first = tokenize(tokenizer, text, add_special_tokens=False), tokenize(tokenizer, "")[:1]
    return ids, first if first == [tokenizer.bos_token_id] else []


def encode_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, up to where the answer begins.

    The template writes the special tokens itself, so the tokenizer adds none.

    Args:
        tokenizer: one with a chat template.
        messages: with keys "role" and "content".

    Raises:
        ValueError: the template refuses the conversation, because some templates know no system message; a text is not
            Unicode; or there are several templates and none of them is the default.
    """
    from jinja2 import TemplateError

    for index, message in enumerate(messages):
        if isinstance(content := message.get("content"), str):  # else parts, or nothing beside calls of tools
            check_text(content, f"messages[{index}]")
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ValueError(
            f"the tokenizer has chat templates called {', '.join(sorted(templates))}, and none is called default; call "
            "one of them so"
        )
    copies = [dict(message) for message in messages]
    # A template is a program. It refuses with a TemplateError, and its mistakes are Python's errors.
    mistakes = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
    try:
        text = tokenizer.apply_chat_template(copies, add_generation_prompt=True, tokenize=False)
    except (TemplateError, *mistakes) as error:
        raise ValueError(f"the chat template refuses: {error}") from error
    return tokenize(tokenizer, str(text), add_special_tokens=False)
