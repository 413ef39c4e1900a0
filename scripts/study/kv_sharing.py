"""Trains the standard model and the nine ways of sharing keys and values, and writes the tables of docs/kv_sharing.md.

All runs have the same seed, order of the data and settings, at each number of KV layers. Then every model is timed
beside the standard model: an optimiser step, a prefill, and decoding the largest batch that a byte budget allows. Each
finished run is a line of DIR/results.jsonl. A study that was killed resumes where it was.

    python -m scripts.study.kv_sharing --text A.txt B.txt --output runs/kv --report docs/kv_sharing.md      # two cores
    python -m scripts.study.kv_sharing --text corpus/*.txt --output runs/kv-110m --preset 110m --kv-layers 6 3 \\
        --tokenizer mistralai/Mistral-7B-v0.1 --sequence-length 1024 --batch-size 256 --num-steps 30000 \\
        --learning-rate 6e-4 --compute-dtype bfloat16      # the paper's smallest setting, for a GPU
"""

import argparse
import dataclasses
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hshare_jax.files.records import Records
from hshare_jax.host_memory import keep_freed_memory
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.kv_sharing import layer_passes, papers_prefill_cost, share_kv
from hshare_jax.models.pretrained import open_model
from hshare_jax.training.data import encode_files, split_windows
from hshare_jax.training.presets import PRESETS, preset
from hshare_jax.training.run import train
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.start import new_model
from scripts.bench.kv_sharing import NAMES, compare
from scripts.bench.training import our_step
from scripts.study.reports import command, write_report

STANDARD = "standard"
END = "<|endoftext|>"
MARK = "<!-- The text below is written by scripts/study/kv_sharing.py. -->"
# arXiv 2410.14442: training time relative to standard (110M, 12 layers, 6 KV layers); mean zero-shot accuracy (1.1B, 22
# layers, 11 KV layers; standard 50.17).
PAPER = {
    "pizza-bottom": (0.94, 49.62), "pizza-middle": (1.70, None), "pizza-top": (2.20, None),
    "sandwich-bottom": (0.97, None), "sandwich-middle": (1.68, 49.29), "sandwich-top": (2.16, 50.05),
    "lasagna-bottom": (0.97, 49.22), "lasagna-middle": (2.93, None), "lasagna-top": (3.08, None),
}  # fmt: skip


def train_tokenizer(paths: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on these texts. Its vocabulary keeps a small model's embeddings small."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(path) for path in paths], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def configurations(config: ModelConfig, sizes: Sequence[int], names: Sequence[str]) -> dict[str, ModelConfig]:
    """The models of the study by name, the standard model first."""
    specs = [f"{name}:{size}" for size in sizes for name in names]
    return {STANDARD: config} | {spec: share_kv(config, spec) for spec in specs}


def training_ratio(standard: ModelConfig, shared: ModelConfig, settings: TrainingSettings, rounds: int) -> float:
    """The time of an optimiser step relative to the standard model's; each is the fastest of several turns."""
    shape = (settings.batch_size, settings.sequence_length + 1)
    windows = np.random.default_rng(0).integers(0, standard.vocab_size, shape, np.int32)
    steps = [our_step(config, settings, windows) for config in (standard, shared)]
    fastest = [float("inf")] * 2
    for number in range(rounds + 1):
        for which, step in enumerate(steps):
            began = time.perf_counter()
            step()
            if number:  # the first turn warms up
                fastest[which] = min(fastest[which], time.perf_counter() - began)
    return fastest[1] / fastest[0]


def made() -> str:
    """When and with what a line was measured."""
    return f"{date.today()}, jax {jax.__version__}, Python {platform.python_version()}, {jax.devices()[0].device_kind}"


def run_study(options: argparse.Namespace, settings: TrainingSettings) -> tuple[ModelConfig, Records]:
    """Trains and times the models that the results lack."""
    directory: Path = options.output
    if options.tokenizer is None:
        tokenizer = train_tokenizer(options.text, options.vocab_size)
        vocab_size = options.vocab_size
    else:
        files = open_model(options.tokenizer)
        tokenizer, vocab_size = files.tokenizer, files.config.vocab_size
        assert tokenizer is not None
    longest = max(settings.sequence_length, options.context, options.prompt)
    config = preset(options.preset, vocab_size=vocab_size, max_positions=longest)
    sizes = options.kv_layers or [config.num_layers // 2, config.num_layers // 4 + 1]
    tokens = encode_files(tokenizer, options.text)
    data = split_windows(tokens, settings.sequence_length, eval_fraction=0.05, max_eval_windows=len(tokens))
    study = {
        "model": dataclasses.asdict(config),
        "settings": dataclasses.asdict(settings),
        "text": data.fingerprint,
        "speed": [options.rows, options.context, options.prompt],
    }
    keep = Records(directory / "results.jsonl", study, keys=("kind", "name"))
    runs = configurations(config, sizes, options.names)
    for name, run_config in tqdm(runs.items(), desc="training", disable=None):
        if {"kind": "quality", "name": name} in keep:
            continue
        first = new_model(run_config, tokenizer, name=name, seed=settings.seed)
        result = train(first, data, settings, directory / name.replace(":", "-"))
        found = {"perplexity": result.perplexity, "loss": result.eval_loss, "tokens": result.tokens}
        keep.append({"kind": "quality", "name": name, "made": made(), **found, "seconds": result.seconds})
        jax.clear_caches()
    for name, run_config in tqdm(list(runs.items())[1:], desc="speed", disable=None):
        if options.without_speed or {"kind": "speed", "name": name} in keep:
            continue
        training = training_ratio(config, run_config, settings, options.rounds)
        (decoding,) = compare(
            config, [name], rows=options.rows, context=options.context, prompt=options.prompt, steps=8,
            rounds=options.rounds, make_params=lambda config: new_model(config, None).params,
        )  # fmt: skip
        keep.append(
            {
                "kind": "speed", "name": name, "made": made(), "training": round(training, 3),
                "prefill": round(decoding.prefill, 3), "throughput": round(decoding.throughput, 3),
                "rows": decoding.shared.rows, "tokens_per_second": round(decoding.shared.tokens_per_second, 1),
            }
        )  # fmt: skip
        jax.clear_caches()
    return config, keep


def report(config: ModelConfig, keep: Records, options: argparse.Namespace, settings: TrainingSettings) -> str:
    """The table in Markdown."""
    quality = {line["name"]: line for line in keep.lines if line["kind"] == "quality"}
    speed = {line["name"]: line for line in keep.lines if line["kind"] == "speed"}
    budget = options.rows * options.context * config.cache_bytes_per_token(4)
    runs = "; ".join(dict.fromkeys(line["made"] for line in keep.lines))
    names = ", ".join(path.name for path in options.text)
    out = [
        f"{config.num_layers} layers, {config.num_parameters / 1e6:.1f}M parameters, vocabulary {config.vocab_size:,}; "
        f"{settings.num_steps} steps of {settings.batch_size} x {settings.sequence_length} tokens of {names}, seed "
        f"{settings.seed}. {runs}.\n",
        f"    {command(options)}\n",
        f"Perplexity: of held-out windows, {len(quality)} runs from one seed in one order. Times: relative to the "
        f"standard model, timed turn by turn; decoding with caches of at most {budget / 2**20:.1f} MiB, "
        f"{options.context} tokens a row ({options.rows} rows of the standard model); prefill of {options.prompt} "
        "tokens.\n",
        "| | KV layers | cache bytes a token | perplexity | training time (paper, 110M) | prefill time "
        "| layers counted (paper's formula) | decode throughput | zero-shot, 1.1B (paper) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, line in quality.items():
        shared = config if name == STANDARD else share_kv(config, name)
        ours, (training, accuracy) = speed.get(name), PAPER.get(name.partition(":")[0], (1.0, 50.17))
        is_papers = name == STANDARD or 2 * len(shared.kv_layers) == config.num_layers
        counted = sum(layer_passes(shared, options.prompt)) / shared.num_layers
        times = [None, None, None] if ours is None else [ours["training"], ours["prefill"], ours["throughput"]]
        shown = ["1.00" if name == STANDARD else "-" if time is None else f"{time:.2f}" for time in times]
        out.append(
            f"| {name.partition(':')[0]} | {len(shared.kv_layers)} | {shared.cache_bytes_per_token(4):,} "
            f"| {line['perplexity']:.1f} | {shown[0]} ({f'{training:.2f}' if is_papers else '-'}) | {shown[1]} "
            f"| {counted:.2f} ({papers_prefill_cost(shared):.2f}) | {shown[2]} "
            f"| {f'{accuracy:.2f}' if is_papers and accuracy else '-'} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    """Runs the missing parts of the study and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text; a twentieth is held out")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the runs and the results")
    parser.add_argument("--report", type=Path, help="Markdown file to write; default: standard output")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="micro")
    parser.add_argument(
        "--kv-layers", type=int, nargs="+", metavar="N", help="default: half of the layers, and a quarter and one more"
    )
    parser.add_argument("--names", nargs="*", choices=NAMES, default=NAMES, help="ways of sharing to study (all nine)")
    parser.add_argument("--tokenizer", help="take this model's tokenizer; default: train one on the text")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="vocabulary of the tokenizer that is trained (4096)"
    )
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=2, help="rows of the standard model, whose cache is the budget (2)")
    parser.add_argument("--context", type=int, default=512, help="tokens that the cache of a row holds (512)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the timed prefill (512)")
    parser.add_argument("--rounds", type=int, default=4, help="timed turns of each model (4)")
    parser.add_argument(
        "--without-speed", action="store_true", help="only train; the times can be measured later, on an idle machine"
    )
    options = parser.parse_args()
    keep_freed_memory()
    steps = options.num_steps
    settings = TrainingSettings(
        sequence_length=options.sequence_length, batch_size=options.batch_size, num_steps=steps, seed=options.seed,
        learning_rate=options.learning_rate, warmup_steps=steps // 10, compute_dtype=options.compute_dtype,
        eval_every=steps, checkpoint_every=max(1, steps // 2), keep_checkpoints=1,
    )  # fmt: skip
    config, keep = run_study(options, settings)
    write_report(options.report, MARK, report(config, keep, options, settings))


if __name__ == "__main__":
    main()
