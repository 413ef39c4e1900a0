"""The tables of docs/results.md, made from the lines that scripts/study/methods.py measured."""

from typing import Any

import numpy as np

from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from scripts.study.cells import BUDGETS, DEFAULT, NAMES, PLANS, SIMPLER

COMPARED = (DEFAULT, "hshare 1/3-1-1", "hshare 1/8-1-1")


def report(lines: list[dict[str, Any]], header: str) -> str:
    """The tables in Markdown."""
    lines = sorted(lines, key=lambda line: (line["kind"], line["context"]))  # stages wrote their lines in turns
    text = {(line["context"], line["budget"], line["name"]): line for line in lines if line["kind"] == "text"}
    out = [header]
    for context in sorted({key[0] for key in text}):
        for budget in BUDGETS:
            names = [name for name in (*NAMES, *PLANS) if (context, budget, name) in text]
            if DEFAULT in names:  # the other methods are compared with it
                out += _table(context, budget, {name: text[context, budget, name] for name in names})
    passkeys = [line for line in lines if line["kind"] == "passkey"]
    if passkeys:
        out += _passkey_table(passkeys)
    if speed := [line for line in lines if line["kind"] == "speed"]:
        out += _speed_table(speed)
    out += [
        "\n### Where a cheaper or simpler method does better\n",
        "Mean and median of KL, top-1 agreement, and passkeys, beside methods that score no token by itself. "
        "Times stand in another table.\n",
        *(_surprises(lines) or ["None."]),
    ]
    return "\n".join(out) + "\n"


def _table(context: int, budget: int, lines: dict[str, dict[str, Any]]) -> list[str]:
    base = np.array(lines[DEFAULT]["divergence"])
    out = [
        f"\n### {budget} of {context} tokens\n",
        "| method | KL to dense, mean (95 %) | median | 99th percentile | over the default's (95 %) | "
        "top-1 agreement (95 %) | recall of attention | perplexity | tokens read |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, line in lines.items():
        kl, agrees = np.array(line["divergence"]), np.array(line["agrees"])
        ratio = "-"
        if name not in (DEFAULT, "dense"):
            low, high = interval(mean_ratio, kl, base)
            ratio = f"{mean_ratio(kl, base):.2f} ({low:.2f}-{high:.2f})"
        kl_low, kl_high = interval(np.mean, kl)
        low, high = interval(np.mean, agrees)
        recall = "-" if line["recall"] is None else f"{line['recall']:.1%}"
        out.append(
            f"| {name} | {kl.mean():.5f} ({kl_low:.5f}-{kl_high:.5f}) | {np.median(kl):.5f} "
            f"| {np.percentile(kl, 99):.4f} | {ratio} | {agrees.mean():.1%} ({low:.1%}-{high:.1%}) | {recall} "
            f"| {np.exp(line['loss']):.2f} | {line['reads']:.0f} |"
        )
    return out


def _passkey_table(lines: list[dict[str, Any]]) -> list[str]:
    found = {(line["name"], line["budget"]): f"{sum(line['found'])} of {len(line['found'])}" for line in lines}
    heads = {budget: f"reading {budget}" for budget in sorted({line["budget"] for line in lines})}
    return ["\n### Passkeys found in 1,024 tokens, the question decoded by sparse steps\n", *_by_method(found, heads)]


def _speed_table(lines: list[dict[str, Any]]) -> list[str]:
    milliseconds = {(line["name"], (line["context"], line["budget"])): line["milliseconds"] for line in lines}
    cells = {}
    for (name, size), own in milliseconds.items():
        dense = milliseconds.get(("dense", size))
        cells[name, size] = f"{own:.1f} ms" + (f", {dense / own:.2f}" if dense else "")
    heads = {(line["context"], line["budget"]): f"{line['budget']} of {line['context']}" for line in lines}
    batch = lines[0]["batch"]
    title = f"\n### Speed of decode steps: milliseconds, and how many times as fast as dense, batch {batch}\n"
    return [title, *_by_method(cells, heads)]


def _by_method(cells: dict[tuple[str, Any], str], heads: dict[Any, str]) -> list[str]:
    """A table with a row for each method and a column for each head; `cells` is keyed by (method, head)."""
    names = dict.fromkeys(name for name, _ in cells)
    rows = [[name, *(cells.get((name, column), "-") for column in heads)] for name in names]
    return [f"| {' | '.join(row)} |" for row in (["method", *heads.values()], ["---"] * (1 + len(heads)), *rows)]


def _surprises(lines: list[dict[str, Any]]) -> list[str]:
    """The cells in which a simpler method, without labels and sharing, does better than one of ours."""
    known = {(line["kind"], line["context"], line["budget"], line["name"]): line for line in lines}
    out = []
    for (kind, context, budget, name), line in known.items():
        for mine in COMPARED if name in SIMPLER else ():
            if (other := known.get((kind, context, budget, mine))) is None:
                continue
            if kind == "text":
                theirs, kl = np.array(line["divergence"]), np.array(other["divergence"])
                ways = [way for way, pick in (("mean", np.mean), ("median", np.median)) if pick(theirs) < pick(kl)]
                agreements = np.mean(line["agrees"]), np.mean(other["agrees"])
                ways += ["top-1 agreement"] if agreements[0] > agreements[1] else []
                if ways:
                    out.append(
                        f"- {budget} of {context}: {name} ({theirs.mean():.4f} / {np.median(theirs):.4f} / "
                        f"{agreements[0]:.1%}, reads {line['reads']:.0f}) ahead of {mine} ({kl.mean():.4f} / "
                        f"{np.median(kl):.4f} / {agreements[1]:.1%}, reads {other['reads']:.0f}) by {', '.join(ways)}"
                    )
            if kind == "passkey" and sum(line["found"]) > sum(other["found"]):
                out.append(
                    f"- passkeys, reading {budget}: {name} finds {sum(line['found'])}, {mine} {sum(other['found'])}"
                )
    return out
