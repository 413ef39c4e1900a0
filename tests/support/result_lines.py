"""Lines of results files, as studies and evaluations write them."""

import json
from pathlib import Path
from typing import Any


def text_line(name: str, budget: int, reads: float, divergence: Any, context: int = 1024) -> dict[str, Any]:
    return {
        "kind": "text", "context": context, "budget": budget, "name": name, "reads": reads, "divergence": divergence,
    }  # fmt: skip


def speed_line(name: str, budget: int, milliseconds: float, batch: int = 8) -> dict[str, Any]:
    return {
        "kind": "speed", "context": 1024, "budget": budget, "name": name, "batch": batch, "milliseconds": milliseconds,
    }  # fmt: skip


STUDY = {"model": "tiny", "texts": ["a.txt"], "steps": 256, "seeds": 50}
EVAL = {
    "task": "perplexity", "model": "tiny", "data": ["a.txt"], "batch_size": 8, "context": "512",
    "settings": {
        "num_sinks": "8", "num_critical": "88", "num_recent": "32", "plan_kind": "units", "layer_ratio": "1/2",
        "head_ratio": "1", "refresh_interval": "1",
    },
}  # fmt: skip
# The same run, as earlier versions wrote it.
EARLIER = EVAL | {"settings": {"plan" if name == "plan_kind" else name: v for name, v in EVAL["settings"].items()}}


def eval_line(method: str, divergence: float, window: str = "a.txt:0", **changes: object) -> dict[str, Any]:
    scores = {"loss": 2.0, "divergence": divergence}
    return {
        "id": window,
        "method": method,
        "task": "perplexity",
        "steps": 64,
        "reads": 140.0,
        "scores": scores,
    } | changes


def write(path: Path, *lines: dict[str, Any], end: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path
