"""Text becomes windows of tokens; which of them a step reads follows from the seed and the step's number alone."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from hshare_jax.evaluation.text_windows import encode_text


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """Windows of T + 1 tokens: of each the last T are predicted, and no window predicts another's token.

    Of neighbouring windows the first one's last token is the second one's first.
    """

    windows: Int[np.ndarray, "W T1"]  # a view of the token stream
    training_indices: Int[np.ndarray, "N"]  # into `windows`
    eval_indices: Int[np.ndarray, "E"]  # into `eval_windows`
    eval_windows: Int[np.ndarray, "W2 T1"]

    @property
    def sequence_length(self) -> int:
        """Returns T, the tokens that a window predicts."""
        return self.windows.shape[1] - 1

    @property
    def fingerprint(self) -> str:
        """Returns a short hash of every token and of which windows are held out."""
        digest = hashlib.sha256()
        for array in (self.windows, self.training_indices, self.eval_windows, self.eval_indices):
            digest.update(repr(array.shape).encode())
            for row in array:
                digest.update(np.ascontiguousarray(row, np.int64).tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int, *, batch_size: int, seed: int) -> Int[np.ndarray, "B T1"]:
        """Returns the windows that training step number `step`, from 0, reads."""
        places = step_places(step, batch_size=batch_size, num_windows=len(self.training_indices), seed=seed)
        return self.windows[self.training_indices[places]]

    def held_out(self) -> Int[np.ndarray, "E T1"]:
        """Returns the windows that are evaluated and never trained on."""
        return self.eval_windows[self.eval_indices]


def encode_files(tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | os.PathLike[str]]) -> Int[np.ndarray, "M"]:
    """Returns one stream of the token ids of all files, each followed by the end-of-text token.

    Args:
        tokenizer: its beginning-of-text token, if it writes one, comes before each file.
        paths: UTF-8 text files, in this order.

    Raises:
        ValueError: a file that is empty or not UTF-8, or a tokeniser without an end-of-text token.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("tokenizer has no end-of-text token to put between files; set its eos_token")
    parts = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
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
    """Returns the windows of a token stream, some held out for evaluation.

    # 11 tokens, sequence_length 3:  0 1 2 3 | 3 4 5 6 | 6 7 8 9, and 10 is left over

    Args:
        tokens: the stream.
        sequence_length: tokens that a window predicts.
        eval_fraction: the share of the windows that is held out, evenly spread; at least one, and not all.
        max_eval_windows: no more than so many are evaluated, nor held out.
        eval_tokens: a stream to evaluate on instead, its windows evenly spread; then nothing is held out.

    Raises:
        ValueError: too few tokens for a window to train on and one to evaluate on.
    """
    if max_eval_windows < 1:
        raise ValueError(f"max_eval_windows={max_eval_windows} must be at least 1")
    windows = _windows("tokens", tokens, sequence_length)
    everything = np.arange(len(windows))
    if eval_tokens is not None:
        others = _windows("eval_tokens", eval_tokens, sequence_length)
        return TrainingData(windows, everything, _spread(min(max_eval_windows, len(others)), len(others)), others)
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction} must lie between 0 and 1")
    if len(windows) < 2:
        raise ValueError(
            f"the text's {len(tokens)} tokens make one window of sequence_length={sequence_length}; one to train on "
            f"and one to evaluate on need {2 * sequence_length + 1} tokens"
        )
    count = min(max(round(eval_fraction * len(windows)), 1), len(windows) - 1, max_eval_windows)
    held_out = _spread(count, len(windows))
    return TrainingData(windows, np.setdiff1d(everything, held_out), held_out, windows)


def step_places(step: int, *, batch_size: int, num_windows: int, seed: int) -> Int[np.ndarray, "B"]:
    """Returns which of `num_windows` windows a step reads: the next ones of the epochs' orders laid end to end."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), num_windows)
    found = np.empty(batch_size, np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        is_its = epochs == epoch
        found[is_its] = epoch_order(num_windows, seed=seed, epoch=epoch)[places[is_its]]
    return found


@functools.lru_cache(maxsize=2)
def epoch_order(num_windows: int, *, seed: int, epoch: int) -> Int[np.ndarray, "N"]:
    """Returns the order of an epoch, a permutation; NumPy promises these random bits for all its versions."""
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_windows)
    return np.argsort(bits, kind="stable")


def _spread(count: int, size: int) -> Int[np.ndarray, "E"]:
    """Returns `count` different indices below `size`, evenly spread."""
    return (2 * np.arange(count) + 1) * size // (2 * count)


def _windows(name: str, tokens: np.ndarray, sequence_length: int) -> Int[np.ndarray, "W T1"]:
    if len(tokens) <= sequence_length:
        raise ValueError(
            f"{name} has {len(tokens)} tokens; a window of sequence_length={sequence_length} needs one more than that"
        )
    return np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
