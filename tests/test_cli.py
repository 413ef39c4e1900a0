"""The command line: what it prints where, and one clear line with the right exit status for every mistake."""

import io
import json
import sys
from pathlib import Path

import pytest

from hshare_jax import cli
from hshare_jax.models import pretrained


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the command line's compile cache out of the other tests of this process."""
    monkeypatch.setattr(cli, "_keep_compiled_programs", lambda directory: None)


@pytest.fixture(autouse=True, scope="module")
def cached_model() -> None:
    """Fetches and converts the built-in model, so that no test sees that first start."""
    pretrained.open_model("smollm2-135m-instruct")


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


USAGE_MISTAKES = {
    # arguments after `generate`, what the message must say
    "no prompt file": (["-f", "no/such/file.txt"], "no/such/file.txt: No such file"),
    "directory as prompt file": (["-f", "{tmp}"], "Is a directory"),
    "empty prompt": ([""], "prompt 1 is empty"),
    "blank second prompt": (["a", "  \n"], "prompt 2 is empty"),
    "empty prompt file": (["-f", "{tmp}/empty.txt"], "empty.txt is empty"),
    "binary prompt file": (["-f", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text (byte 0)"),
    "unknown option": (["a", "--max-tokens", "3"], "unrecognized arguments: --max-tokens"),
    "zero new tokens": (["a", "-n", "0"], "--max-new-tokens 0 must be at least 1"),
    "new tokens not a number": (["a", "-n", "many"], "'many' is not a whole number"),
    "negative temperature": (["a", "--temperature", "-1"], "temperature=-1.0 must be at least 0"),
    "temperature not a number": (["a", "--temperature", "warm"], "'warm' is not a number"),
    "nan temperature": (["a", "--temperature", "nan"], "temperature=nan must be at least 0"),
    "top-p above 1": (["a", "--top-p", "1.5"], "top_p=1.5 must lie in (0, 1]"),
    "top-p of 0": (["a", "--top-p", "0"], "top_p=0.0 must lie in (0, 1]"),
    "min-p above 1": (["a", "--min-p", "2"], "min_p=2.0 must lie in [0, 1]"),
    "negative top-k": (["a", "--top-k", "-3"], "top_k=-3 must be at least 0"),
    "repetition penalty of 0": (["a", "--repetition-penalty", "0"], "repetition_penalty=0.0 must be above 0"),
    "negative seed": (["a", "--seed", "-1"], "--seed -1 must lie between 0 and"),
    "empty stop": (["a", "--stop", ""], "--stop is empty"),
    "unknown dtype": (["a", "--dtype", "int8"], "invalid choice: 'int8'"),
    "unknown method": (["a", "--method", "magic"], "invalid choice: 'magic'"),
    "no critical tokens": (["a", "--num-critical", "0"], "num_critical=0 must be at least 1"),
    "no recent tokens": (["a", "--num-recent", "0"], "num_recent=0 must be at least 1"),
    "negative sinks": (["a", "--num-sinks", "-1"], "num_sinks=-1 must be at least 0"),
    "no probes": (["a", "--num-probes", "0"], "num_probes=0 must be at least 1"),
    "no label channels": (["a", "--label-channels", "0"], "label_channels=0 must be at least 1"),
    "more label channels than a head has": (["a", "--label-channels", "65"], "at most the model's head_dim=64"),
    "infinite temperature": (["a", "--temperature", "inf"], "and finite"),
    "two ratios": (["a", "--sharing-ratio", "1/2-1/2"], "must be three fractions layer-head-query"),
    "ratio of words": (["a", "--sharing-ratio", "a-b-c"], "must be three fractions layer-head-query"),
    "ratio above 1": (["a", "--sharing-ratio", "3/2-1-1"], "layer_ratio=3/2 must lie in (0, 1]"),
    "ratio of 0": (["a", "--sharing-ratio", "1-0-1"], "head_ratio=0 must lie in (0, 1]"),
    "ratio divided by 0": (["a", "--sharing-ratio", "1/0-1-1"], "must be three fractions layer-head-query"),
    "query ratio no unit fraction": (["a", "--sharing-ratio", "1-1-2/3"], "must be one over the refresh interval"),
    "misspelt model": (["a", "--model", "smollm2-135m-instuct"], "did you mean smollm2-135m-instruct?"),
    "missing model file": (["a", "--model", "no/such/model.gguf"], "no/such/model.gguf does not exist"),
    "directory without a model": (["a", "--model", "{tmp}"], "has no config.json"),
    "a file that is no model": (["a", "--model", "{tmp}/empty.txt"], "not a .gguf file"),
    "revision of a built-in": (["a", "--revision", "main"], "revision='main' is for Hugging Face hub ids"),
    "prompt beyond the model": (["word " * 8200], "beyond the model's 8192 positions"),
    "output beyond the model": (["a", "-n", "8192"], "beyond the model's 8192 positions"),
    "dense against dense": (["a", "--compare-dense", "--method", "dense"], "needs --method hshare"),
}


@pytest.mark.parametrize("name", USAGE_MISTAKES)
def test_a_mistake_is_told_in_one_line_before_the_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pretrained.ModelFiles, "load", load)
    arguments, expected = USAGE_MISTAKES[name]
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    status, out, err = call(["generate", *arguments], capsys)
    assert (status, out) == (2, "")
    assert expected in err
    assert err.startswith("hshare-jax: error: ")
    assert err.count("\n") == 1


def test_no_prompt_at_all_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    status, _, err = call(["generate"], capsys)
    assert status == 2
    assert "no prompt: give one as an argument, with --prompt-file, or on standard input" in err


def test_convert_refuses_an_existing_target_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(["convert", "smollm2-135m-instruct", str(tmp_path)], capsys)
    assert status == 2
    assert "exists; give --overwrite to replace it" in err


def test_a_damaged_model_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    status, out, err = call(["generate", "a", "--model", str(tmp_path / "model.gguf")], capsys)
    assert (status, out) == (1, "")
    assert "model.gguf" in err


def test_text_goes_to_stdout_and_statistics_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(["generate", "What is the capital of France?", "-n", "16"], capsys)
    assert (status, out) == (0, "The capital of France is Paris.\n")
    assert err.startswith("hshare 7/8-3/4-1/2 budget 128 | prompt 37 tokens, ")
    assert err.count("\n") == 1


def test_prompts_from_everywhere_form_one_json_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("Name a colour.", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Name a fruit."))
    arguments = ["generate", "Say hello.", "-f", str(tmp_path / "prompt.txt"), "-f", "-", "--json", "-n", "16"]
    status, out, _ = call(arguments, capsys)
    result = json.loads(out)
    assert status == 0
    assert result["model"] == "smollm2-135m-instruct"
    assert len(result["outputs"]) == 3
    assert all(output["text"] and output["finish_reason"] in ("stop", "length") for output in result["outputs"])
    assert result["statistics"]["new_tokens"] == sum(len(output["tokens"]) for output in result["outputs"])


def test_info_counts_parameters_and_cache_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(["info", "smollm2-135m-instruct", "--json"], capsys)
    facts = json.loads(out)
    assert status == 0
    assert facts["parameters"] == 134_515_008
    assert facts["cache_bytes_per_token"] == 2 * 30 * 3 * 64 * 4


def test_help_names_every_option_once(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(["generate", "--help"], capsys)
    assert status == 0
    for option in ("--max-new-tokens", "--temperature", "--top-p", "--seed", "--dtype", "--prompt-file", "--stop"):
        assert out.count(f"  {option}") + out.count(f", {option}") >= 1
