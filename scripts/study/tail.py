"""Measures what the tail gains on real text, beside exact top-k and at equal reads; writes docs/tail-tables.md.

Methods are compared with dense decoding, step by step, as in scripts/study/quality.py, but on other windows: the tail's
form was chosen on the first window of each text, so the study takes two later ones. Lists are shortened by what the
virtual tokens weigh, so that all methods of a table read as many tokens. Each finished row is a line of the results
file and is not measured again.

    python -m scripts.study.tail --text A.txt B.txt C.txt D.txt --results tail.jsonl --report docs/tail-tables.md
"""

import argparse
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from hshare_jax.evaluation.passkeys import NEEDLE, QUESTION
from hshare_jax.evaluation.text_windows import Scorer, Window, cut_windows
from hshare_jax.files.records import Records
from hshare_jax.generate import generate
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.registry import method_named
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.sampling_params import SamplingParams
from scripts.study.cells import BUDGETS, SKIP, hash_text, hide_passkeys, ours, published, read_texts
from scripts.study.quality import count_found
from scripts.study.reports import command, made_with, write_report

MARK = "<!-- The text below is written by scripts/study/tail.py. -->"
CELLS = ("512/4096", "128/4096", "512/8192", "512/hard", "512/long", "512/written")  # budget/context
OTHER_CELLS = {
    "hard": "on hard windows",
    "long": "one window of each text, 2,048 steps after 2,048 tokens",
    "written": "2,048 steps over what the model wrote after 2,048 tokens of each text",
}
HARD_CONTEXT = 4096  # tokens of the windows of "hard", which a tail was not made for
LONG_PROMPT, LONG_STEPS, STRETCH = 2048, 2048, 512
PER_TEXT = 2  # windows
BASE = "no tail, layer 0 dense"
LONG = (BASE, "the default", "the default, never refitted")  # the rows of "long" and "written"


def methods(budget: int, config: ModelConfig) -> Iterator[tuple[str, Method]]:
    """Yields (name, method) at a budget, the most important first; virtual tokens are part of the budget."""
    listed, heads = BUDGETS[budget][1], config.num_heads // config.num_kv_heads

    def method(ratio: str = "1/2-1-1", **settings: Any) -> HShare:
        whole = ours(budget, ratio, **settings)
        if whole.settings.tail is None:
            return whole
        rank, per_list = whole.settings.tail_rank, heads if whole.settings.lists_per == "kv_head" else 1
        virtual = math.ceil(per_list * (1 + rank + (6 + rank) / (2 * config.head_dim)))
        return whole.with_settings({"num_critical": listed - virtual})

    per_head = {"lists_per": "query_head", "dense_layers": 1}
    before = {"tail": None, "dense_layers": 1}
    yield BASE, method(**before)
    yield "tail, layer 0 dense", method(dense_layers=1)
    yield "the default: tail, layer 0 sparse", method()
    yield "the default, never refitted", method(refit_interval=None)
    yield "exact top-k", method("1-1-1", scoring="exact", **per_head, tail=None)
    yield "exact top-k, tail", method("1-1-1", scoring="exact", **per_head)
    yield "Double Sparsity", method("1-1-1", **per_head, tail=None)
    yield "Double Sparsity, tail", method("1-1-1", **per_head)
    yield "all lists computed, tail", method("1-1-1", dense_layers=1)
    yield "pools of 2, tail, layer 0 dense", method(dense_layers=1, pool=2)
    yield "1/8 of the lists", method("1/8-1-1", **before)
    yield "1/8 of the lists, tail, layer 0 dense", method("1/8-1-1", dense_layers=1)
    yield "1/8 of the lists, pools of 4, tail, layer 0 dense", method("1/8-1-1", dense_layers=1, pool=4)
    yield "a list for each query head, half of them, tail", method(**per_head)
    yield "published 7/8-3/4-1/2", published(budget, "7/8-3/4-1/2")
    for name in ("quest_window", "streaming_llm"):
        other = method_named(name, ours(budget))
        assert other is not None
        yield name, other


def windows_of(model: Model, texts: dict[str, str], context: int, per_text: int) -> list[Window]:
    """The last `per_text` of one more windows of each text."""
    by_text = (cut_windows(model, *text, context=context, count=per_text + 1, skip=SKIP) for text in texts.items())
    return list(itertools.chain.from_iterable(windows[1:] for windows in by_text))


def hard_windows(model: Model, texts: dict[str, str], steps: int) -> list[Window]:
    """Windows on which what the probes saw says little about the positions that are scored."""
    rng, prompt = np.random.default_rng(0), HARD_CONTEXT - steps  # tokens before the scored positions
    book, other = (window.tokens for window in windows_of(model, dict(list(texts.items())[:2]), HARD_CONTEXT, 1))
    assert model.tokenizer is not None
    needle, question = (
        tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (NEEDLE.format(key=51_342), f"{QUESTION} 51342. ")
    )
    kinds = {
        "one passage, repeated": book[:64] * (HARD_CONTEXT // 64 + 1),
        "random tokens": tuple(rng.integers(0, model.config.vocab_size, HARD_CONTEXT + 1).tolist()),
        "another text after the prompt": book[:prompt] + other,
        "a passkey at the prompt's end, asked for": book[: prompt - len(needle)] + needle + question + book,
    }
    return [Window(name, tokens[: HARD_CONTEXT + 1]) for name, tokens in kinds.items()]


def long_windows(model: Model, texts: dict[str, str], writes: bool) -> list[Window]:
    """A window of each text; its second half is what the model writes, if `writes`, at temperature 0.8."""
    windows = windows_of(model, texts, LONG_PROMPT + LONG_STEPS, 1)
    if not writes:
        return windows
    prompts = [window.tokens[:LONG_PROMPT] for window in windows]
    sampling, endless = SamplingParams(temperature=0.8), dataclasses.replace(model, eos_token_ids=())
    written = generate(endless, prompts, max_new_tokens=LONG_STEPS + 1, method=None, sampling=sampling).tokens
    return [
        Window(f"after {one.id}", (*prompt, *new)) for one, prompt, new in zip(windows, prompts, written, strict=True)
    ]


def measure(scorer: Scorer, method: Method) -> dict[str, Any]:
    """The scores of a method on the scorer's windows."""
    scores = scorer.score(method, recall_every=None)
    return {
        "windows": [window.id for window in scorer.windows],
        "reads": round(float(scores["reads"].mean()), 1),
        "divergence": scores["divergence"].round(7).tolist(),
        "agrees": scores["agrees"].astype(int).tolist(),
    }


def report(lines: list[dict[str, Any]], header: str) -> str:
    """The tables in Markdown."""
    text = [header]
    for cell in CELLS:
        rows = {line["name"]: line for line in lines if line["cell"] == cell}
        if BASE not in rows:
            continue
        budget, _, context = cell.partition("/")
        if context in OTHER_CELLS:
            stretches = range(0, LONG_STEPS, STRETCH)
            columns = [f"steps {start + 1} to {start + STRETCH}" for start in stretches]
            if context == "hard":
                columns = rows[BASE]["windows"]
            text += [f"\n### {budget} tokens, {OTHER_CELLS[context]}: mean KL, and 99th percentile\n"]
            text += [f"| method | {' | '.join(columns)} | tokens read |", "|---" * (len(columns) + 2) + "|"]
            for name, row in rows.items():
                parts = np.array(row["divergence"])  # of each window
                if context != "hard":
                    parts = np.split(parts, stretches[1:], axis=1)
                found = (f"{np.mean(kl):.4f}, {np.percentile(kl, 99):.3f}" for kl in parts)
                text.append(f"| {name} | {' | '.join(found)} | {row['reads']:.0f} |")
            continue
        text += [
            f"\n### {budget} of {context} tokens\n",
            f"| method | KL to dense, mean | over {BASE} (95 %) | median | 99th percentile | top-1 agreement (95 %) "
            "| tokens read |",
            "|---|---|---|---|---|---|---|",
        ]
        base = np.array(rows[BASE]["divergence"])
        for name, row in rows.items():
            kl, agrees, ratio = np.array(row["divergence"]), np.array(row["agrees"]), "-"
            if name != BASE:
                low, high = interval(mean_ratio, kl, base)
                ratio = f"{mean_ratio(kl, base):.2f} ({low:.2f}-{high:.2f})"
            low, high = interval(np.mean, agrees)
            text.append(
                f"| {name} | {kl.mean():.5f} | {ratio} | {np.median(kl):.5f} | {np.percentile(kl, 99):.4f} "
                f"| {agrees.mean():.1%} ({low:.1%}-{high:.1%}) | {row['reads']:.0f} |"
            )
    if found := [line for line in lines if "found" in line]:
        text += ["\n### Passkey, 1k, 128 tokens, question decoded sparsely\n", "| method | found |", "|---|---|"]
        text += [f"| {line['name']} | {line['found']} of {line['seeds']} |" for line in found]
    return "\n".join(text) + "\n"


def main() -> None:
    """Measures the rows that the results lack, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; of a .jsonl, `prompt`")
    parser.add_argument("--results", type=Path, required=True, help="JSONL file to write, and to resume from")
    parser.add_argument("--report", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=256, help="positions scored of each window")
    parser.add_argument("--windows", type=int, default=PER_TEXT, help="windows of each text")
    parser.add_argument("--seeds", type=int, default=50, help="number of passkey prompts; 0 for none")
    parser.add_argument("--names", nargs="+", help="measure only methods whose names begin so")
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, help="budget/context (default: all)")
    options = parser.parse_args()
    texts = read_texts(parser, options.text)
    study = {
        "model": options.model, "texts": {name: hash_text(text) for name, text in texts.items()},
        "steps": options.steps, "windows": options.windows,
    }  # fmt: skip
    records = Records(options.results, study, keys=("name", "cell"), later=("identity",))
    model = load_model(options.model)
    records.settle(identity=model.identity)

    def todo(cell: str) -> dict[str, Method]:
        named = methods(int(cell.partition("/")[0]), model.config)
        wanted = (BASE, *(options.names or [""]))
        is_long = cell.endswith(("/long", "/written"))
        return {
            name: method
            for name, method in named
            if name.startswith(wanted)
            and {"name": name, "cell": cell} not in records
            # Refits begin after the steps of the other cells.
            and (name.startswith(LONG) if is_long else name != "the default, never refitted")
        }

    def run(cell: str, measure: Callable[[Method], dict[str, Any]]) -> None:
        for name, method in tqdm(todo(cell).items(), desc=cell, disable=None):
            records.append({"name": name, "cell": cell} | measure(method))
            jax.clear_caches()  # other settings have other programs, and programs are large

    for context in dict.fromkeys(cell.partition("/")[2] for cell in options.cells):
        cells = [cell for cell in options.cells if cell.endswith(f"/{context}") and todo(cell)]
        if not cells:
            continue
        steps = options.steps
        if context == "hard":
            windows = hard_windows(model, texts, steps)
        elif context in OTHER_CELLS:
            windows, steps = long_windows(model, texts, writes=context == "written"), LONG_STEPS
        else:
            windows = windows_of(model, texts, int(context), options.windows)
        asked = [method for cell in cells for method in todo(cell).values()]
        scorer = Scorer(model, windows, steps, asked)
        for cell in cells:
            run(cell, functools.partial(measure, scorer))
        del scorer
    if options.seeds:
        passkeys = hide_passkeys(model, next(iter(texts.values())), options.seeds)
        run("128/passkey", lambda method: {"found": count_found(model, passkeys, method), "seeds": options.seeds})
    header = (
        f"{made_with(model.name)}. {options.windows * len(texts)} windows from "
        f"{', '.join(path.name for path in options.text)}; the last {options.steps} positions of each scored. "
        f"Intervals: bootstrap over blocks of neighbouring positions.\n\n    {command(options)}"
    )
    write_report(options.report, MARK, report(records.lines, header))


if __name__ == "__main__":
    main()
