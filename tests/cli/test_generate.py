"""`hshare-jax generate`: what it prints where, and the statistics."""

import io
import json
import sys
from pathlib import Path

import pytest
from command_line import SMALL, TEXT, TINY, call
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.kernels.api import describe
from hshare_jax.models import pretrained


@pytest.mark.usefixtures("cached_model")
def test_text_goes_to_stdout_and_statistics_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(["generate", "What is the capital of France?", "-n", "16"], capsys)
    assert (status, out) == (0, "The capital of France is Paris.\n")
    assert err.startswith(
        "hshare 1/2-1-1 budget 512 | computes 0 of 90 lists every step | reads 41.0 of 41.0 tokens | "
    )
    assert " | prompt 37 tokens, " in err
    assert err.count("\n") == 1


def test_prompts_from_everywhere_form_one_json_batch(
    tiny: str, text_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfname a fruit.")))
    files = ["--prompt-file", text_file, "-f", "-"]
    status, out, _ = call(["generate", "say hello.", *files, "--model", tiny, "--json", "-n", "16"], capsys)
    result = json.loads(out)
    assert status == 0
    assert result["model"] == "tiny"
    assert len(result["outputs"]) == 3
    assert all(output["text"] and output["finish_reason"] in ("stop", "length") for output in result["outputs"])
    assert result["statistics"]["new_tokens"] == sum(len(output["tokens"]) for output in result["outputs"])
    assert result["statistics"]["impl"] == describe("auto")
    assert result["statistics"]["weight_bytes"] == 4 * TINY.num_parameters


def test_comparing_tells_both_speeds_and_what_dense_decoding_reads(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(["generate", TEXT, "--model", tiny, *SMALL, "--compare-dense", "--json"], capsys)
    found = json.loads(out)["statistics"]
    assert status == 0
    assert (found["computed_lists"], found["lists"], found["refresh_interval"]) == (1, 6, 2)
    assert found["times_dense"] == round(found["decode_tokens_per_second"] / found["dense_decode_tokens_per_second"], 2)
    assert found["mean_tokens_read"] < found["mean_length"]
    assert f"{found['times_dense']} times dense (" in err
    status, out, _ = call(["generate", TEXT, "--model", tiny, "--method", "dense", "--json"], capsys)
    found = json.loads(out)["statistics"]
    assert found["mean_tokens_read"] == found["mean_length"]
    assert "selections" not in found


def test_a_chat_template_that_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('there is no system here') }}"
    pretrained.save_model(pretrained.Model(TINY, random_params(TINY), tokenizer, (), "tiny", ""), tmp_path / "tiny")
    status, _, err = call(["generate", "hi", "--model", str(tmp_path / "tiny"), "--system", "be kind"], capsys)
    assert status == 2
    assert "tiny: the chat template refuses: there is no system here; leave out --system, or give --no-chat" in err


def test_named_chat_templates_without_a_default_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(LETTERS)
    tokenizer.chat_template = {"rag": "{{ messages[0].content }}", "tool_use": "a"}
    pretrained.save_model(pretrained.Model(TINY, random_params(TINY), tokenizer, (), "tiny", ""), tmp_path / "tiny")
    status, _, err = call(["generate", "hi", "--model", str(tmp_path / "tiny")], capsys)
    assert status == 2
    assert "tiny: the tokenizer has chat templates called rag, tool_use, and none is called default; call one" in err
    assert err.endswith("give --no-chat-template\n")
    assert call(["generate", "hi", "--model", str(tmp_path / "tiny"), "--no-chat-template", "-n", "1"], capsys)[0] == 0
