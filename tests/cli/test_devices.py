"""Options of devices and processes that do not fit together are told before any model is opened."""

import argparse

import pytest

from hshare_jax.cli import main
from hshare_jax.cli.devices import read_mesh
from hshare_jax.cli.errors import USAGE, UsageError
from hshare_jax.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=64, width=32, mlp_width=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, max_positions=64,
    windows=(None,) * 2,
)  # fmt: skip
ADDRESS = ("--coordinator-address", "127.0.0.1:9999")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-processes", "2"], "--process-id is missing; several processes need --num-processes, --process-id and"),
        (["--process-id", "0", *ADDRESS], "--num-processes is missing"),
        (["--num-processes", "2", "--process-id", "2", *ADDRESS], "--process-id 2 must lie between 0 and 1"),
        (
            ["--num-processes", "2", "--process-id", "0", "--coordinator-address", "9999"],
            "--coordinator-address 9999 must be HOST:PORT",
        ),
        (["--num-processes", "0", "--process-id", "0", *ADDRESS], "--num-processes 0 must be at least 1"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size 0 must be at least 1"),
    ],
)
def test_options_that_do_not_belong_together_are_told(capsys, options, message):
    assert main.main(["generate", "hello", "--model", "/no/such/model", *options]) == USAGE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parts", "groups", "message"),
    [
        (3, 1, "--tensor-parallel-size 3 devices cannot divide 4 kv heads, 8 query heads .* possible are 1, 2, 4, 8"),
        (8, 1, "--tensor-parallel-size 8 asks for 8 devices; jax finds 1; JAX_NUM_CPU_DEVICES makes a CPU several"),
        (2, 4, "--tensor-parallel-size 2 and --data-parallel-size 4 ask for 8 devices; jax finds 1"),
    ],
)
def test_devices_that_are_not_there_or_cannot_divide_the_model_are_told(parts, groups, message):
    options = argparse.Namespace(tensor_parallel_size=parts, data_parallel_size=groups)
    with pytest.raises(UsageError, match=message):
        read_mesh(options, CONFIG)


def test_one_device_needs_no_mesh():
    assert read_mesh(argparse.Namespace(tensor_parallel_size=1), CONFIG) is None
