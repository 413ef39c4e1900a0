"""`hshare-jax convert`, as it is and with cross-layer KV sharing, on a tiny model."""

import argparse
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import TEXT, call
from comparing import assert_equal_trees
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer
from transformers import PreTrainedTokenizerFast

from hshare_jax.cli import convert as cli_convert
from hshare_jax.cli.main import main
from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.kv_sharing import Init, share_kv, share_weights
from hshare_jax.training.loss import perplexity

TINY = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
    windows=(None,) * 4, rope=RopeConfig(theta=100.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = pretrained.Model(TINY, random_params(TINY), byte_tokenizer(LETTERS), (), "tiny", "")
    pretrained.save_model(model, path)
    return str(path)


@pytest.mark.parametrize("init", ["mean", "copy"])
def test_convert_writes_a_model_that_shares_and_warns(
    tiny: str, init: Init, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "shared")
    given = [] if init == "mean" else ["--init", init]
    status, _, err = call(["convert", tiny, out, "--kv-sharing", "lckv:1", *given], capsys)
    assert status == 0
    assert "wrote tiny+lckv:1 (float32, " in err
    assert f" bytes) to {out}\n" in err
    assert "WARNING: 2 of 4 layers have keys and values" in err
    assert "untrained, this model is of no use" in err
    config = share_kv(TINY, "lckv:1")
    loaded = pretrained.load_model(out)
    assert loaded.config == config
    assert_equal_trees(loaded.params, share_weights(random_params(TINY), TINY, config, init))


def test_convert_without_sharing_neither_warns_nor_changes(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(["convert", tiny, str(tmp_path / "same")], capsys)
    size = 4 * TINY.num_parameters
    assert (status, err) == (0, f"wrote tiny (float32, {size:,} bytes) to {tmp_path / 'same'}\n")
    assert pretrained.load_model(tmp_path / "same").identity == pretrained.load_model(tiny).identity


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--quantize", "int8"],
            "--quantize int8 takes blocks of 32 neighbouring weights, and this model has rows of 48",
        ),
        (
            ["--quantize", "int8-channel", "--kv-sharing", "cla:2"],
            "--quantize int8-channel: shared weights are trained",
        ),
    ],
)
def test_bits_that_do_not_suit_are_refused_before_anything_is_written(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    status, _, err = call(["convert", tiny, str(tmp_path / "out"), *given], capsys)
    assert status == 2
    assert message in err
    assert not list(tmp_path.iterdir())


def test_convert_writes_fewer_bits_where_it_is_asked_to(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["convert", tiny, str(tmp_path / "few"), "--quantize", "int8-channel"], capsys)[0] == 0
    found = pretrained.load_model(tmp_path / "few", quantize="stored").params["embedding"]
    assert (found.qvalue.dtype, found.has_channel_scales) == (jnp.int8, True)


def test_convert_tells_the_perplexity_before_and_after(
    tiny: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = call(
        ["convert", tiny, str(tmp_path / "shared"), "--kv-sharing", "cla:2", "--perplexity", text_file], capsys
    )
    assert status == 0
    ids = byte_tokenizer(LETTERS)(TEXT)["input_ids"]
    shared = pretrained.load_model(tmp_path / "shared")
    windows = np.array([ids], np.int32)
    before = perplexity(random_params(TINY), windows, config=TINY)
    after = perplexity(shared.params, windows, config=shared.config)
    assert before != after
    assert f"perplexity {before:.3f} before, {after:.3f} after, of 1 x {len(ids) - 1} tokens\n" in err


def test_a_long_text_is_scored_in_windows(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text(TEXT * 20, encoding="utf-8")
    monkeypatch.setattr(cli_convert, "_CONTEXT", 15)
    monkeypatch.setattr(cli_convert, "_MAX_WINDOWS", 3)
    arguments = ["convert", tiny, str(tmp_path / "shared"), "--kv-sharing", "cla:2"]
    status, _, err = call([*arguments, "--perplexity", str(tmp_path / "long.txt")], capsys)
    assert status == 0
    assert "after, of 3 x 15 tokens\n" in err


def test_perplexity_is_that_of_decoding_token_by_token() -> None:
    config = share_kv(ModelConfig(**{**vars(TINY), "forward_passes": None}), "0_2_2_3")
    params = random_params(config)
    tokens = np.asarray([byte_tokenizer(LETTERS)(TEXT)["input_ids"][:12]], np.int32)
    state, losses = init_state(config, 1, 16, method=None, dtype=jnp.dtype("float32")), []
    for t in range(tokens.shape[1] - 1):
        logits, state = decode_step(params, jnp.asarray(tokens[:, t]), state, config=config)
        losses.append(-float(jax.nn.log_softmax(logits)[0, tokens[0, t + 1]]))
    found = perplexity(params, tokens, config=config)
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)  # float32, in another order


MISTAKES = {
    # arguments after `convert MODEL OUT`, what the message must say
    "unknown way": (["--kv-sharing", "burger:2"], "--kv-sharing burger:2: no way of sharing is called so; known are "),
    "too many KV layers": (["--kv-sharing", "cla:5"], "--kv-sharing cla:5: num_kv_layers=5 must lie between 1 and the"),
    "layer 0 looks up": (["--kv-sharing", "lckv:0"], "take bottom, or at least 2 KV layers"),
    "wrong length": (["--kv-sharing", "0_0_2"], "--kv-sharing 0_0_2: it has 3 entries; it needs one for each of 4"),
    "no KV layer": (["--kv-sharing", "0_0_1_1"], "kv_layer_map[2]=1 points to a layer without keys and values"),
    "no window": (["--kv-sharing", "0_0s_2_2"], "the model has no sliding window; give --kv-window N"),
    "idle window": (["--kv-sharing", "cla:2", "--kv-window", "8"], "--kv-sharing cla:2: --kv-window 8 has no effect"),
    "window of 0": (["--kv-sharing", "yoco", "--kv-window", "0"], "--kv-window 0 must be at least 1"),
    "window not a number": (["--kv-sharing", "yoco", "--kv-window", "wide"], "'wide' is not a whole number"),
    "unknown init": (["--kv-sharing", "cla:2", "--init", "best"], "invalid choice: 'best'"),
    "init alone": (["--init", "mean"], "--init is for sharing keys and values; add --kv-sharing"),
    "window alone": (["--kv-window", "8"], "--kv-window is for sharing keys and values; add --kv-sharing"),
    "perplexity alone": (["--perplexity", "{text}"], "--perplexity is for sharing keys and values; add --kv-sharing"),
    "passes alone": (["--forward-passes", "3"], "--forward-passes is for sharing keys and values; add --kv-sharing"),
    "no gradient": (["--kv-sharing", "cla:2", "--backward-passes", "0"], "--backward-passes 0 must be at least 1"),
    "unknown passes": (["--kv-sharing", "cla:2", "--forward-passes", "all"], "'all' is not a whole number or exact"),
    "no text": (["--kv-sharing", "cla:2", "--perplexity", "no/text.txt"], "--perplexity no/text.txt: No such file"),
    "empty text": (["--kv-sharing", "cla:2", "--perplexity", "{empty}"], "empty.txt is empty"),
    "short text": (
        ["--kv-sharing", "cla:2", "--perplexity", "{short}"],
        "short.txt has 2 tokens, too few to measure; give a longer text",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_convert_is_told_before_the_model_is_loaded(
    name: str, tiny: str, text_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("ab")
    arguments, message = MISTAKES[name]
    paths = {"{text}": text_file, "{empty}": str(tmp_path / "empty.txt"), "{short}": str(tmp_path / "short.txt")}
    arguments = [paths.get(argument, argument) for argument in arguments]
    status, out, err = call(["convert", tiny, str(tmp_path / "shared"), *arguments], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "shared").exists()


def test_convert_refuses_to_replace_what_it_reads(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tiny)
    for output in (tiny, str(tmp_path / "link")):
        status, _, err = call(["convert", tiny, output, "--overwrite"], capsys)
        assert status == 2
        assert f"{output} would replace {tiny}, which this command reads; name another path" in err


def test_models_do_not_lie_in_directories_whose_names_are_not_utf8(
    tiny: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "caf\udce9"  # as Python spells the bytes of a name in Latin-1
    shutil.copytree(tiny, directory / "model")
    train = ["train", "--text", text_file, "--preset", "tiny", "--num-steps", "1", "--output", str(directory / "run")]
    for arguments in (["convert", tiny, str(directory / "out")], ["info", str(directory / "model")], train):
        status, out, err = call(arguments, capsys)
        assert (status, out) == (2, "")
        assert "is not UTF-8 text" in err
        assert [path.name for path in directory.iterdir()] == ["model"]


def test_convert_refuses_an_existing_target_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--overwrite"]):
        status, _, err = call(["convert", "smollm2-135m-instruct", str(tmp_path), *more], capsys)
        assert status == 2
        assert f"{tmp_path} exists, and is nothing that this command writes; name another path" in err
    (tmp_path / "model.json").touch()
    status, _, err = call(["convert", "smollm2-135m-instruct", str(tmp_path)], capsys)
    assert status == 2
    assert "exists; give --overwrite to replace it" in err


@pytest.mark.parametrize("is_full", ["before", "in the tokenizer"])
def test_a_disk_that_is_full_is_told_in_one_line_and_nothing_is_left(
    tiny: str, is_full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reason = "No space left on device"
    if is_full == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=1_234))
        reason += f": at least {int(1.6 * TINY.num_parameters):,} bytes are needed, 1,234 are free"
    if is_full == "in the tokenizer":

        def fail(self: PreTrainedTokenizerFast, path: Path) -> None:
            raise Exception(f"{reason} (os error 28)")  # as the tokenizers library tells it

        monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    status = main(["convert", tiny, str(tmp_path / "out")])
    assert (status, capfd.readouterr().err) == (1, f"hshare-jax: error: {tmp_path / 'out'}: {reason}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--tensor-parallel-size", "4"], "--tensor-parallel-size 4 must be at most the 2 kv heads"),
        (["--tensor-parallel-size", "2", "--kv-sharing", "cla:2"], "--kv-sharing cla:2 is for one device"),
        (["--tensor-parallel-size", "2", "--quantize", "int8-channel"], "take int8, or leave out"),
    ],
)
def test_convert_refuses_what_several_devices_cannot_write(
    tiny: str,
    given: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_convert, "read_mesh", lambda options, config: "several devices")
    status, _, err = call(["convert", tiny, str(tmp_path / "out"), *given], capsys)
    assert status == 2
    assert told in err
    assert not list(tmp_path.iterdir())
