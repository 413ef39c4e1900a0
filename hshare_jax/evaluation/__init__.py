"""Evaluation: the quality that a sparse method costs, measured by jitted loops of decode steps on real text.

`tasks` holds the tasks of `hshare-jax eval`, one class in one file each. `lm_eval_model` is the model class for
lm-evaluation-harness. Importing the package loads nothing else: each name below is imported when it is first used.
"""

from typing import TYPE_CHECKING

from hshare_jax.lazy import make_lazy

if TYPE_CHECKING:
    from hshare_jax.evaluation.bootstrap import interval, mean_ratio
    from hshare_jax.evaluation.likelihood import log_likelihoods
    from hshare_jax.evaluation.prefilled import Prefilled, prefill_for
    from hshare_jax.evaluation.recall import measure_recall, recall_of
    from hshare_jax.evaluation.results import read_results
    from hshare_jax.evaluation.tasks import TASKS
    from hshare_jax.evaluation.text_windows import Scorer, Window, cut_windows

_HOMES = {
    "bootstrap": ("interval", "mean_ratio"),
    "likelihood": ("log_likelihoods",),
    "prefilled": ("Prefilled", "prefill_for"),
    "recall": ("measure_recall", "recall_of"),
    "results": ("read_results",),
    "tasks": ("TASKS",),
    "text_windows": ("Scorer", "Window", "cut_windows"),
}

__all__ = [
    "TASKS",
    "Prefilled",
    "Scorer",
    "Window",
    "cut_windows",
    "interval",
    "log_likelihoods",
    "mean_ratio",
    "measure_recall",
    "prefill_for",
    "read_results",
    "recall_of",
]

make_lazy(__name__, _HOMES)
