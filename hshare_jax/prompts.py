"""Prompts, texts or token ids, become one padded batch and the cache that it and its answers need."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, ModelFiles
from hshare_jax.shapes import round_up_coarsely

Prompt = str | Sequence[int]


def encode_prompts(model: Model | ModelFiles, prompts: Sequence[Prompt], *, name: str = "prompts") -> list[list[int]]:
    """Returns the token ids of prompts, checked. A text is encoded with the tokenizer's special tokens.

    `name` is the argument that errors speak of.
    """
    if isinstance(prompts, str) or len(prompts) == 0 or isinstance(prompts[0], int):
        raise ValueError(f"{name}={prompts!r} must be a sequence of at least one prompt; put a single one in a list")
    encoded = []
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError(f"{name}[{row}] is text, but the model has no tokenizer; give token ids")
            prompt = model.tokenizer(prompt)["input_ids"]
        ids = [int(token) for token in prompt]
        if not ids:
            raise ValueError(f"{name}[{row}] is empty; it must hold at least one token")
        if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            outside = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"{name}[{row}] holds token id {outside}; ids must lie in [0, vocab_size={model.config.vocab_size})"
            )
        encoded.append(ids)
    return encoded


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Returns (the token ids of a text alone, those that must come before every stretch of it: <s>, or none)."""
    ids, first = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer("")["input_ids"][:1]
    return list(ids), list(first) if first == [tokenizer.bos_token_id] else []


def pad_prompts(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens [B, T], lengths [B]), int32, padded on the right with token 0."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, lengths


def choose_capacity(config: ModelConfig, prompts: list[list[int]], max_new_tokens: int, capacity: int | None) -> int:
    """Returns the cache slots that a generation needs, in coarse steps unless told; ValueError where it cannot fit."""
    longest = max(range(len(prompts)), key=lambda row: len(prompts[row]))
    needed = len(prompts[longest]) + max_new_tokens
    if needed > config.max_positions:
        raise ValueError(
            f"prompts[{longest}] has {len(prompts[longest])} tokens; with max_new_tokens={max_new_tokens} that is "
            f"beyond the model's {config.max_positions} positions; shorten either"
        )
    if capacity is None:
        return min(round_up_coarsely(needed, 256), config.max_positions)
    if capacity > config.max_positions:
        raise ValueError(f"capacity={capacity} must be at most the model's max_positions={config.max_positions}")
    if capacity < needed:
        raise ValueError(
            f"capacity={capacity} must be at least {needed}: prompts[{longest}] and max_new_tokens together"
        )
    return capacity
