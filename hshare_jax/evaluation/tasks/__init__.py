"""The evaluation tasks: one class in one file for each, and the table that the command line reads.

To add a task, write a class like `gsm8k.GSM8K` or `passkey.PasskeyRetrieval` in a new file, and add it to `TASKS`.
"""

from hshare_jax.evaluation.tasks.base import Task
from hshare_jax.evaluation.tasks.coqa import CoQA
from hshare_jax.evaluation.tasks.gsm8k import GSM8K
from hshare_jax.evaluation.tasks.longbench import LongBench
from hshare_jax.evaluation.tasks.passkey import PasskeyRetrieval
from hshare_jax.evaluation.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {task.name: task for task in (GSM8K, CoQA, LongBench, PasskeyRetrieval, Perplexity)}

__all__ = ["GSM8K", "TASKS", "CoQA", "LongBench", "PasskeyRetrieval", "Perplexity", "Task"]
