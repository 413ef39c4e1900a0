#!/usr/bin/env python3
"""Measures what HShare costs in quality on real text, setting by setting, and writes the tables of docs/quality.md.

Dense decoding is the yardstick. Windows of each text are prefilled dense and exactly, once; then every setting decodes
the last tokens of each window through the cache, reading the text's own tokens (teacher forcing), and is compared step
by step with dense decoding. Each finished cell is a line of the results file, and cells that are there are not measured
again, so a killed run goes on where it was.

    python scripts/study_quality.py --text A.txt B.txt C.txt D.txt --results quality.jsonl \\
        --report docs/quality-tables.md
"""

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hshare_jax.agreement import StepScores, forced_logits, score_steps
from hshare_jax.attend import PromptQueries
from hshare_jax.config import HShareConfig
from hshare_jax.decode import decode_step
from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.generate import pad_prompts
from hshare_jax.kv_cache import KVCache
from hshare_jax.labels import channel_statistic
from hshare_jax.models.pretrained import Model, load_model
from hshare_jax.prefill import prefill, read_prompt, share_after_prefill
from hshare_jax.similarity import probe_positions

PLACES = (0.25, 0.6)  # of a text, where its windows start: beyond title pages and licences
BLOCK = 32  # neighbouring positions that the bootstrap draws together
BUDGETS = {64: (4, 44, 16), 128: (8, 88, 32), 256: (8, 200, 48), 512: (16, 432, 64)}  # sinks, critical, recent
PUBLISHED_RATIOS = ("1-1-1", "7/8-3/4-1/2", "3/4-3/4-1/2", "1/2-1/2-1/2")


# What is measured first, by table and name.
CORE = {
    "512 of 4096 tokens": (
        "oracle: exact scores, lists per kv head", "oracle: exact scores, lists per query head", "units, 1-1-1",
        "units, 2/3-1-1", "units, 1/2-1-1", "units, 1/3-1-1", "units, 1/8-1-1", "published, 7/8-3/4-1/2",
        "published, 3/4-3/4-1/2", "published, 1/2-1/2-1/2",
    ),
    "128 of 4096 tokens": (
        "oracle: exact scores, lists per kv head", "units, 1-1-1", "units, 1/2-1-1", "units, 1/3-1-1", "units, 1/8-1-1",
        "published, 7/8-3/4-1/2",
    ),
    "256 of 4096 tokens": ("units, 1-1-1", "units, 1/2-1-1"),
    "64 of 4096 tokens": ("units, 1-1-1", "units, 1/2-1-1"),
    "Which part loses what (512)": (
        "units, 1-1-1/2, dilated", "units, 1-1-1/2, not dilated", "published plan, 7/8-1-1",
        "published plan, 1-3/4-1",
    ),
    "The same work in other ways: a third, or an eighth, of the selections (512)": (
        "units, 2/3-1-1/2", "units, 1/4-1-1/2", "published, 7/8-3/4-1/2, lists per kv_head, dilated",
        "units, 1/3-1-1, one plan for the batch",
    ),
    "Labels, 1-1-1 (512)": (
        "16 of 64 channels, 4 bits", "32 of 64 channels, not quantised",
        "32 of 64 channels, 4 bits, calibrated on the other texts",
    ),
    "Dense first layers (512)": (
        "0 dense, 1-1-1", "2 dense, 1-1-1", "0 dense, units 1/2-1-1", "2 dense, units 1/2-1-1",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of the study."""

    table: str  # the question that it helps to answer
    name: str
    hshare: HShareConfig
    channels: str = "prompt"  # or "calibrated": from the other texts

    @property
    def key(self) -> str:
        """Returns what tells this measurement from others."""
        return f"{self.hshare} {self.channels}"


def default(budget: int, ratio: str = "1-1-1", **settings: object) -> HShareConfig:
    """Returns the package's defaults at a budget and ratio."""
    sinks, critical, recent = BUDGETS[budget]
    config = HShareConfig(num_sinks=sinks, num_critical=critical, num_recent=recent).with_sharing_ratio(ratio)
    return dataclasses.replace(config, **settings)  # pyright: ignore[reportArgumentType]


def published(budget: int, ratio: str, **settings: object) -> HShareConfig:
    """Returns the published method at a budget and ratio, layer 0 dense unless told, with bounded probes."""
    common = dataclasses.replace(HShareConfig.published(), num_probes=HShareConfig().num_probes, dense_layers=1)
    sinks, critical, recent = BUDGETS[budget]
    config = dataclasses.replace(common, num_sinks=sinks, num_critical=critical, num_recent=recent)
    return dataclasses.replace(config.with_sharing_ratio(ratio), **settings)  # pyright: ignore[reportArgumentType]


def cells() -> Iterator[Cell]:
    """Yields the study, the answers that matter most first."""
    exact = {"scoring": "exact"}
    for budget in (512, 128, 256, 64):
        table = f"{budget} of 4096 tokens"
        yield Cell(table, "oracle: exact scores, lists per kv head", default(budget, **exact))
        yield Cell(
            table, "oracle: exact scores, lists per query head", default(budget, lists_per="query_head", **exact)
        )
        for ratio in ("1-1-1", "2/3-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1"):
            yield Cell(table, f"units, {ratio}", default(budget, ratio))
        for ratio in PUBLISHED_RATIOS if budget in (512, 128) else PUBLISHED_RATIOS[:2]:
            yield Cell(table, f"published, {ratio}", published(budget, ratio))
    table = "Which part loses what (512)"
    for ratio in ("7/8-1-1", "1/2-1-1", "1-3/4-1", "1-1/2-1", "7/8-3/4-1", "1/2-1/2-1"):
        yield Cell(table, f"published plan, {ratio}", published(512, ratio))
    for interval in (2, 4, 8):
        for dilate in (True, False):
            name = f"1-1-1/{interval}, {'dilated' if dilate else 'not dilated'}"
            yield Cell(table, f"units, {name}", default(512, f"1-1-1/{interval}", dilate=dilate))
    table = "The same work in other ways: a third, or an eighth, of the selections (512)"
    for ratio in ("1/3-1-1", "2/3-1-1/2", "1/8-1-1", "1/4-1-1/2", "1/2-1-1/4"):
        yield Cell(table, f"units, {ratio}", default(512, ratio))
    for ratio in ("2/3-1-1/2", "1/4-1-1/2"):
        yield Cell(table, f"units, {ratio}, not dilated", default(512, ratio, dilate=False))
    for ratio in (PUBLISHED_RATIOS[1], PUBLISHED_RATIOS[3]):
        for lists in ("kv_head", "query_head"):
            for dilate in (True, False):
                name = f"published, {ratio}, lists per {lists}, {'dilated' if dilate else 'not dilated'}"
                yield Cell(table, name, published(512, ratio, lists_per=lists, dilate=dilate))
    yield Cell(table, "units, 1/3-1-1, lists per query head", default(512, "1/3-1-1", lists_per="query_head"))
    yield Cell(table, "units, 1/3-1-1, one plan for the batch", default(512, "1/3-1-1", plan_scope="batch"))
    yield Cell(table, "units, 1/8-1-1, one plan for the batch", default(512, "1/8-1-1", plan_scope="batch"))
    for probes in (8, 32, 128):
        yield Cell(table, f"units, 1/8-1-1, {probes} probes", default(512, "1/8-1-1", num_probes=probes))
    table = "Labels, 1-1-1 (512)"
    for channels in (8, 16, 32, 64):
        yield Cell(table, f"{channels} of 64 channels, 4 bits", default(512, label_channels=channels))
    yield Cell(table, "32 of 64 channels, 8 bits", default(512, label_bits=8))
    yield Cell(table, "32 of 64 channels, not quantised", default(512, label_bits=None))
    for channels in (16, 32):
        name = f"{channels} of 64 channels, 4 bits, calibrated on the other texts"
        yield Cell(table, name, default(512, label_channels=channels), "calibrated")
    table = "Dense first layers (512)"
    for dense in (0, 1, 2):
        yield Cell(table, f"{dense} dense, 1-1-1", default(512, dense_layers=dense))
        yield Cell(table, f"{dense} dense, units 1/2-1-1", default(512, "1/2-1-1", dense_layers=dense))
        hshare = default(512, dense_layers=dense, lists_per="query_head", **exact)
        yield Cell(table, f"{dense} dense, oracle per query head", hshare)


class Windows:
    """Windows of the texts, prefilled once: caches and queries that every setting starts from."""

    def __init__(self, model: Model, paths: list[Path], context: int, steps: int) -> None:
        self.model, self.steps, self.num_texts = model, steps, len(paths)
        rows = [ids for path in paths for ids in _windows_of(model, path, context + 1)]
        self.tokens = jnp.asarray(rows, jnp.int32)
        B, length, config = len(rows), context - steps, model.config
        # A budget of two tokens, so that every query is kept: what each setting's own probes are taken from.
        every = HShareConfig(num_sinks=0, num_critical=1, num_recent=1, num_probes="all")
        state = init_state(config, B, context, method=every)
        with tqdm(total=length, desc="prefill", unit="token", disable=None) as bar:
            _, cache, kept, positions = read_prompt(
                model.params, self.tokens[:, :length], jnp.full((B,), length), state, config=config, progress=bar.update
            )
        assert kept is not None
        assert positions is not None
        self.first = int(positions[0, 0])
        self.cache, self.sizes, self.queries = cache, kept.sizes, [np.asarray(probes) for probes in kept.probes]
        del kept
        dense = DecodeState(self._copy_cache(), None)
        self.reference = forced_logits(model.params, self.tokens[:, length:-1], dense, config=config)

    def _copy_cache(self) -> KVCache:
        return jax.tree.map(lambda array: jnp.array(array, copy=True), self.cache)

    def score(self, hshare: HShareConfig, channels: str) -> tuple[StepScores, DecodeState]:
        """Returns the scores of every step [T, B], and the state before the first."""
        config, B = self.model.config, self.tokens.shape[0]
        state = init_state(config, B, 1, method=hshare)
        shared = state.selection
        assert shared is not None
        starts, lengths = jnp.zeros((B,), jnp.int32), self.cache.lengths
        P = int(lengths[0]) if hshare.num_probes == "all" else hshare.num_probes
        positions, _ = probe_positions(starts, lengths, hshare, P)
        index = np.maximum(np.asarray(positions) - self.first, 0)[:, :, None, None]
        probes = tuple(jnp.asarray(np.take_along_axis(queries, index, axis=1)) for queries in self.queries)
        sizes = tuple(jnp.array(size, copy=True) for size in self.sizes)
        if channels == "calibrated":
            best = self._channels_of_other_texts(hshare.num_label_channels(config))
            shared = dataclasses.replace(shared, channels=best, has_fixed_channels=True)
        cache = self._copy_cache()
        shared = share_after_prefill(PromptQueries(probes, sizes), positions, cache, shared, config=config)
        state = DecodeState(cache, shared)
        plan = jax.tree.map(lambda array: jnp.array(array, copy=True), shared.source)
        tokens = self.tokens[:, -self.steps - 1 :]
        scores = score_steps(self.model.params, tokens, state, config=config, reference=self.reference)
        return scores, dataclasses.replace(state, selection=dataclasses.replace(shared, source=plan))

    def _channels_of_other_texts(self, num_channels: int) -> jax.Array:
        lengths = self.cache.lengths
        by_layer = [channel_statistic(q, k, lengths) for q, k in zip(self.sizes, self.cache.keys, strict=True)]
        statistic = jnp.stack(by_layer, axis=1)  # [B, L, K, H]
        text = jnp.arange(len(lengths)) // len(PLACES)
        others = (text[:, None] != text[None, :]).astype(statistic.dtype)
        _, best = jax.lax.top_k(jnp.einsum("AB,BLKH->ALKH", others, statistic), num_channels)
        return jnp.sort(best, axis=-1)


def _windows_of(model: Model, path: Path, size: int) -> list[list[int]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n\n".join(json.loads(line)["prompt"] for line in text.splitlines() if line.strip())
    assert model.tokenizer is not None
    windows = []
    for place in PLACES:
        start = int(len(text) * place)
        ids = model.tokenizer(text[start : start + 12 * size])["input_ids"][:size]
        if len(ids) < size:
            sys.exit(f"{path}: from {place:.0%} on it has {len(ids)} tokens; a window needs {size}")
        windows.append(ids)
    return windows


def measure(windows: Windows, cell: Cell) -> dict[str, object]:
    """Returns a cell's line of the results file."""
    scores, state = windows.score(cell.hshare, cell.channels)
    assert scores.divergence is not None
    assert scores.agrees is not None
    assert isinstance(state.selection, SharedLists)
    config, hshare = windows.model.config, cell.hshare
    source = np.asarray(state.selection.source).reshape(len(windows.tokens), -1)
    is_own = source == np.arange(source.shape[1])
    first = hshare.dense_layers * hshare.num_lists(config)
    return {
        "key": cell.key,
        "computed": float(is_own[:, first:].sum(axis=1).mean()) / hshare.refresh_interval,  # selections a step
        "possible": source.shape[1],
        "reads": round(float(scores.reads.mean()), 1),
        "divergence": np.asarray(scores.divergence).round(7).tolist(),
        "agrees": np.asarray(scores.agrees, int).tolist(),
        "loss": round(float(scores.loss.mean()), 5),
    }


def passkey(model: Model, path: Path, hshare: HShareConfig | None, seeds: int, length: int = 1024) -> int:
    """Returns in how many of `seeds` prompts of `length` tokens the hidden number is found.

    The number stands at a random depth of a text; the question comes after the prefill, token by token through the
    sparse steps, and so does the answer.
    """
    assert model.tokenizer is not None
    encode = lambda text: model.tokenizer(text)["input_ids"]  # noqa: E731  # pyright: ignore[reportOptionalCall]
    filler = encode(path.read_text(encoding="utf-8")[50_000:80_000])
    question = encode("\n\nWhat is the pass key? The pass key is")
    prompts, keys = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        key = str(rng.integers(10_000, 100_000))
        needle = encode(f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        start, depth = int(rng.integers(0, len(filler) - length)), rng.random()
        rest = filler[start : start + length - len(needle) - len(question)]
        cut = int(depth * len(rest))
        prompts.append(rest[:cut] + needle + rest[cut:])
        keys.append(key)
    tokens, lengths = pad_prompts(prompts)
    state = init_state(model.config, seeds, length + 16, method=hshare)
    logits, state = prefill(model.params, jnp.asarray(tokens), jnp.asarray(lengths), state, config=model.config)
    for token in question:
        logits, state = decode_step(model.params, jnp.full((seeds,), token), state, config=model.config)
    answers = []
    for _ in range(8):
        token = jnp.argmax(logits, axis=-1)
        answers.append(np.asarray(token))
        logits, state = decode_step(model.params, token, state, config=model.config)
    texts = [model.tokenizer.decode(answer) for answer in np.stack(answers, axis=1)]
    return sum(str(text).strip().startswith(key) for text, key in zip(texts, keys, strict=True))


def passkey_settings() -> Iterator[tuple[str, HShareConfig | None]]:
    """Yields (name, settings) at 128 tokens."""
    yield "dense", None
    yield "oracle: exact scores, per kv head", default(128, scoring="exact")
    for ratio in ("1-1-1", "2/3-1-1", "1/2-1-1", "1/3-1-1", "1/8-1-1", "1-1-1/2"):
        yield f"units, {ratio}", default(128, ratio)
    for ratio in PUBLISHED_RATIOS:
        yield f"published, {ratio}", published(128, ratio)


def report(results: dict[str, dict], header: str) -> str:
    """Returns the tables in Markdown."""
    lines = [header]
    for table in dict.fromkeys(cell.table for cell in cells()):
        rows = [cell for cell in cells() if cell.table == table and cell.key in results]
        if not rows:
            continue
        lines += [
            f"\n### {table}\n",
            "| setting | KL to dense, mean (95 %) | median | top-1 agreement (95 %) | KL over units 1-1-1 | "
            "selections a step | tokens read |",
            "|---|---|---|---|---|---|---|",
        ]
        for cell in rows:
            result = results[cell.key]
            base = results.get(Cell("", "", default(cell.hshare.budget)).key)
            kl, agrees = np.array(result["divergence"]), np.array(result["agrees"])
            ratio = "-"
            if base is not None and base is not result:
                low, high = _interval(lambda a, b: a.mean() / b.mean(), kl, np.array(base["divergence"]))
                ratio = f"{kl.mean() / np.mean(base['divergence']):.2f} ({low:.2f}-{high:.2f})"
            kl_low, kl_high = _interval(np.mean, kl)
            low, high = _interval(np.mean, agrees)
            lines.append(
                f"| {cell.name} | {kl.mean():.4f} ({kl_low:.4f}-{kl_high:.4f}) | {np.median(kl):.4f} "
                f"| {agrees.mean():.1%} ({low:.1%}-{high:.1%}) | {ratio} "
                f"| {result['computed']:.1f} of {result['possible']} | {result['reads']:.0f} |"
            )
    found = [(name, results[f"passkey {name}"]) for name, _ in passkey_settings() if f"passkey {name}" in results]
    if found:
        lines += ["\n### Passkey, 1k, 128 tokens, question decoded sparsely\n", "| setting | found |", "|---|---|"]
        lines += [f"| {name} | {result['found']} of {result['seeds']} |" for name, result in found]
    return "\n".join(lines) + "\n"


def _interval(statistic, *arrays: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """Returns the 95 % interval over windows and blocks of neighbouring positions, the same ones of all arrays."""
    blocks = [array.reshape(-1, BLOCK, array.shape[1]).swapaxes(1, 2).reshape(-1, BLOCK) for array in arrays]
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        drawn = rng.integers(0, len(blocks[0]), len(blocks[0]))
        found.append(statistic(*(block[drawn] for block in blocks)))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _read_results(path: Path) -> dict[str, dict]:
    """Returns the lines of a results file by key; a last line that a kill cut short is cut off the file."""
    if not path.exists():
        return {}
    whole, _, rest = path.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    return {line["key"]: line for line in map(json.loads, whole.splitlines())}


def main() -> None:
    """Measures the cells that the results lack, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files; of .jsonl the field `prompt`")
    parser.add_argument("--results", type=Path, required=True, help="JSONL to write to and to go on from")
    parser.add_argument("--report", type=Path, help="Markdown to write; default: standard output")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=256, help="positions scored of each window; two windows a text")
    parser.add_argument("--seeds", type=int, default=20, help="passkey prompts")
    parser.add_argument("--tables", nargs="+", help="measure only tables that begin so")
    parser.add_argument("--core", action="store_true", help="measure only what the advice in docs/quality.md rests on")
    options = parser.parse_args()
    if options.steps % BLOCK:
        parser.error(f"--steps {options.steps} must be a multiple of {BLOCK}")
    study = {
        "key": "study", "model": options.model, "texts": [path.name for path in options.text],
        "context": options.context, "steps": options.steps, "seeds": options.seeds,
    }  # fmt: skip
    results = _read_results(options.results)
    if results.setdefault("study", study) != study:
        parser.error(f"--results {options.results} holds another study, {results['study']}; name another file")

    def is_wanted(table: str) -> bool:
        return not options.tables or table.startswith(tuple(options.tables))

    wanted = [cell for cell in cells() if is_wanted(cell.table)]
    core = [cell for cell in wanted if cell.name in CORE.get(cell.table, ())]
    wanted = core if options.core else core + wanted
    todo = list({cell.key: cell for cell in wanted if cell.key not in results}.values())
    with options.results.open("a", encoding="utf-8") as file:

        def keep(line: dict) -> None:
            results[line["key"]] = line
            file.write(json.dumps(line) + "\n")
            file.flush()

        if options.results.stat().st_size == 0:
            keep(study)
        model = load_model(options.model)
        if todo:
            windows = Windows(model, options.text, options.context, options.steps)
            for cell in tqdm(todo, desc="cells", disable=None):
                keep(measure(windows, cell))
                jax.clear_caches()  # every cell has programs of its own, and they are large
            del windows
        for name, hshare in passkey_settings() if is_wanted("Passkey") else ():
            if f"passkey {name}" not in results:
                found = passkey(model, options.text[0], hshare, options.seeds)
                keep({"key": f"passkey {name}", "found": found, "seeds": options.seeds})
    count = len(PLACES) * len(options.text)
    names = ", ".join(path.name for path in options.text)
    header = (
        f"{date.today()}, {model.name}, float32, jax {jax.__version__}, Python {platform.python_version()}, "
        f"{jax.devices()[0].device_kind}. {count} windows of {options.context} tokens from {names}; the last "
        f"{options.steps} of each scored: {count * options.steps} positions. Intervals: bootstrap over windows and "
        f"blocks of {BLOCK} positions.\n\n    python {' '.join(sys.argv)}"
    )
    text = report(results, header)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
