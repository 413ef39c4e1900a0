"""TrainingSettings: everything that shapes a training run, except the model and the text."""

import dataclasses
import math
from typing import Literal, get_args

from hshare_jax.errors import SettingError

ComputeDType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training run. Their names are those of nanoGPT and of transformers' Trainer where the two agree.

    Attributes:
        sequence_length: tokens that a window predicts.
        batch_size: windows of one optimiser step, counted over all devices and micro-batches.
        accumulation_steps: micro-batches that a step is cut into. Only one micro-batch is in memory at a time.
        num_steps: optimiser steps of the whole run. The learning rate reaches its minimum at the end of the run.
        learning_rate: the peak of the learning rate, reached at the end of the warm-up.
        warmup_steps: steps of linear warm-up. The first step's learning rate is above 0.
        min_learning_rate_ratio: the learning rate at the end of the cosine, as a share of the peak.
        weight_decay: weight decay of AdamW. It applies to matrices only, not to norms and biases.
        beta1: decay rate of AdamW's mean of gradients.
        beta2: decay rate of AdamW's mean of squared gradients.
        max_grad_norm: gradients with a larger norm over all parameters are scaled down to it; 0 switches this off.
        compute_dtype: dtype of the forward and backward pass. Parameters and optimiser state are always float32.
        seed: seed of the order of the windows.
        log_every: steps between two lines of metrics.
        eval_every: steps between two evaluations. The last step is always followed by an evaluation.
        checkpoint_every: steps between two checkpoints. The last step is always followed by a checkpoint.
        keep_checkpoints: how many checkpoints are kept, the newest ones.

    Raises:
        SettingError: a setting has a value that cannot be used.
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
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check(
            "batch_size", self.batch_size % self.accumulation_steps == 0, "must be a multiple of {accumulation_steps}",
            "micro-batches are equally large", others=("accumulation_steps",),
        )  # fmt: skip
        is_warmup = 0 <= self.warmup_steps < self.num_steps
        self._check("warmup_steps", is_warmup, "must lie in [0, {num_steps})", others=("num_steps",))
        self._check("learning_rate", 0 < self.learning_rate < math.inf, "must be positive and finite")
        self._check("min_learning_rate_ratio", 0 <= self.min_learning_rate_ratio <= 1, "must lie in [0, 1]")
        for name in ("weight_decay", "max_grad_norm"):
            is_usable = 0 <= getattr(self, name) < math.inf
            self._check(name, is_usable, "must be finite and at least 0, which switches it off")
        for name in ("beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "must lie in [0, 1)")
        dtypes = get_args(ComputeDType)
        self._check(
            "compute_dtype", self.compute_dtype in dtypes, f"must be one of {', '.join(dtypes)}",
            "float16 would need its losses scaled",
        )  # fmt: skip
        self._check("seed", 0 <= self.seed < 2**63, "must lie in [0, 2**63)")

    def _check(self, name: str, is_met: bool, rule: str, way_out: str = "", others: tuple[str, ...] = ()) -> None:
        """Raises SettingError where the rule for a setting is not met."""
        if not is_met:
            mentioned = {other: getattr(self, other) for other in others}
            raise SettingError(name, getattr(self, name), rule, way_out, mentioned)

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens that one optimiser step predicts."""
        return self.batch_size * self.sequence_length
