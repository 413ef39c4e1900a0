"""Random calls of the library and of whole commands on tiny models, each of which must end in an answer or one error.

    PYTHONPATH=.:tests/support python scripts/fuzz.py --seeds 0 1000

A case is made from its seed alone. It is one call in this process: of `generate`, or of a command of the command line,
with files that are whole, cut short, changed in a bit or a value, or of another kind. A case fails if it

- ends in anything but an answer, a ValueError, or exit status 1 or 2 with one line on standard error;
- decodes within a budget that covers the text, and differs from dense decoding;
- holds a value that is no finite number;
- leaves a draft behind or a half-written file; or takes longer than `LIMIT` seconds.

Each failed case is printed with the command that repeats it. The exit status is 1 if there was one.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from command_line import SMALL, TEXT, TINY
from comparing import flipped
from quick_compile import compile_quickly
from random_weights import random_params
from result_lines import EVAL, STUDY, eval_line, speed_line, text_line, write
from tiny_models import tiny_model, write_gguf
from tiny_tokenizer import LETTERS, byte_tokenizer

import hshare_jax
import hshare_jax.cli.options
from hshare_jax import HShare, HShareSettings, PlanSearch, SamplingParams, SharePlan
from hshare_jax.cli import main as cli
from hshare_jax.methods.names import METHODS
from hshare_jax.methods.registry import method_named
from hshare_jax.models.pretrained import Model

compile_quickly()
LIMIT = 300  # seconds of one case; the first case of a method compiles, and other work may slow the machine down
NEW = 6  # most new tokens of an answer that is compared
FLAT = HShareSettings(num_sinks=2, num_critical=16, num_recent=6, label_channels=4, min_length=0)
WIDE = dataclasses.replace(FLAT, num_critical=240)  # covers every text that is compared
REUSING = dataclasses.replace(FLAT, refresh_interval=3, tail=None, lists_per="query_head")


class CaseError(AssertionError):
    """What a case did that it must not do."""


class LateError(BaseException):
    """A case took too long. No handler of the library may catch this."""


@dataclasses.dataclass(frozen=True)
class Seeds:
    """What all cases share: a folder with whole files, and the model that is decoded."""

    folder: Path
    model: Model

    @classmethod
    def make(cls, folder: Path) -> "Seeds":
        """Writes models in three forms, files that belong to them, data and texts."""
        tokenizer = byte_tokenizer(LETTERS)
        model = Model(TINY, random_params(TINY), tokenizer, (), "tiny", "0" * 16)
        hshare_jax.save_model(model, folder / "orbax")
        torch_model = tiny_model(vocab_size=64)
        torch_model.save_pretrained(folder / "hf")
        tokenizer.save_pretrained(folder / "hf")
        write_gguf(folder / "model.gguf", torch_model)
        loaded = hshare_jax.load_model(folder / "orbax")
        method = HShare(FLAT).with_sharing_ratio("1/2-1/2-1")
        copies = tuple(tuple(range(2)) if layer == 0 else (0, 1) for layer in range(3))
        hshare_jax.save_plan(folder / "plan.json", SharePlan(copies), loaded, method)
        channels = np.tile(np.arange(TINY.head_dim), (TINY.num_layers, TINY.num_kv_heads, 1))
        hshare_jax.save_channels(folder / "channels.json", channels, loaded)
        (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
        (folder / "bytes.txt").write_bytes(b"the caf\xe9")
        (folder / "wide.txt").write_text(TEXT, encoding="utf-16")
        (folder / "mark.txt").write_text(TEXT, encoding="utf-8-sig")
        (folder / "empty.txt").touch()
        questions = [{"question": "is it so?", "answer": "it is. #### 4"}, {"question": "and?", "answer": "#### 1,000"}]
        write(folder / "questions.jsonl", *questions)
        turns = {"questions": [{"turn_id": 1, "input_text": "who?"}], "answers": [{"turn_id": 1, "input_text": "he."}]}
        (folder / "coqa.json").write_text(json.dumps({"data": [{"id": "a", "story": "he sat.", **turns}]}))
        write(folder / "eval.jsonl", EVAL, eval_line("hshare", 0.02), eval_line("h2o", 0.1))
        write(folder / "study.jsonl", STUDY, text_line("hshare 1/2-1-1", 128, 140.0, 0.1), speed_line("h2o", 128, 2.5))
        return cls(folder, model)


# Values that an option, an argument or an entry of a file may get instead of a good one.
JUNK = (
    "", "-1", "0", "1", "nan", "inf", "1e400", "x", "none", "1/0", "9" * 25, "--", "\ufeff", "\x00", "caf\udce9",
    "a" * 700, "1e-50",
)  # fmt: skip
JUNK_JSON = (
    None, True, -1, 0, 7, 2**70, 0.5, math.nan, math.inf, "", "x", "\ud800", [], [[]], {}, {"a": 1}, [None], ["x"],
    [0, 0],
)  # fmt: skip


def random_text(rng: random.Random) -> str:
    """A prompt: mostly letters that the tokenizer knows, sometimes anything."""
    kind = rng.random()
    if kind < 0.7:
        return "".join(rng.choice("the rain in spain.") for _ in range(rng.randrange(1, 150)))
    if kind < 0.8:
        return "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(9))
    return rng.choice(JUNK)


def decode_case(rng: random.Random, seeds: Seeds, folder: Path) -> str:
    """`generate` with token ids: a covering budget gives the tokens of dense decoding, and a small one reads less."""
    rows = rng.choice((1, 2))
    # At most 246 tokens in all, so that every row has the same capacity and fits WIDE.
    lengths = [rng.choice((1, 2, 15, 16, 17, 63, 64, 65, rng.randrange(1, 240))) for _ in range(rows)]
    prompts = [[rng.randrange(TINY.vocab_size) for _ in range(length)] for length in lengths]
    name = rng.choice([method for method in METHODS if method != "dense"])
    settings = rng.choice((FLAT, WIDE) if name != "hshare" else (FLAT, WIDE, REUSING))
    if name not in ("hshare", "exact_topk", "double_sparsity"):
        settings = dataclasses.replace(settings, min_length=None)
    method = method_named(name, HShare(settings, PlanSearch(num_probes=4)), max_new_tokens=NEW)
    call: dict[str, Any] = {"max_new_tokens": rng.randrange(1, NEW + 1), "capacity": 256}
    if rng.random() < 0.3:
        call |= {"sampling": SamplingParams(temperature=1.0, top_k=5), "seeds": [rng.randrange(2**31) for _ in prompts]}
    model = dataclasses.replace(seeds.model, kv_cache_dtype=rng.choice(("auto", "int8")))
    found = hshare_jax.generate(model, prompts, method=method, **call)
    for tokens, prompt, reads in zip(found.tokens, prompts, found.usage.reads, strict=True):
        check(0 < len(tokens) <= call["max_new_tokens"], f"{len(tokens)} tokens are too many or none")
        check(all(0 <= token < TINY.vocab_size for token in tokens), f"{tokens} has an id outside the vocabulary")
        check(math.isfinite(reads) and 0 <= reads <= len(prompt) + NEW, f"{reads} reads of {len(prompt)} tokens")
    # snapkv_fixed lists tokens of the prompt once, so those that leave the last ones later are not read any more.
    if settings.num_critical == WIDE.num_critical and name != "snapkv_fixed":
        dense = hshare_jax.generate(model, prompts, method=None, **call)
        check(found.tokens == dense.tokens, f"{name} differs from dense: {found.tokens}, not {dense.tokens}")
    return f"{name} decodes"


def argument_case(rng: random.Random, seeds: Seeds, folder: Path) -> str:
    """`generate` with one wrong argument: an error before anything is computed, or an answer where it was not wrong."""
    values = (None, True, -1, 0, 1.5, 2**40, math.nan, "x", "", b"x", [], [1.5], ["\ud800"], [None], [[]], object())
    good: dict[str, Any] = {"prompts": [[1, 2]], "max_new_tokens": 1, "stop": (), "seeds": [3], "capacity": 256}
    place = rng.choice((*good, "setting", "sampling", "prompt"))
    value: Any = rng.choice(values)
    try:
        if place == "setting":
            settings = dataclasses.replace(FLAT, **{rng.choice(dataclasses.fields(FLAT)).name: value})
            good["method"] = HShare(settings)
            HShareSettings.check(settings, TINY)
            return "settings are taken"
        if place == "sampling":
            SamplingParams(**{rng.choice(dataclasses.fields(SamplingParams)).name: value})
            return "parameters are taken"
        good |= {"prompts": [value]} if place == "prompt" else {place: value}
        hshare_jax.generate(seeds.model, method=None, **good)
    except ValueError as error:
        check(str(error).strip() != "", f"{error!r} says nothing")
        return type(error).__name__
    return "generate answers"


def command_case(rng: random.Random, seeds: Seeds, folder: Path) -> str:
    """A command with random options on whole files."""
    arguments, files = random_command(rng, seeds.folder, folder)
    for _ in range(rng.choice((0, 0, 1, 2))):  # some words are replaced, left out or said twice
        place, kind = rng.randrange(1, len(arguments) + 1), rng.random()
        if kind < 0.5:
            arguments[place : place + 1] = [rng.choice(JUNK)]
        elif kind < 0.75:
            del arguments[place : place + 1]
        else:
            arguments[place:place] = arguments[place - 1 : place + 1]
    return run_command(rng, arguments, folder, files)


def file_case(rng: random.Random, seeds: Seeds, folder: Path) -> str:
    """A command one of whose files is damaged, swapped or has a changed value."""
    arguments, files = random_command(rng, seeds.folder, folder)
    path = rng.choice(files)
    copy = folder / path.name
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
    arguments = [argument.replace(str(path), str(copy)) for argument in arguments]
    inner, others = files_in(copy) if copy.is_dir() else [copy], files_in(seeds.folder)
    damage(rng, rng.choice(inner), others)
    if rng.random() < 0.7 and copy.is_dir():  # with checksums, a damaged checkpoint is refused before it is read
        (copy / "SHA256SUMS").unlink(missing_ok=True)
    return run_command(rng, arguments, folder, files)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, the smallest first: Orbax draws names, so the names' order is another in each run."""
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def damage(rng: random.Random, path: Path, others: Sequence[Path]) -> None:
    """Changes a file as disks, networks, editors and people do."""
    data = path.read_bytes()
    kinds = ["cut", "flip", "empty", "swap", "mark", "wide", "nest", "gone", "bytes"]
    kinds += ["value"] * 8 if path.suffix in (".json", ".jsonl") else []
    match rng.choice(kinds):
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        case "flip":
            position = rng.choice((rng.randrange(64), rng.randrange(max(len(data), 1))))
            path.write_bytes(flipped(data, position, rng.randrange(8)) if data else b"\x01")
        case "empty":
            path.write_bytes(b"")
        case "swap":
            path.write_bytes(rng.choice(others).read_bytes())
        case "mark":
            path.write_bytes(b"\xef\xbb\xbf" + data)
        case "wide":
            path.write_bytes(data.decode("latin-1").encode("utf-16"))
        case "nest":
            path.write_bytes(b"[" * 50_000)
        case "gone":
            path.unlink()
        case "bytes":
            place = rng.randrange(len(data) + 1)
            path.write_bytes(data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:])
        case "value":
            path.write_text(change_value(rng, data.decode(), is_lines=path.suffix == ".jsonl"))


def change_value(rng: random.Random, text: str, *, is_lines: bool) -> str:
    """JSON in which one value, somewhere, is another one or gone."""
    lines = text.splitlines() if is_lines else [text]
    index = rng.randrange(len(lines))
    value = [json.loads(lines[index])]
    parent: Any = value
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        key = rng.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
    if rng.random() < 0.2 and parent is not value:
        del parent[key]
    else:
        parent[key] = rng.choice(JUNK_JSON)
    lines[index] = json.dumps(value[0] if value else None)
    return "\n".join(lines) + "\n"


def random_command(rng: random.Random, source: Path, folder: Path) -> tuple[list[str], list[Path]]:
    """A command that would mostly work, and the files that it reads."""
    text, plan, channels = source / "text.txt", source / "plan.json", source / "channels.json"
    model = source / rng.choice(("orbax", "orbax", "hf", "model.gguf"))
    files, settings = [model], list(SMALL)
    match rng.choice(
        ("info", "info", "generate", "generate", "generate", "calibrate", "convert", "eval", "plot", "plot")
    ):
        case "info":
            arguments = ["info", str(model), *rng.choice(([], ["--json"], ["--kv-sharing", "cla:2"]))]
        case "generate":
            prompts = [random_text(rng) for _ in range(rng.choice((0, 1, 1, 2)))]
            arguments = ["generate", "--model", str(model), "-n", rng.choice(("1", "6")), "--quantize", "none"]
            if rng.random() < 0.5:
                prompt = source / rng.choice(("text.txt", "bytes.txt", "wide.txt", "mark.txt", "empty.txt"))
                arguments += ["-f", str(prompt)]
                files.append(prompt)
            method = rng.choice(("hshare", "hshare", "dense", *METHODS))
            if method in ("hshare", "double_sparsity") and rng.random() < 0.5:
                arguments += ["--channels-file", str(channels)]
                files.append(channels)
            if method == "hshare" and rng.random() < 0.5:
                arguments += ["--plan-file", str(plan)]
                files.append(plan)
                settings = settings[:-2]
            budget = settings if method == "hshare" else [] if method == "dense" else ["--num-critical", "40"]
            arguments += ["--method", method, *budget]
            arguments += rng.choice(([], ["--json"], ["--no-stream"], ["--stop", random_text(rng)], ["--seed", "3"]))
            arguments += rng.choice(([], [], ["--kv-cache-dtype", "int8"]))
            arguments += rng.choice(
                ([], ["--temperature", "1"], ["--system", random_text(rng)], ["--no-chat-template"])
            )
            arguments += ["--", *prompts]
        case "calibrate":
            arguments = ["calibrate", str(text), "--model", str(model), *settings, "--max-blocks", "1"]
            arguments += [*rng.choice((["--plan-file"], ["--channels-file"])), str(folder / "out.json")]
            files.append(text)
        case "convert":
            arguments = ["convert", str(model), str(folder / "out"), *rng.choice(([], ["--kv-sharing", "cla:2"]))]
        case "eval":
            task, name = rng.choice((("perplexity", "text.txt"), ("gsm8k", "questions.jsonl"), ("coqa", "coqa.json")))
            more = (
                ["--context", "64", "--steps", "4", "--limit", "1"]
                if task == "perplexity"
                else ["--max-new-tokens", "4"]
            )
            arguments = ["eval", "--task", task, "--data", str(source / name), "--output", str(folder / "out.jsonl")]
            arguments += ["--model", str(source / "orbax"), *settings, *more, *rng.choice(([], ["--json"]))]
            arguments += ["--skip-bad"] if task != "perplexity" and rng.random() < 0.5 else []
            files = [source / "orbax", source / name]
        case _:
            results = source / rng.choice(("eval.jsonl", "study.jsonl"))
            arguments = ["plot", rng.choice(("quality", "speed")), "--results", str(results)]
            arguments += ["--output", str(folder / "out.svg")]
            files = [results]
    return arguments, files


def run_command(rng: random.Random, arguments: list[str], folder: Path, files: Sequence[Path]) -> str:
    """Runs a command in this process; CaseError unless it ends as a command must."""
    out, err = io.TextIOWrapper(io.BytesIO(), rng.choice(("utf-8", "ascii"))), io.StringIO()
    data = rng.choice((b"", b"the rain", b"caf\xe9", b"\xff\xfet\x00"))
    said = "hshare-jax " + " ".join(map(repr, arguments))
    with redirected(io.TextIOWrapper(io.BytesIO(data)), out, err):
        try:
            status = cli.main(arguments)
        except SystemExit as exit:
            status = int(exit.code or 0)
        except Exception as error:  # whatever a command lets through is the fault that is looked for
            place = "".join(traceback.format_exception(error)[-3:])
            raise CaseError(f"{said}\n{place}") from error
    out.flush()
    printed = out.buffer.getvalue().decode(out.encoding)  # pyright: ignore[reportAttributeAccessIssue]
    lines = [line for line in err.getvalue().splitlines() if not line.startswith(("hshare-jax: note:", "WARNING:"))]
    check(status in (0, 1, 2), f"{said}: exit status {status}")
    if status:
        check(len(lines) == 1 and lines[0].startswith("hshare-jax: error: "), f"{said}: status {status} with {lines}")
        check(len(lines[0]) > len("hshare-jax: error: "), f"{said}: an error without a message")
    check("Traceback" not in err.getvalue(), f"{said}: a traceback")
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments  # what follows -- is a prompt
    if status == 0 and "--json" in options and arguments[0] == "generate":
        json.loads(printed, parse_constant=refuse_constant)
    check(not list(folder.glob(".*")), f"{said}: left {list(folder.glob('.*'))}")
    check_outputs(folder, status, said)
    return f"{arguments[0]} exit {status}"


def check_outputs(folder: Path, status: int, said: str) -> None:
    """Fails if a command that failed left a file, or one that did not left a file that is not whole."""
    for path in (folder / "out.json", folder / "out.svg"):
        check(not path.exists() or status == 0, f"{said}: wrote {path.name} and failed")
        check(not path.exists() or path.stat().st_size > 0, f"{said}: {path.name} is empty")
    if (folder / "out.json").exists():
        json.loads((folder / "out.json").read_text(), parse_constant=refuse_constant)
    if (folder / "out.jsonl").exists():
        for line in (folder / "out.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=refuse_constant)
    if (folder / "out").exists():
        hshare_jax.load_model(folder / "out")


def refuse_constant(name: str) -> float:
    """Raises CaseError for the numbers that are none in JSON."""
    raise CaseError(f"the output holds {name}")


def check(is_right: bool, message: str) -> None:
    """Raises CaseError unless a fact holds."""
    if not is_right:
        raise CaseError(message)


@contextlib.contextmanager
def redirected(stdin: Any, stdout: Any, stderr: Any) -> Iterator[None]:
    """Puts streams in the place of the standard ones."""
    kept = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = stdin, stdout, stderr
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = kept


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises LateError within the block once the time is over."""

    def stop(*_: object) -> None:
        raise LateError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CASES: tuple[Callable[[random.Random, Seeds, Path], str], ...] = (
    decode_case, argument_case, argument_case, command_case, command_case, file_case, file_case, file_case,
)  # fmt: skip


def run_case(seed: int, seeds: Seeds) -> tuple[str, str | None]:
    """Runs the case of a seed. Returns what it ended in, and what is wrong with that, or None."""
    rng = random.Random(seed)
    case = rng.choice(CASES)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # a command may write to a name like "1"
        try:
            with time_limit(LIMIT):
                return case(rng, seeds, Path(folder)), None
        except (Exception, LateError) as error:  # whatever it is, the next case runs
            told = str(error) if isinstance(error, CaseError) else "".join(traceback.format_exception(error)[-3:])
            return f"{case.__name__} fails", told or type(error).__name__


def run_cases(first: int, last: int, *, show: Callable[[str], object] = print) -> list[int]:
    """Runs the cases of the seeds from `first` up to but not including `last`. Returns the seeds that failed."""
    # Programs are kept in memory alone. They are dropped at times, because each needs memory mappings and Linux allows
    # 65,530; not often, because compiling is most of the work: 8,000 cases need some 18,000.
    kept = "hshare_jax.cli.options.keep_compiled_programs"
    ends, failed = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder, replaced(kept, lambda directory: None):
        seeds = Seeds.make(Path(folder))
        for seed in range(first, last):
            end, wrong = run_case(seed, seeds)
            ends[end] += 1
            if wrong is not None:
                failed.append(seed)
                show(f"seed {seed}: {wrong.strip()}\n  repeat: python scripts/fuzz.py --seeds {seed} {seed + 1}")
            if seed % 8000 == 7999:
                jax.clear_caches()
    show("\n".join(f"{count:6} {end}" for end, count in sorted(ends.items())))
    return failed


@contextlib.contextmanager
def replaced(name: str, value: object) -> Iterator[None]:
    """Puts a value in the place of a module's attribute."""
    module, _, attribute = name.rpartition(".")
    kept = getattr(sys.modules[module], attribute)
    setattr(sys.modules[module], attribute, value)
    try:
        yield
    finally:
        setattr(sys.modules[module], attribute, kept)


def main() -> int:
    """Runs the cases that the options name. Returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 200), metavar=("FROM", "TO"), help="the first seed, and the end"
    )
    first, last = parser.parse_args().seeds
    began = time.monotonic()
    failed = run_cases(first, last)
    print(f"{last - first} cases, seeds {first} to {last - 1}, {len(failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
