"""Measures tails where the prompt says little about what follows, and over long texts; writes docs/hard-tables.md.

Methods are compared with dense decoding, step by step, as in scripts/study/methods.py. The windows are of three kinds:
`hard` ones, whose scored positions are unlike the prompt that tails were fitted to; `long` ones, which are scored over
2,048 steps; and `written` ones, whose steps read what the model itself has written. Each finished row is a line of the
results file and is not measured again.

    python -m scripts.study.hard --text A.txt B.txt C.txt D.txt --results hard.jsonl --report docs/hard-tables.md
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hshare_jax.evaluation.passkeys import NEEDLE, QUESTION
from hshare_jax.evaluation.text_windows import Scorer, Window
from hshare_jax.files.records import Records
from hshare_jax.generate import generate
from hshare_jax.methods.base import Method
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.sampling_params import SamplingParams
from scripts.study.cells import DEFAULT, Cell, hash_text, ours, read_texts, windows_of
from scripts.study.reports import command, made_with, write_report

MARK = "<!-- The text below is written by scripts/study/hard.py. -->"
BUDGET = 512
KINDS = {
    "hard": "Hard windows",
    "long": "One window of each text, 2,048 steps after 2,048 tokens",
    "written": "2,048 steps over what the model wrote after 2,048 tokens of each text",
}
HARD_CONTEXT, HARD_STEPS = 4096, 256  # tokens of a hard window, and how many of them are scored
LONG_PROMPT, LONG_STEPS, STRETCH = 2048, 2048, 512
NEVER_REFITTED = f"{DEFAULT}, never refitted"
NAMES = {
    "hard": (f"{DEFAULT}, no tail", f"{DEFAULT}, layer 0 dense", DEFAULT, "exact_topk", "exact_topk, tail"),
    "long": (f"{DEFAULT}, no tail", DEFAULT, NEVER_REFITTED),
    "written": (f"{DEFAULT}, no tail", DEFAULT, NEVER_REFITTED),
}


def method_of(name: str) -> Method:
    """The method of a row, at `BUDGET`."""
    if name == NEVER_REFITTED:
        return ours(BUDGET, "1/2-1-1", refit_interval=None)
    method = Cell(HARD_CONTEXT, BUDGET, name).method
    assert method is not None
    return method


def windows_of_kind(model: Model, texts: dict[str, str], kind: str) -> list[Window]:
    """The windows of a kind of `KINDS`."""
    return hard_windows(model, texts) if kind == "hard" else long_windows(model, texts, writes=kind == "written")


def hard_windows(model: Model, texts: dict[str, str]) -> list[Window]:
    """Windows on which what the probes saw says little about the positions that are scored."""
    rng, prompt = np.random.default_rng(0), HARD_CONTEXT - HARD_STEPS  # tokens before the scored positions
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
    }


def report(lines: list[dict[str, Any]], header: str) -> str:
    """The tables in Markdown: a row for each method, a column for each window, or for each stretch of steps."""
    text = [header]
    for kind, title in KINDS.items():
        rows = [line for line in lines if line["kind"] == kind]
        if not rows:
            continue
        stretches = range(0, LONG_STEPS, STRETCH)
        columns = [f"steps {start + 1} to {start + STRETCH}" for start in stretches]
        if kind == "hard":
            columns = rows[0]["windows"]
        text += [f"\n### {title}: mean KL, and 99th percentile\n"]
        text += [f"| method | {' | '.join(columns)} | tokens read |", "|---" * (len(columns) + 2) + "|"]
        for row in rows:
            kl = np.array(row["divergence"])
            parts = kl if kind == "hard" else np.split(kl, stretches[1:], axis=1)
            found = (f"{np.mean(part):.4f}, {np.percentile(part, 99):.3f}" for part in parts)
            text.append(f"| {row['name']} | {' | '.join(found)} | {row['reads']:.0f} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Measures the rows that the results lack, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; of a .jsonl, `prompt`")
    parser.add_argument("--results", type=Path, required=True, help="JSONL file to write, and to resume from")
    parser.add_argument("--report", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="windows (default: all)")
    options = parser.parse_args()
    texts = read_texts(parser, options.text)
    study = {"model": options.model, "texts": {name: hash_text(text) for name, text in texts.items()}}
    records = Records(options.results, study, keys=("kind", "name"), later=("identity",))
    model = load_model(options.model)
    records.settle(identity=model.identity)
    for kind in options.kinds:
        todo = {name: method_of(name) for name in NAMES[kind] if {"kind": kind, "name": name} not in records}
        if todo:
            steps = HARD_STEPS if kind == "hard" else LONG_STEPS
            scorer = Scorer(model, windows_of_kind(model, texts, kind), steps, list(todo.values()))
            for name, method in tqdm(todo.items(), desc=kind, disable=None):
                records.append({"kind": kind, "name": name} | measure(scorer, method))
                jax.clear_caches()  # other settings have other programs, and programs are large
            del scorer
    names = ", ".join(path.name for path in options.text)
    header = f"{made_with(model.name)}, {BUDGET} tokens. Windows from {names}.\n\n    {command(options)}"
    write_report(options.report, MARK, report(records.lines, header))


if __name__ == "__main__":
    main()
