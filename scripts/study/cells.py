"""The subjects of the studies: methods by name, each at several budgets, and the texts, windows and passkeys."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

from hshare_jax.evaluation.passkeys import Passkey, make_passkeys
from hshare_jax.evaluation.text_windows import Window, cut_windows
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.registry import method_named
from hshare_jax.models.pretrained import Model

SKIP = 0.25  # share of a text that is left out at its beginning: title pages and licences
BUDGETS = {64: (4, 44, 16), 128: (8, 88, 32), 256: (8, 200, 48), 512: (16, 432, 64)}  # sinks, critical, recent
RATIOS = ("7/8-3/4-1/2", "3/4-3/4-1/2", "1/2-1/2-1/2")
# What follows a method's name, after a comma: settings other than its defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "tail": {"tail": "fitted"},
    "no tail": {"tail": None},
    "layer 0 dense": {"dense_layers": 1},
    "pools of 2": {"pool": 2},
    "pools of 4": {"pool": 4},
    "a list a head": {"lists_per": "query_head"},
}
OURS = (
    "hshare 1-1-1", "hshare 1/2-1-1", "hshare 1/2-1-1, layer 0 dense", "hshare 1/2-1-1, no tail",
    "hshare 1/2-1-1, pools of 2", "hshare 1/2-1-1, a list a head", "hshare 1/3-1-1", "hshare 1/8-1-1",
    "hshare 1/8-1-1, pools of 4",
)  # fmt: skip
SIMPLER = ("streaming_llm", "h2o", "quest", "quest_window", "snapkv", "snapkv_fixed")  # no labels, no plan
NAMES = (
    "dense", "exact_topk", "exact_topk, tail", "double_sparsity", "double_sparsity, tail", *OURS,
    *(f"published {ratio}" for ratio in RATIOS), *SIMPLER,
)  # fmt: skip
PLANS = ("anchors 1/2-1-1", "anchors 1/3-1-1", "calibrated 1/2-1-1", "calibrated 1/3-1-1")
DEFAULT = "hshare 1/2-1-1"
WINDOWS = 8  # scored together
PASSKEY_CONTEXT, PASSKEY_BUDGET, PASSKEY_BATCH = 1024, 128, 25
ROOM = 256  # decode steps that SnapKV makes room for


def ours(budget: int, ratio: str = "1-1-1", **settings: object) -> HShare:
    """The package's defaults at a budget and ratio."""
    return _spend(budget, ratio, HShare(), **settings)


def published(budget: int, ratio: str, **settings: object) -> HShare:
    """The published method at a budget and ratio, with layer 0 dense and bounded probes unless told otherwise."""
    default = HShare()
    alike = {"num_probes": default.search.num_probes, "dense_layers": 1}
    return _spend(budget, ratio, HShare.paper(), **alike | settings)


def _spend(budget: int, ratio: str, method: HShare, **settings: object) -> HShare:
    split = dict(zip(("num_sinks", "num_critical", "num_recent"), BUDGETS[budget], strict=True))
    # No length gate: short rows are sparse too, because the studies ask what sparsity costs there.
    return method.with_sharing_ratio(ratio).with_settings(split | {"min_length": 0} | settings)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one budget and context."""

    context: int
    budget: int
    name: str

    @property
    def method(self) -> Method | None:
        """The method. Layer 0 is dense in all methods without tails."""
        name, _, variant = self.name.partition(", ")
        kind, _, ratio = name.partition(" ")
        settings = VARIANTS[variant]
        if kind in ("hshare", "calibrated"):
            return ours(self.budget, ratio, **settings)
        if kind == "anchors":
            return ours(self.budget, ratio, plan_kind="anchors")
        if kind == "published":
            return published(self.budget, ratio)
        method = method_named(name, ours(self.budget), max_new_tokens=ROOM)
        return method.with_settings(settings) if isinstance(method, HShare) else method

    def begin_line(self, kind: str) -> dict[str, Any]:
        """The fields of a line that tell what is measured, when and with what."""
        versions = f"jax {jax.__version__}, Python {platform.python_version()}"
        made = f"{date.today()}, {versions}, {jax.devices()[0].device_kind}"
        return {"kind": kind, **dataclasses.asdict(self), "settings": repr(self.method), "made": made}


def all_cells(context: int, budgets: tuple[int, ...]) -> list[Cell]:
    """The cells of all methods at these budgets."""
    return [Cell(context, budget, name) for budget in budgets for name in NAMES]


def read_text(path: Path) -> str:
    """A file's text. The text of a .jsonl file is the field `prompt` of all its lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["prompt"] for line in text.splitlines() if line.strip())
    return text


def read_texts(parser: argparse.ArgumentParser, paths: Sequence[Path]) -> dict[str, str]:
    """Texts by their files' names; a usage error where windows cannot be spread evenly over them."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        parser.error("--text names two files of one name, which results could not tell apart; rename one")
    if WINDOWS % len(names):
        parser.error(f"--text names {len(names)} files; {WINDOWS} windows must divide evenly among them")
    return {path.name: read_text(path) for path in paths}


def hash_text(text: str) -> str:
    """A short hash that tells a text from another text of the same name."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def windows_of(model: Model, texts: dict[str, str], context: int, per_text: int | None = None) -> list[Window]:
    """The windows of one context, `per_text` from each text; None: `WINDOWS` in all.

    The first window of each text is left out, because the tail's form was chosen on it.
    """
    count = 1 + (per_text or WINDOWS // len(texts))
    by_text = (cut_windows(model, *text, context=context, count=count, skip=SKIP) for text in texts.items())
    return list(itertools.chain.from_iterable(windows[1:] for windows in by_text))


def beginnings(texts: dict[str, str]) -> list[str]:
    """The part of each text that precedes all windows, to calibrate on."""
    return [text[: int(len(text) * SKIP)] for text in texts.values()]


def hide_passkeys(model: Model, book: str, seeds: int) -> list[Passkey]:
    """Numbers hidden in a book, in the part that windows are cut from too."""
    assert model.tokenizer is not None
    return make_passkeys(model.tokenizer, book[int(len(book) * SKIP) :], PASSKEY_CONTEXT, range(seeds))
