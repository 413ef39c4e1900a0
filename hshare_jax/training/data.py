"""Text becomes windows of tokens. The seed and a step's number alone decide which windows the step reads."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from hshare_jax.errors import SettingError
from hshare_jax.files.texts import read_text
from hshare_jax.prompts import encode_text


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Windows of T + 1 tokens, of which the last T are predicted. No token is predicted by two windows.

    The last token of a window is also the first token of the next window.
    """

    windows: Int[np.ndarray, "W T1"]  # a view of the token stream
    training_indices: Int[np.ndarray, "N"]  # into `windows`
    eval_indices: Int[np.ndarray, "E"]  # into `eval_windows`
    eval_windows: Int[np.ndarray, "W2 T1"]

    @property
    def sequence_length(self) -> int:
        """T, the number of tokens that a window predicts."""
        return self.windows.shape[1] - 1

    @property
    def fingerprint(self) -> str:
        """A short hash of all tokens and of the choice of held-out windows."""
        digest = hashlib.sha256()
        for array in (self.windows, self.training_indices, self.eval_windows, self.eval_indices):
            digest.update(repr(array.shape).encode())
            for row in array:
                digest.update(np.ascontiguousarray(row, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int, *, batch_size: int, seed: int) -> Int[np.ndarray, "B T1"]:
        """The windows that training step `step` reads. The first step is step 0."""
        places = step_places(step, batch_size=batch_size, num_windows=len(self.training_indices), seed=seed)
        return self.windows[self.training_indices[places]]

    def held_out(self) -> Int[np.ndarray, "E T1"]:
        """The windows that are evaluated and never trained on."""
        return self.eval_windows[self.eval_indices]


def encode_files(tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | os.PathLike[str]]) -> Int[np.ndarray, "M"]:
    """The token ids of all files as one stream, with the end-of-text token after each file.

    Args:
        tokenizer: the model's tokenizer. If it writes a beginning-of-text token, that token comes before each file.
        paths: UTF-8 text files, in this order.

    Raises:
        ValueError: a file is empty or not UTF-8, or the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("tokenizer has no end-of-text token to put between files; set its eos_token")
    parts = []
    for path in map(Path, paths):
        text = read_text(path)
        if not text.strip():
            raise ValueError(f"{path} is empty")
        ids, prefix = encode_text(tokenizer, text)
        parts.append(np.array([*prefix, *ids, end], np.int32))
    return np.concatenate(parts)


def split_windows(
    tokens: Int[np.ndarray, "M"],
    sequence_length: int,
    *,
    eval_fraction: float = 0.01,
    max_eval_windows: int = 128,
    eval_tokens: Int[np.ndarray, "M2"] | None = None,
) -> TrainingData:
    """Cuts a token stream into windows and holds some windows out for evaluation.

    # 11 tokens, sequence_length 3:  0 1 2 3 | 3 4 5 6 | 6 7 8 9, and 10 is left over

    Args:
        tokens: the stream.
        sequence_length: tokens that a window predicts.
        eval_fraction: the share of the windows that is held out, evenly spread. At least one window is held out, and
            at least one is trained on.
        max_eval_windows: the most windows that are held out.
        eval_tokens: another stream to evaluate on. Evenly spread windows of it are evaluated, and all windows of
            `tokens` are trained on.

    Raises:
        SettingError: `eval_fraction` or `max_eval_windows` cannot be used, or the text is too short to give a window to
            train on and a window to evaluate on.
    """
    check_eval_windows(eval_fraction, max_eval_windows)
    windows = _windows("text", tokens, sequence_length)
    everything = np.arange(len(windows))
    if eval_tokens is not None:
        others = _windows("evaluation text", eval_tokens, sequence_length)
        return TrainingData(windows, everything, _spread(min(max_eval_windows, len(others)), len(others)), others)
    if len(windows) < 2:
        raise SettingError(
            "sequence_length", sequence_length, f"makes one window of the text's {len(tokens)} tokens",
            f"one to train on and one to evaluate on need {2 * sequence_length + 1} tokens",
        )  # fmt: skip
    count = min(max(round(eval_fraction * len(windows)), 1), len(windows) - 1, max_eval_windows)
    held_out = _spread(count, len(windows))
    return TrainingData(windows, np.setdiff1d(everything, held_out), held_out, windows)


def check_eval_windows(eval_fraction: float, max_eval_windows: int) -> None:
    """Raises SettingError for a share or a number of windows that `split_windows` cannot hold out."""
    if not 0 < eval_fraction < 1:
        raise SettingError("eval_fraction", eval_fraction, "must lie between 0 and 1")
    if max_eval_windows < 1:
        raise SettingError("max_eval_windows", max_eval_windows, "must be at least 1")


def step_places(step: int, *, batch_size: int, num_windows: int, seed: int) -> Int[np.ndarray, "B"]:
    """The windows that a step reads, as indices below `num_windows`.

    Every epoch has an order of all windows. The orders of the epochs are laid end to end, and each step takes the next
    `batch_size` windows.
    """
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_windows)
    found = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        is_in_epoch = epochs == epoch
        found[is_in_epoch] = epoch_order(num_windows, seed=seed, epoch=epoch)[places[is_in_epoch]]
    return found


@functools.lru_cache(maxsize=2)
def epoch_order(num_windows: int, *, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
    """The order of the windows in an epoch, a permutation. NumPy guarantees the same random bits in all versions."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_windows)
    return np.argsort(bits, kind="stable")


def _spread(count: int, size: int) -> Int[np.ndarray, "E"]:
    """`count` different indices below `size`, evenly spread."""
    return (2 * np.arange(count) + 1) * size // (2 * count)


def _windows(name: str, tokens: np.ndarray, sequence_length: int) -> Int[np.ndarray, "W T1"]:
    if len(tokens) <= sequence_length:
        rule = f"must be less than the {name}'s {len(tokens)} tokens"
        raise SettingError("sequence_length", sequence_length, rule, "a window needs one token more than it predicts")
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
