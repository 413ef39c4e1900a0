"""TrainingSettings: everything that shapes a training run, except the model and the text.

The text beside each setting is the help of the setting's command-line option.
"""

import dataclasses
import math
from typing import Literal

from hshare_jax.errors import SettingError, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training run. The names are as in nanoGPT and in transformers' Trainer where the two agree.

    The last step of a run is always logged, evaluated and written as a checkpoint.

    Raises:
        SettingError: a setting has a value that cannot be used.
    """

    sequence_length: int = setting(1024, "tokens that a window predicts")
    batch_size: int = setting(32, "windows of an optimiser step, over all devices and micro-batches")
    accumulation_steps: int = setting(1, "micro-batches that a step is cut into; one at a time is in memory")
    num_steps: int = setting(1000, "optimiser steps of the whole run; the learning rate falls until the last")
    learning_rate: float = setting(6e-4, "peak learning rate, reached at the end of the warm-up")
    warmup_steps: int = setting(100, "steps of linear warm-up")
    min_learning_rate_ratio: float = setting(0.1, "learning rate at the end of the run, as a share of the peak")
    weight_decay: float = setting(0.1, "weight decay of AdamW, for matrices only, not for norms and biases")
    beta1: float = setting(0.9, "decay rate of AdamW's mean of gradients")
    beta2: float = setting(0.95, "decay rate of AdamW's mean of squared gradients")
    max_grad_norm: float = setting(1.0, "scale gradients of a larger norm down to this norm; 0 switches this off")
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the forward and backward pass, float32 or bfloat16; parameters are always float32"
    )
    seed: int = setting(0, "seed of the order of the windows, and of random weights")
    log_every: int = setting(10, "steps between two lines of metrics")
    eval_every: int = setting(250, "steps between two evaluations")
    checkpoint_every: int = setting(250, "steps between two checkpoints")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints are kept")

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
        rule, reason = "must be one of float32, bfloat16", "float16 would need its losses scaled"
        self._check("compute_dtype", self.compute_dtype in ("float32", "bfloat16"), rule, reason)
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
