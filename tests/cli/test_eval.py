"""`hshare-jax eval`: the lines that it writes, runs that are resumed, and one clear line for every mistake."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from command_line import call
from random_weights import random_params
from tiny_tokenizer import byte_tokenizer

from hshare_jax.evaluation.tasks import TASKS as TASK_CLASSES
from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig

TINY = ModelConfig(
    vocab_size=261, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=512,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
SMALL = [
    "--num-sinks", "4", "--num-critical", "24", "--num-recent", "8", "--label-channels", "4", "--min-length", "0",
]  # fmt: skip
TEXT = "The rain in Spain stays mainly in the plain, or so it is said by those who have not seen it. " * 12
QUESTIONS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(2, 8)]
STORY = {
    "id": "rain", "story": "It rained in Spain.", "questions": [{"turn_id": 1, "input_text": "Where?"}],
    "answers": [{"turn_id": 1, "input_text": "Spain"}], "additional_answers": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    pretrained.save_model(pretrained.Model(TINY, random_params(TINY), byte_tokenizer(), (), "tiny", ""), path)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rendered = [
        {"task": "trec", "prompt": f"Q: {n}\nType:", "answers": ["Number"], "all_classes": ["Number", "Place"]}
        for n in range(2)
    ] + [{"task": "lcc", "prompt": "x = " * 200 + "\n", "answers": ["x = 1"], "all_classes": None}]
    for name, lines in (("questions.jsonl", QUESTIONS), ("rendered.jsonl", rendered)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "coqa.json").write_text(json.dumps({"version": "1.0", "data": [STORY]}))
    (tmp_path / "rain.txt").write_text(TEXT)
    return tmp_path


def evaluate(tiny: str, data: Path, *more: str) -> list[str]:
    arguments = [part.replace("{data}", str(data)) for part in more]
    return ["eval", "--model", tiny, "--output", str(data / "out.jsonl"), *SMALL, *arguments]


def lines_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "out.jsonl").read_text(encoding="utf-8").splitlines()]


TASKS = {
    "gsm8k": (["--data", "{data}/questions.jsonl", "--max-new-tokens", "5"], ("strict", "flexible"), 6),
    "coqa": (["--data", "{data}/coqa.json", "--max-new-tokens", "5"], ("em", "f1"), 1),
    "longbench": (["--data", "{data}/rendered.jsonl"], ("score",), 3),
    "passkey": (["--data", "{data}/rain.txt", "--context", "120", "--limit", "3"], ("found",), 3),
    "perplexity": (
        ["--data", "{data}/rain.txt", "--context", "120", "--steps", "8", "--limit", "2"],
        ("loss", "divergence", "agrees", "recall", "perplexity"), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_every_item_with_every_method(
    task: str, tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, scores, count = TASKS[task]
    command = evaluate(tiny, data, "--task", task, *arguments, "--method", "hshare", "dense", "--json")
    status, out, err = call(command, capsys)
    summary = json.loads(out)
    assert (status, err) == (0, "".join(f"hshare-jax: note: {note}\n" for note in summary["notes"]))
    assert (summary["task"], summary["model"], summary["bad"]) == (task, "tiny", 0)
    for method in ("hshare", "dense"):
        assert summary["methods"][method]["items"] == count
        assert set(scores) <= set(summary["methods"][method])
    study, *lines = lines_of(data)
    assert (study["task"], study["settings"]["num_critical"]) == (task, "24")
    assert len({(line["id"], line["method"]) for line in lines}) == len(lines) == 2 * count
    again = (data / "out.jsonl").read_bytes()
    assert call(command, capsys)[1] == out, "nothing was left to do, so the summary is the same"
    assert (data / "out.jsonl").read_bytes() == again


@pytest.mark.parametrize(
    ("arguments", "notes"),
    [
        ([], ["6 of 6 texts have fewer than the 60 tokens before decoding that a plan and tails are found from"]),
        (["--method", "double_sparsity"], []),
        (["--sharing-ratio", "1-1-1"], []),
        (["--num-recent", "20"], ["6 of 6 texts are no longer than the 48 tokens that a head reads: every method"]),
    ],
)
def test_texts_too_short_for_the_settings_are_told(
    arguments: list[str], notes: list[str], tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gsm8k = ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--max-new-tokens", "8", "--json"]
    status, out, err = call(evaluate(tiny, data, *gsm8k, *arguments), capsys)
    assert status == 0
    found = json.loads(out)["notes"]
    assert [note[: len(start)] for note, start in zip(found, notes, strict=True)] == notes
    assert err == "".join(f"hshare-jax: note: {note}\n" for note in found)


def test_a_results_file_that_cannot_be_written_is_refused(
    tiny: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluate(tiny, data, "--task", "gsm8k", "--data", "{data}/questions.jsonl", "--max-new-tokens", "2")
    assert call(command, capsys)[0] == 0
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root a file's mode would change nothing
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    status, _, err = call(command, capsys)
    assert (status, err) == (2, f"hshare-jax: error: --output {data / 'out.jsonl'} cannot be written: no permission\n")


def test_longbench_prompts_that_are_too_long_are_cut_in_the_middle(
    tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluate(tiny, data, "--task", "longbench", "--data", "{data}/rendered.jsonl", "--subset", "lcc")
    assert call(command, capsys)[0] == 0
    (line,) = lines_of(data)[1:]
    assert line["prompt_tokens"] == 512 - 64


def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(
    tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--max-new-tokens", "6", "--batch-size", "2"]
    command = evaluate(tiny, data, *arguments, "--method", "hshare", "streaming_llm")
    output = data / "out.jsonl"
    code = f"import sys; from hshare_jax.cli import main; sys.exit(main.main({command!r}))"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HSHARE_JAX_CACHE": str(data / "cache")}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while not output.exists() or output.read_bytes().count(b"\n") < 4:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert call(command, capsys)[0] == 0
    resumed = output.read_bytes()
    # Cut off in the middle of a batch, and of a line.
    for share in (0.35, 0.8):
        output.write_bytes(resumed[: round(share * len(resumed))])
        assert call(command, capsys)[0] == 0
        assert output.read_bytes() == resumed
    output.unlink()
    assert call(command, capsys)[0] == 0
    assert output.read_bytes() == resumed


def test_bad_examples_are_left_out_and_counted(tiny: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps(QUESTIONS[0]), "{broken", json.dumps({"question": "long " * 300, "answer": "#### 1"})]
    (data / "bad.jsonl").write_text("\n".join(lines) + "\n")
    command = evaluate(tiny, data, "--task", "gsm8k", "--data", "{data}/bad.jsonl", "--max-new-tokens", "3")
    status, _, err = call(command, capsys)
    assert status == 2
    assert "bad.jsonl:2: not JSON" in err
    assert "--skip-bad leaves such examples out" in err
    assert not (data / "out.jsonl").exists()
    status, out, _ = call([*command, "--skip-bad", "--json"], capsys)
    assert status == 0
    assert (json.loads(out)["bad"], json.loads(out)["methods"]["hshare"]["items"]) == (2, 1)


MISTAKES = {
    "no file": (["--task", "gsm8k", "--data", "no/questions.jsonl"], "no/questions.jsonl: No such file"),
    "missing key": (["--task", "gsm8k", "--data", "{data}/rendered.jsonl"], "rendered.jsonl:1: key 'question' is mis"),
    "not the task's file": (["--task", "coqa", "--data", "{data}/rain.txt"], "rain.txt"),
    "unknown task": (["--task", "magic", "--data", "{data}/rain.txt"], "invalid choice: 'magic'"),
    "two files of one name": (
        ["--task", "perplexity", "--data", "{data}/rain.txt", "other/rain.txt"], "--data names two files of one name",
    ),
    "negative seed": (["--task", "passkey", "--data", "{data}/rain.txt", "--seed", "-1"], "--seed -1 must be at least"),
    "kernels without a GPU": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--context", "120", "--impl", "pallas"],
        "--impl pallas runs on NVIDIA GPUs",
    ),
    "gate of a method without": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--method", "hshare", "h2o", "--min-length", "50"],
        "--min-length 50 is for hshare, exact_topk, double_sparsity; h2o does not use it",
    ),
    "no batch": (["--task", "passkey", "--data", "{data}/rain.txt", "--batch-size", "0"], "--batch-size 0 must be at"),
    "any number of passkeys": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--limit", "none"], "--limit none must be at least 1",
    ),
    "start beyond the end": (
        ["--task", "perplexity", "--data", "{data}/rain.txt", "--skip-start", "1"], "--skip-start 1 must lie in [0, 1)",
    ),
    "no text": (
        ["--task", "perplexity", "--data", "{data}/latin.txt"], "latin.txt is not UTF-8 text (byte 3)",
    ),
    "no book": (["--task", "passkey", "--data", "no/book.txt"], "--data no/book.txt: No such file"),
    "unknown method": (["--task", "passkey", "--data", "{data}/rain.txt", "--method", "magic"], "invalid choice"),
    "option of another task": (
        ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--steps", "3"], "--steps is for --task perplexity",
    ),
    "two files": (["--task", "gsm8k", "--data", "a", "b"], "--data names 2 files; --task gsm8k reads one"),
    "no items": (["--task", "passkey", "--data", "{data}/rain.txt", "--limit", "0"], "--limit 0 must be at least 1"),
    "steps beyond context": (
        ["--task", "perplexity", "--data", "{data}/rain.txt", "--context", "20", "--steps", "20"],
        "--steps 20 must be less than --context 20",
    ),
    "context beyond model": (
        ["--task", "perplexity", "--data", "{data}/rain.txt", "--context", "600"],
        "--context 600 must lie between 2 and the model's 512",
    ),
    "no room for the answer": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--context", "510"], "--context 510 must be at most 504",
    ),
    "depth": (["--task", "passkey", "--data", "{data}/rain.txt", "--context", "120", "--depth", "3/2"], "in [0, 1]"),
    "settings of dense": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--method", "dense"], "--num-sinks is for sparse decoding",
    ),
    "tiny budget": (
        ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--method", "hshare", "quest", "--num-critical", "1",
         "--num-recent", "1"],
        "too small for quest",
    ),
    "prompt longer than the model": (["--task", "gsm8k", "--data", "{data}/long.jsonl"], "long.jsonl:1: the prompt"),
    "story longer than the model": (
        ["--task", "coqa", "--data", "{data}/long.json"], "long.json: record 1, story:1: the prompt",
    ),
    "only prompts longer than the model": (
        ["--task", "gsm8k", "--data", "{data}/long.jsonl", "--skip-bad"], "no example is left: all 1 prompts are too",
    ),
    "no room for an answer": (
        ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--max-new-tokens", "512"],
        "questions.jsonl:1: max_new_tokens=512 of gsm8k must be below the model's 512 positions (--skip-bad",
    ),
    "broken line": (["--task", "gsm8k", "--data", "{data}/broken.jsonl"], "broken.jsonl:1: not JSON"),
    "empty prompt": (["--task", "gsm8k", "--data", "{data}/empty.jsonl"], "empty.jsonl:1: key 'question' is empty"),
    "bad examples of a text": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--skip-bad"], "--skip-bad is for --task gsm8k or coqa",
    ),
    "more windows than a text has": (
        ["--task", "perplexity", "--data", "{data}/rain.txt", "--context", "120", "--steps", "8", "--limit", "10000"],
        "--limit 10000 must be at most",
    ),
    "output that is an input": (
        ["--task", "gsm8k", "--data", "{data}/questions.jsonl", "--output", "{data}/questions.jsonl"],
        "questions.jsonl, which this command reads; name another path",
    ),
    "output below a file": (
        ["--task", "passkey", "--data", "{data}/rain.txt", "--output", "{data}/rain.txt/new/out.jsonl"],
        "rain.txt is not a directory",
    ),
    "no such longbench task": (
        ["--task", "longbench", "--data", "{data}/rendered.jsonl", "--subset", "lcc", "magic"],
        "--subset magic is none of LongBench's English tasks: narrativeqa, ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_model_is_loaded(
    name: str, tiny: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "long.jsonl").write_text(json.dumps({"question": "long " * 300, "answer": "#### 1"}) + "\n")
    (data / "broken.jsonl").write_text("{broken\n")
    (data / "empty.jsonl").write_text(json.dumps({"question": " ", "answer": "#### 1"}) + "\n")
    (data / "long.json").write_text(json.dumps({"data": [STORY | {"id": "story", "story": "long " * 300}]}))
    (data / "latin.txt").write_bytes(b"caf\xe9")
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    arguments, message = MISTAKES[name]
    status, out, err = call(evaluate(tiny, data, *arguments), capsys)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (data / "out.jsonl").exists()


@pytest.mark.parametrize(("file", "is_offered"), [("rain.txt", False), ("bad.json", True)])
def test_skipping_is_offered_where_it_would_help(
    file: str, is_offered: bool, tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "bad.json").write_text(json.dumps({"data": [STORY | {"story": ""}, STORY]}))
    status, _, err = call(evaluate(tiny, data, "--task", "coqa", "--data", str(data / file)), capsys)
    assert status == 2
    assert ("--skip-bad" in err) == is_offered


def test_results_of_another_run_are_refused_and_kept(tiny: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "passkey", "--data", "{data}/rain.txt", "--context", "120", "--limit", "1"]
    assert call(evaluate(tiny, data, *arguments), capsys)[0] == 0
    before = (data / "out.jsonl").read_bytes()
    status, _, err = call(evaluate(tiny, data, *arguments, "--seed", "3"), capsys)
    assert status == 2
    assert "out.jsonl holds results for seed='0', and this run has seed='3'; name another file" in err
    assert (data / "out.jsonl").read_bytes() == before
    # More items, or another method, go on in the same file.
    arguments[-1] = "2"
    assert call(evaluate(tiny, data, *arguments, "--method", "hshare", "dense"), capsys)[0] == 0
    assert (data / "out.jsonl").read_bytes().startswith(before)
    assert len(lines_of(data)) == 1 + 4
    status, _, err = call(evaluate(tiny, data, *arguments, "--dtype", "bfloat16"), capsys)
    assert status == 2
    assert "out.jsonl holds results for dtype='float32', and this run has dtype='bfloat16'" in err
    # Nor are they those of another model of the same name, such as the one trained further.
    other = data / "tiny"
    changed = jax.tree.map(lambda weight: 2 * weight, random_params(TINY))
    pretrained.save_model(pretrained.Model(TINY, changed, byte_tokenizer(), (), "tiny", ""), other)
    status, _, err = call(evaluate(str(other), data, *arguments), capsys)
    assert status == 2
    assert "out.jsonl holds results for identity=" in err
    # The summary is of what was asked for, whatever else the file holds.
    arguments[-1] = "1"
    status, out, _ = call(evaluate(tiny, data, *arguments, "--json"), capsys)
    assert (status, json.loads(out)["methods"]["hshare"]["items"]) == (0, 1)


def test_results_of_earlier_versions_are_refused_and_kept(
    tiny: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluate(tiny, data, "--task", "passkey", "--data", "{data}/rain.txt", "--context", "120", "--limit", "1")
    assert call(command, capsys)[0] == 0
    study, line = lines_of(data)
    settings = {"plan" if name == "plan_kind" else name: value for name, value in study["settings"].items()}
    earlier = json.dumps(study | {"settings": settings}) + "\n" + json.dumps(line) + "\n"
    (data / "out.jsonl").write_text(earlier)
    status, _, err = call(command, capsys)
    assert status == 2
    assert "out.jsonl holds results for no such setting, and this run has plan_kind='units'; name another file" in err
    assert (data / "out.jsonl").read_text() == earlier


def test_the_first_line_says_what_is_measured(tiny: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--context", "120", "--steps", "8", "--limit", "2", "--skip-start", "1/8", "--plan-kind", "published"]
    command = evaluate(tiny, data, "--task", "perplexity", "--data", "{data}/rain.txt", *arguments)
    assert call(command, capsys)[0] == 0
    study, *_ = lines_of(data)
    settings, identity = study.pop("settings"), study.pop("identity")
    assert study == {
        "results": "hshare_jax", "task": "perplexity", "model": "tiny", "data": ["rain.txt"],
        "data_sha256": [hashlib.sha256(TEXT.encode()).hexdigest()[:16]], "batch_size": 8, "impl": "auto",
        "dtype": "float32", "context": "120", "steps": "8", "skip_start": "1/8", "limit": 2,
    }  # fmt: skip
    assert len(identity) == 16
    # Settings and search are one flat record of texts.
    assert settings == {
        "num_sinks": "4", "num_critical": "24", "num_recent": "8", "budget_ratio": "None", "refresh_interval": "1",
        "lists_per": "kv_head", "dilate": "True", "dense_layers": "None", "min_length": "0", "scoring": "labels",
        "label_channels": "4", "label_bits": "4", "tail": "fitted", "tail_rank": "2", "pool": "1",
        "layer_ratio": "1/2", "head_ratio": "1", "plan_kind": "published", "plan_scope": "sequence", "num_probes": "64",
        "refit_interval": "512",
    }  # fmt: skip


def test_the_options_of_a_task_are_the_fields_of_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(["eval", "--help"], capsys)
    assert status == 0
    help = " ".join(out.split())
    for name, task in TASK_CLASSES.items():
        for field in dataclasses.fields(task):
            assert field.metadata["help"] in help, (name, field.name)
            assert f"--{field.name.replace('_', '-')} " in help


def test_only_the_task_that_needs_a_library_asks_for_it(
    tiny: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)  # how Python notes that a module is not there
    status, _, err = call(evaluate(tiny, data, "--task", "longbench", "--data", "{data}/rendered.jsonl"), capsys)
    assert (status, err) == (
        2, "hshare-jax: error: --task longbench needs rouge: pip install 'hshare-jax[eval]'\n",
    )  # fmt: skip
    gsm8k = evaluate(tiny, data, "--task", "gsm8k", "--data", "{data}/questions.jsonl", "--max-new-tokens", "2")
    assert call(gsm8k, capsys)[0] == 0
