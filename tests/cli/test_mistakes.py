"""Mistakes in a call of `hshare-jax generate`: one line that names them, exit status 2, and no model is loaded."""

import io
import sys
from pathlib import Path

import pytest
from command_line import call

from hshare_jax.models import pretrained

pytestmark = pytest.mark.usefixtures("cached_model")

USAGE_MISTAKES = {
    # arguments after `generate`, what the message must say
    "no prompt file": (["-f", "no/such/file.txt"], "no/such/file.txt: No such file"),
    "directory as prompt file": (["-f", "{tmp}"], "Is a directory"),
    "empty prompt": ([""], "prompt 1 is empty"),
    "blank second prompt": (["a", "  \n"], "prompt 2 is empty"),
    "empty prompt file": (["-f", "{tmp}/empty.txt"], "empty.txt is empty"),
    "binary prompt file": (["-f", "{tmp}/binary.txt"], "binary.txt is not UTF-8 text (byte 0)"),
    "prompt file in UTF-16": (["-f", "{tmp}/binary.txt"], "it has the mark of UTF-16; convert it to UTF-8"),
    "prompt not UTF-8": (["caf\udce9"], "argument prompt: the text is not UTF-8 text (character 3 is U+DCE9"),
    "system message not UTF-8": (["a", "--system", "\udce9"], "argument --system: the text is not UTF-8"),
    "stop not UTF-8": (["a", "--stop", "\udce9"], "argument --stop: the text is not UTF-8"),
    "unknown option": (["a", "--max-tokens", "3"], "unrecognized arguments: --max-tokens"),
    "zero new tokens": (["a", "-n", "0"], "--max-new-tokens 0 must be at least 1"),
    "new tokens not a number": (["a", "-n", "many"], "'many' is not a whole number"),
    "negative temperature": (["a", "--temperature", "-1"], "--temperature -1.0 must be at least 0"),
    "temperature not a number": (["a", "--temperature", "warm"], "'warm' is not a number"),
    "nan temperature": (["a", "--temperature", "nan"], "--temperature nan must be at least 0"),
    "top-p above 1": (["a", "--top-p", "1.5"], "--top-p 1.5 must lie in (0, 1]"),
    "top-p of 0": (["a", "--top-p", "0"], "--top-p 0.0 must lie in (0, 1]"),
    "min-p above 1": (["a", "--min-p", "2"], "--min-p 2.0 must lie in [0, 1]"),
    "negative top-k": (["a", "--top-k", "-3"], "--top-k -3 must be at least 0"),
    "repetition penalty of 0": (["a", "--repetition-penalty", "0"], "--repetition-penalty 0.0 must be above 0"),
    "negative seed": (["a", "--seed", "-1"], "--seed -1 must lie between 0 and"),
    "seed too large for two": (["a", "b", "--seed", "2147483647"], "must lie between 0 and 2147483646"),
    "empty stop": (["a", "--stop", ""], "--stop is empty"),
    "unknown dtype": (["a", "--dtype", "int8"], "invalid choice: 'int8'"),
    "unknown method": (["a", "--method", "magic"], "invalid choice: 'magic'"),
    "plan of another method": (
        ["a", "--method", "h2o", "--plan-file", "p"],
        "--plan-file is for --method hshare, not h2o",
    ),
    "plan of Double Sparsity": (
        ["a", "--method", "double_sparsity", "--plan-file", "p"],
        "--plan-file is for --method",
    ),
    "scoring of Quest": (
        ["a", "--method", "quest", "--scoring", "exact"],
        "--scoring is for --method hshare",
    ),
    "ratio of H2O": (
        ["a", "--method", "h2o", "--budget-ratio", "1/8"],
        "--budget-ratio is for --method hshare",
    ),
    "budget below a page": (
        ["a", "--method", "quest", "--num-sinks", "1", "--num-critical", "1", "--num-recent", "1"],
        "a budget of 3 tokens is too small for quest; it needs at least 16",
    ),
    "no critical tokens": (["a", "--num-critical", "0"], "--num-critical 0 must be at least 1"),
    "no recent tokens": (["a", "--num-recent", "0"], "--num-recent 0 must be at least 1"),
    "negative sinks": (["a", "--num-sinks", "-1"], "--num-sinks -1 must be at least 0"),
    "no probes": (["a", "--num-probes", "0"], "--num-probes 0 must be at least 1"),
    "no label channels": (["a", "--label-channels", "0"], "--label-channels 0 must be at least 1"),
    "more label channels than a head has": (["a", "--label-channels", "65"], "at most the model's head_dim=64"),
    "infinite temperature": (["a", "--temperature", "inf"], "and finite"),
    "two ratios": (["a", "--sharing-ratio", "1/2-1/2"], "--sharing-ratio 1/2-1/2 must be three fractions"),
    "ratio of words": (["a", "--sharing-ratio", "a-b-c"], "must be three fractions layer-head-query"),
    "ratio above 1": (
        ["a", "--sharing-ratio", "3/2-1-1"],
        "the layer ratio of --sharing-ratio, 3/2 must lie in (0, 1]",
    ),
    "ratio of 0": (["a", "--sharing-ratio", "1-0-1"], "the head ratio of --sharing-ratio, 0 must lie in (0, 1]"),
    "ratio divided by 0": (["a", "--sharing-ratio", "1/0-1-1"], "must be three fractions layer-head-query"),
    "query ratio no unit fraction": (
        ["a", "--sharing-ratio", "1-1-2/3"],
        "--sharing-ratio 1-1-2/3 must end in one over the refresh interval",
    ),
    "misspelt model": (["a", "--model", "smollm2-135m-instuct"], "did you mean smollm2-135m-instruct?"),
    "missing model file": (["a", "--model", "no/such/model.gguf"], "no/such/model.gguf does not exist"),
    "directory without a model": (["a", "--model", "{tmp}"], "has no config.json"),
    "a file that is no model": (["a", "--model", "{tmp}/empty.txt"], "not a .gguf file"),
    "revision of a built-in": (["a", "--revision", "main"], "is for Hugging Face hub ids"),
    "prompt beyond the model": (["word " * 8200], "beyond the model's 8192 positions"),
    "output beyond the model": (["a", "-n", "8192"], "beyond the model's 8192 positions"),
    "budget ratio above 1": (["a", "--budget-ratio", "3/2"], "--budget-ratio 3/2 must lie in (0, 1]"),
    "budget ratio divided by 0": (["a", "--budget-ratio", "1/0"], "'1/0' is not a fraction such as 1/8"),
    "label bits without labels": (
        ["a", "--scoring", "exact", "--label-bits", "none"],
        "--label-bits has no effect: --scoring exact reads keys and has no labels",
    ),
    "channels without labels": (
        ["a", "--scoring", "exact", "--channels-file", "{tmp}/channels.json"],
        "channels.json has no effect: --scoring exact reads keys and has no labels: leave it out",
    ),
    "anchors of lists": (
        ["a", "--plan-kind", "anchors", "--sharing-ratio", "1/2-3/4-1"],
        "the head ratio of --sharing-ratio, 3/4 must be 1 with --plan-kind anchors",
    ),
    "top-p of greedy decoding": (["a", "--top-p", "0.9"], "--top-p has no effect at --temperature 0, which is greedy"),
    "dilation without reuse": (["a", "--dilate"], "--dilate has no effect: dilation is for lists that later steps"),
    "no refresh interval": (["a", "--refresh-interval", "0"], "--refresh-interval 0 must be at least 1"),
    "two intervals": (
        ["a", "--sharing-ratio", "1-1-1/3", "--refresh-interval", "2"],
        "--refresh-interval 2 contradicts --sharing-ratio 1-1-1/3, whose last part means 3; leave either out",
    ),
    "negative dense layers": (["a", "--dense-layers", "-1"], "--dense-layers -1 must be at least 0"),
    "negative min length": (["a", "--min-length", "-1"], "--min-length -1 must be at least 0"),
    "5 bits": (["a", "--label-bits", "5"], "'5' is not 4, 8 or none"),
    "probes of words": (["a", "--num-probes", "some"], "'some' is not a whole number or all"),
    "unknown preset": (["a", "--preset", "best"], "invalid choice: 'best'"),
    "unknown scoring": (["a", "--scoring", "best"], "invalid choice: 'best'"),
    "budget of dense": (["a", "--method", "dense", "--num-sinks", "1"], "--num-sinks is for sparse decoding"),
    "flag of dense": (["a", "--method", "dense", "--no-dilate"], "--dilate is for sparse decoding"),
    "preset of dense": (["a", "--method", "dense", "--preset", "hshare-paper"], "--preset is for sparse decoding"),
    "plan of dense": (["a", "--method", "dense", "--plan-file", "p"], "--plan-file is for sparse decoding"),
    "no plan file": (["a", "--plan-file", "no/plan.json"], "no/plan.json: No such file"),
    "no channels file": (["a", "--channels-file", "no/channels.json"], "no/channels.json: No such file"),
    "plan file not JSON": (["a", "--plan-file", "{tmp}/empty.txt"], "empty.txt is not JSON"),
    "channels file of another shape": (["a", "--channels-file", "{tmp}/channels.json"], "key model.layers.1.self_attn"),
    "plan file of another shape": (["a", "--plan-file", "{tmp}/plan.json"], "must be a list of 30 layer numbers"),
    "unknown implementation": (["a", "--impl", "magic"], "invalid choice: 'magic'"),
    "dense against dense": (["a", "--compare-dense", "--method", "dense"], "choose another --method"),
}


@pytest.mark.parametrize("name", USAGE_MISTAKES)
def test_a_mistake_is_told_in_one_line_before_the_model_is_loaded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "channels.json").write_text('{"model.layers.0.self_attn.qk_proj": [[0], [1], [2]]}')
    (tmp_path / "plan.json").write_text('{"layer.share_config": [0, 1]}')

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
