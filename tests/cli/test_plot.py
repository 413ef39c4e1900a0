"""`hshare-jax plot`: the figures that it draws, and the mistakes that it tells before it loads a model."""

from pathlib import Path

import pytest
from random_weights import random_params
from result_lines import EVAL, eval_line, write
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.cli import plot as cli_plot
from hshare_jax.cli.errors import Parser, UsageError
from hshare_jax.cli.plot import add_plot
from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig

TINY = ModelConfig(
    vocab_size=len(dict.fromkeys(LETTERS)) + 5, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=8, max_positions=256, windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
BUDGET = ["--num-sinks", "1", "--num-critical", "6", "--num-recent", "3"]


def call(*arguments: str) -> int:
    parser = Parser(prog="hshare-jax plot")
    add_plot(parser)
    options = parser.parse_args(arguments)
    return options.run(options)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replaces the built-in model by a tiny one; the folder holds prompts and results."""
    model = pretrained.Model(TINY, random_params(TINY), byte_tokenizer(LETTERS), (), "tiny", "")
    files = pretrained.ModelFiles(TINY, model.tokenizer, (), "tiny", "float32", lambda dtype, quantize, mesh: iter(()))
    monkeypatch.setattr(cli_plot, "open_named", lambda options: files)
    monkeypatch.setattr(pretrained.ModelFiles, "load", lambda self, dtype=None, quantize="auto", **_: model)
    (tmp_path / "prompt.txt").write_text("it is a truth that is known to all, that a man in want of a wife is in luck.")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "there.png").touch()
    write(tmp_path / "eval.jsonl", EVAL, eval_line("hshare", 0.02))
    write(tmp_path / "dense.jsonl", EVAL, eval_line("dense", 0.0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_text_is_drawn_in_every_way(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli_plot.OF_TEXT:
        steps = ["--steps", "3"] if name == "steps" else []
        assert call(name, "-f", "prompt.txt", *BUDGET, *steps, "--output", f"{name}.svg") == 0
        assert (tiny / f"{name}.svg").read_text().endswith("</svg>\n")
    assert "wrote plan.svg" in capsys.readouterr().err


def test_results_are_drawn_in_several_files(tiny: Path) -> None:
    arguments = ["quality", "--results", "eval.jsonl", "--output", "q.png", "there.png"]
    assert call(*arguments, "--overwrite") == 0
    assert (tiny / "q.png").read_bytes() == (tiny / "there.png").read_bytes() != b""


MISTAKES = {
    "no prompt": ("heads --output a.png", "no prompt: give one with --prompt-file"),
    "two prompts": ("heads -f prompt.txt -f prompt.txt --output a.png", "--prompt-file is given 2 times"),
    "no such prompt": ("plan -f no.txt --output a.png", "--prompt-file no.txt: No such file"),
    "empty prompt": ("plan -f empty.txt --output a.png", "empty.txt is empty"),
    "short prompt": ("layers -f short.txt --output a.png", "it needs 944, with twice as many"),
    "no steps": ("steps -f prompt.txt --steps 0 --output a.png", "--steps 0 must be at least 1"),
    "too many steps": (
        "steps -f prompt.txt --steps 99 --output a.png --num-critical 4 --num-recent 2 --num-sinks 0",
        "and 2 * 99 that are decoded",
    ),
    "all dense": ("plan -f prompt.txt --dense-layers 3 --output a.png", "--dense-layers 3 leaves none"),
    "no critical tokens": ("plan -f prompt.txt --num-critical 0 --output a.png", "--num-critical 0 must be at least 1"),
    "too many channels": (
        "plan -f prompt.txt --label-channels 9 --output a.png",
        "--label-channels 9 must be at most the model's head_dim=8",
    ),
    "no channels file": (
        "plan -f prompt.txt --channels-file no.json --output a.png --num-critical 4 --num-recent 2",
        "no.json: No such file",
    ),
    "another suffix": ("heads -f prompt.txt --output a.pdf", "--output a.pdf must end in .png or .svg"),
    "an output twice": ("heads -f prompt.txt --output a.png a.png", "--output names a.png twice"),
    "a file that is there": ("heads -f prompt.txt --output there.png", "there.png exists; give --overwrite"),
    "no such results": ("quality --results no.jsonl --output a.png", "--results no.jsonl: No such file"),
    "prose for results": ("quality --results prompt.txt --output a.png", "does not begin with a line that names"),
    "prompt replaced": (
        "plan --prompt-file there.png --output there.png --overwrite",
        "would replace there.png, which",
    ),
    "dense results": ("quality --results dense.jsonl --output a.png", "no line has a divergence to plot"),
    "no times": ("speed --results eval.jsonl --output a.png", "no method has both"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_model_is_loaded(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pretrained.ModelFiles, "load", load)
    arguments, expected = MISTAKES[name]
    with pytest.raises(UsageError) as error:
        call(*arguments.split())
    assert expected in str(error.value)
    assert not (tiny / "a.png").exists()


def test_without_matplotlib_the_command_says_how_to_get_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli_plot.sys.modules, "matplotlib", None)  # what Python keeps for a module that is not there
    with pytest.raises(UsageError, match=r"pip install 'hshare-jax\[eval\]'"):
        call("quality", "--results", "eval.jsonl", "--output", "a.png")
