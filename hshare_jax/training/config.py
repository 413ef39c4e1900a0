"""TrainingConfig: everything that shapes a training run but the model and the text."""

import dataclasses
import math
from typing import Literal, get_args

ComputeDType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a training run; names are those of nanoGPT and of transformers' Trainer where these agree on one.

    Attributes:
        sequence_length: tokens that a window predicts.
        batch_size: windows of one optimiser step, over all devices and micro-batches.
        accumulation_steps: micro-batches that a step is cut into; only one is in memory at a time.
        num_steps: optimiser steps of the whole run; the learning rate ends with them.
        learning_rate: its peak, at the end of the warm-up.
        warmup_steps: steps of linear warm-up, the first of them above 0.
        min_learning_rate_ratio: where the cosine ends, as a share of the peak.
        weight_decay: of AdamW, on matrices alone: norms and biases have none.
        beta1: AdamW's memory of gradients.
        beta2: AdamW's memory of their squares.
        max_grad_norm: gradients are scaled down to this norm over all parameters; 0 leaves them.
        compute_dtype: of the forward and backward pass; parameters and optimiser state are float32 in any case.
        seed: of the order of the windows.
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations; the last step is followed by one in any case.
        checkpoint_every: steps between two checkpoints; the last step is followed by one in any case.
        keep_checkpoints: how many of the newest stay.
    """

    sequence_length: int = 1024
    batch_size: int = 32
    accumulation_steps: int = 1
    num_steps: int = 1000
    learning_rate: float = 6e-4
    warmup_steps: int = 100
    min_learning_rate_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    compute_dtype: ComputeDType = "float32"
    seed: int = 0
    log_every: int = 10
    eval_every: int = 250
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in (
            "sequence_length", "batch_size", "accumulation_steps", "num_steps", "log_every", "eval_every",
            "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps={self.accumulation_steps}: "
                "micro-batches are equally large"
            )
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must lie in [0, num_steps={self.num_steps})")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ValueError(f"min_learning_rate_ratio={self.min_learning_rate_ratio} must lie in [0, 1]")
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0, which switches it off")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.compute_dtype not in get_args(ComputeDType):
            raise ValueError(
                f"compute_dtype={self.compute_dtype!r} must be one of {', '.join(get_args(ComputeDType))}: "
                "float16 would need its losses scaled"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**63)")

    @property
    def tokens_per_step(self) -> int:
        """Returns the tokens that one optimiser step predicts."""
        return self.batch_size * self.sequence_length
