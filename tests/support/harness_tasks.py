"""Tasks for lm-evaluation-harness that need local files only."""

import functools
import json
from pathlib import Path

import lm_eval.tasks
import pytest


def write_tasks(
    folder: Path, tasks: dict[str, str], documents: list[dict], monkeypatch: pytest.MonkeyPatch
) -> lm_eval.tasks.TaskManager:
    """Writes tasks and their documents, and returns a manager that finds only these tasks.

    Args:
        folder: where files are written.
        tasks: each task's settings in YAML, by name.
        documents: the documents of every task.
        monkeypatch: keeps lm-evaluation-harness from reading anything else.
    """
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # so that the value is restored
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "tasks").mkdir()
    dataset = json.dumps({"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")})
    for name, settings in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {dataset}\ntest_split: test\nnum_fewshot: 0\n{settings}"
        )
    # The hundreds of tasks that come with lm-evaluation-harness are left out, because reading them takes seconds.
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    return own(include_path=str(folder / "tasks"))
