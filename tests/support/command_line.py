"""The command line called as a function, and a tiny model for it."""

from pathlib import Path

import pytest
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.cli import main as cli
from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig

TINY = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=512,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
SMALL = [  # options of HShare for texts as short as TEXT
    *("--num-sinks", "2", "--num-critical", "6", "--num-recent", "4", "--label-channels", "4"),
    *("--sharing-ratio", "1/2-1/2-1/2"),
]
TEXT = "the rain in spain stays mainly in the plain, or so it is said."


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Calls `hshare-jax` and returns (exit status, standard output, standard error)."""
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def save_tiny(path: Path) -> str:
    """Writes a model of the shape TINY with random weights, and returns the path as a string."""
    pretrained.save_model(pretrained.Model(TINY, random_params(TINY), byte_tokenizer(LETTERS), (), "tiny", ""), path)
    return str(path)
