"""Several processes on one machine answer as one does; only the first prints, and one that dies ends the others."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, load_model, save_model

CONFIG = ModelConfig(
    vocab_size=64, width=32, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=4096,
    windows=(None,) * 2,
)  # fmt: skip
FLOATS = ("--quantize", "none")
SETTINGS = ("--num-sinks", "2", "--num-critical", "16", "--num-recent", "6", "--min-length", "0", "--num-probes", "4")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model on disk."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(Model(CONFIG, random_params(CONFIG), byte_tokenizer(LETTERS), (), "tiny", "0" * 16), directory)
    return directory


def start(*arguments):
    """A process that runs a command, with one device of its own."""
    command = [sys.executable, "-m", "hshare_jax", *arguments]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_two(*arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    two = ("--num-processes", "2", "--coordinator-address", address, "--tensor-parallel-size", "2")
    return [start(*arguments, "--process-id", str(index), *two) for index in range(2)]


def asking(saved, new_tokens):
    """The command that answers a prompt."""
    return [
        "generate", "the rain in spain, again and again, is plain " * 3, "--model", str(saved),
        "--cache-dir", str(saved.parent / "cache"), "--max-new-tokens", str(new_tokens), *SETTINGS,
    ]  # fmt: skip


def test_two_processes_answer_as_one_and_the_first_alone_prints(saved):
    # Nothing is shared, because a plan would keep to the lists of a process.
    texts, errors, codes = [], [], []
    command = [*asking(saved, 12), "--sharing-ratio", "1-1-1"]
    for process in [*start_two(*command), start(*command)]:
        text, error = process.communicate(timeout=280)
        texts.append(text)
        errors.append(error)
        codes.append(process.returncode)
    assert codes == [0, 0, 0], errors
    assert texts[0] == texts[2]
    assert texts[1] == ""
    assert "hshare 1-1-1 budget" in errors[0]
    assert "hshare 1-1-1 budget" not in errors[1]


def test_two_processes_convert_a_model_that_one_reads(saved):
    converted = saved.parent / "converted"
    ends = [process.communicate(timeout=280) for process in start_two("convert", str(saved), str(converted), *FLOATS)]
    assert f"bytes) to {converted}" in ends[0][1], ends
    assert ends[1][0] == ""
    read, written = load_model(converted), load_model(saved)
    assert read.config == written.config
    assert read.identity == written.identity
    assert not list(saved.parent.glob(".*"))


def test_a_process_that_dies_ends_the_others(saved):
    first, second = start_two(*asking(saved, 3000))
    assert first.stdout is not None
    assert first.stdout.read(1)  # both decode
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, error = first.communicate(timeout=120)
    second.communicate()
    assert first.returncode != 0
    assert time.monotonic() - killed < 60
    assert "error" in error.lower()
