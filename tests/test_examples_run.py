"""The examples run as they stand, and print the results that their docstrings promise."""

import re
import runpy
from pathlib import Path

import pytest
from first_layers import first_layers

from hshare_jax.models.pretrained import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A function that runs an example on four layers and the beginning of the text, and returns the printed text."""
    whole = Path.read_text

    def beginning(path: Path, **how: str) -> str:
        text = whole(path, **how)
        return text[:7000] if path.name == "demo_prompt.txt" else text

    def run(name: str) -> str:
        monkeypatch.setattr(Path, "read_text", beginning)
        monkeypatch.setattr("hshare_jax.models.pretrained.load_model", lambda name: first_layers(load_model(name), 4))
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def reads_of(printed: str, pattern: str) -> list[tuple[int, int]]:
    return [(int(reads), int(length)) for reads, length in re.findall(pattern, printed)]


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"decode_step.py", "evaluate.py", "generate.py"}


def test_generate_reads_less_with_hshare_than_dense(run_example) -> None:
    printed = run_example("generate.py")
    (sparse, length), (dense, same_length) = reads_of(printed, r"read (\d+) of (\d+) tokens in a step and wrote:\n.")
    assert sparse < 0.6 * length
    assert dense == same_length


def test_decode_step_reads_a_part_of_the_long_row_and_all_of_the_short_row(run_example) -> None:
    (long_reads, long), (short_reads, short) = reads_of(run_example("decode_step.py"), r"read (\d+) of (\d+) tokens")
    assert long_reads < 0.6 * long
    assert short_reads == short


def test_evaluate_scores_three_methods_at_one_budget(run_example) -> None:
    printed = run_example("evaluate.py")
    assert re.findall(r"(\w+) +KL \d\.\d{4}  agreement \d+%", printed) == ["HShare", "Quest", "StreamingLLM"]
    reads = [reads for reads, _ in reads_of(printed, r"reads (\d+) of (\d+) tokens")]
    assert max(reads) - min(reads) < 16, "Quest reads whole pages of 16 tokens"
