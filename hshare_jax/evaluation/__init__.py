"""Evaluation: what a sparse method costs in quality, measured by jitted loops of decode steps on real text.

The tasks are modules of their own (`gsm8k`, `coqa`, `longbench`, `passkey`), and so is the model class for
lm-evaluation-harness (`lm_eval_model`).
"""

from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from hshare_jax.evaluation.likelihood import log_likelihoods
from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
from hshare_jax.evaluation.recall import measure_recall, recall_of
from hshare_jax.evaluation.text_windows import Scorer, Window, cut_windows
from hshare_jax.files.records import Records
from hshare_jax.methods.registry import METHODS, method_named

__all__ = [
    "METHODS",
    "Prefilled",
    "Records",
    "Scorer",
    "Window",
    "cut_windows",
    "interval",
    "log_likelihoods",
    "mean_ratio",
    "measure_recall",
    "method_named",
    "prefill_for",
    "recall_of",
]
