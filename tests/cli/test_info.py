"""`hshare-jax info`: facts about a model, and plans of prompts."""

import json
from pathlib import Path

import huggingface_hub
import pytest
from command_line import SMALL, TEXT, call
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig

FOUR_LAYERS = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
    windows=(None,) * 4, rope=RopeConfig(theta=100.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = pretrained.Model(FOUR_LAYERS, random_params(FOUR_LAYERS), byte_tokenizer(LETTERS), (), "tiny", "")
    pretrained.save_model(model, path)
    return str(path)


def plan_call(tiny: str, tmp_path: Path, prompts: list[str], *more: str) -> list[str]:
    files = [tmp_path / f"{row}.txt" for row in range(len(prompts))]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt, encoding="utf-8")
    return ["info", tiny, "--plan", *SMALL, *more, *(part for file in files for part in ("--prompt-file", str(file)))]


def test_info_shows_which_list_copies_which(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(plan_call(tiny, tmp_path, [TEXT], "--dense-layers", "1"), capsys)
    assert (status, err) == (0, "")
    legend, *layers, count = out.splitlines()
    assert legend == "own: computed there; 4.1: copied from layer 4, list 1; dense: reads everything"
    assert [line.split() for line in layers] == [
        ["layer", "0", "dense"],
        ["layer", "1", "own", "1.0"],
        ["layer", "2", "1.0", "1.0"],
    ]
    assert count == "computes 1 of 4 lists; 1 of 2 layers compute none"


def test_info_tells_that_a_short_prompt_shares_nothing(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = call(plan_call(tiny, tmp_path, ["there", TEXT]), capsys)
    assert status == 0
    assert "the prompt has 3 tokens; below 18 there is no plan: nothing is shared" in out
    assert out.count("nothing is shared") == 1
    status, out, _ = call(plan_call(tiny, tmp_path, ["there", TEXT], "--json", "--dense-layers", "1"), capsys)
    found = json.loads(out)
    assert [plan["has_probes"] for plan in found["plans"]] == [False, True]
    assert [plan["source"] for plan in found["plans"]] == [[[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 2], [2, 2]]]


@pytest.mark.parametrize("extra", [["--num-critical", "3"], ["--plan-kind", "units"], ["--prompt-file", "x"]])
def test_what_belongs_to_a_plan_needs_it(tiny: str, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(["info", tiny, *extra], capsys)
    assert status == 2
    assert f"{extra[0]} is for showing a plan; add --plan" in err


@pytest.mark.usefixtures("cached_model")
def test_info_counts_parameters_and_cache_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(["info", "smollm2-135m-instruct", "--json"], capsys)
    facts = json.loads(out)
    assert status == 0
    assert facts["parameters"] == 134_515_008
    assert facts["cache_bytes_per_token"] == 2 * 30 * 3 * 64 * 4


def test_info_shows_what_sharing_saves_and_costs(
    four_layers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "shared")
    assert call(["convert", four_layers, out, "--kv-sharing", "0s_2_2_3s", "--kv-window", "8"], capsys)[0] == 0
    plain, shared, asked = (
        json.loads(call(["info", *arguments, "--json"], capsys)[1])
        for arguments in ([four_layers], [out], [four_layers, "--kv-sharing", "0s_2_2_3s", "--kv-window", "8"])
    )
    assert plain["identity"] == pretrained.load_model(four_layers).identity
    assert plain["num_kv_layers"] == 4
    assert plain["relative_prefill_cost"] == 1.0
    assert "kv_layer_map" not in plain
    assert shared["kv_layer_map"] == "0s_2_2_3s"
    assert (shared["num_kv_layers"], shared["sliding_windows"]) == (3, [8])
    assert (shared["forward_passes"], shared["backward_passes"], shared["relative_prefill_cost"]) == (7, 2, 3.0)
    for name in ("cache_bytes_per_token", "kv_parameters"):
        assert shared[name] == plain[name] * 3 // 4
    assert plain["parameters"] - shared["parameters"] == plain["kv_parameters"] - shared["kv_parameters"]
    assert all(not isinstance(value, dict) for value in shared.values())
    assert asked | {"model": "", "identity": ""} == shared | {"model": "", "identity": ""}
    passes = ["--forward-passes", "exact", "--backward-passes", "3"]
    exact = json.loads(call(["info", four_layers, "--kv-sharing", "lckv:1", *passes, "--json"], capsys)[1])
    assert (exact["forward_passes"], exact["backward_passes"], exact["relative_prefill_cost"]) == (None, 3, None)
    status, text, _ = call(["info", out], capsys)
    assert status == 0
    assert "kv_layer_map           0s_2_2_3s\n" in text
    assert "no_rope_layers         []\n" in text  # printed as sliding_windows is


def test_info_tells_what_a_model_would_be_without_loading_it(
    four_layers: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    status, out, _ = call(["info", four_layers, "--kv-sharing", "yoco", "--json", "--dtype", "bfloat16"], capsys)
    facts = json.loads(out)
    assert status == 0
    assert (facts["kv_layer_map"], facts["sliding_windows"]) == ("0s_1s_2_2", [1024])
    assert facts["cache_bytes_per_token"] == 2 * 3 * 2 * 8 * 2
    for arguments, message in (
        (["--kv-window", "8"], "--kv-window is for sharing keys and values; add --kv-sharing"),
        (["--kv-sharing", "mine"], "--kv-sharing mine: no way of sharing is called so"),
        (["--kv-sharing", "cla:2", "--plan"], "--plan needs them; leave out either"),
        (["--kv-sharing", "cla:2", "--num-sinks", "2"], "--num-sinks is for showing a plan; add --plan"),
    ):
        status, _, err = call(["info", four_layers, *arguments], capsys)
        assert status == 2
        assert message in err


@pytest.fixture
def config_alone(tmp_path: Path) -> str:
    """A directory that holds a configuration and nothing else."""
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}), encoding="utf-8")
    return str(tmp_path / "bare")


def test_info_counts_what_each_device_holds_from_the_configuration_alone(
    config_alone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["info", config_alone, "--context", "1024", "--batch", "4", "--dtype", "bfloat16", "--json"]
    divided = ["--tensor-parallel-size", "2", "--data-parallel-size", "2"]
    one, four = (json.loads(call([*arguments, *more], capsys)[1]) for more in ([], divided))
    assert (one["devices"], four["devices"], four["batch"], four["context"]) == (1, 4, 4, 1024)
    assert one["weights_bytes_per_device"] == 2 * one["parameters"]
    row = 2 * 2 * 2 * 8 * 1024 * 2  # layers, keys and values, kv heads, head size, tokens, bytes
    assert one["cache_bytes_per_device"] == 4 * row + 4 * 4
    assert four["cache_bytes_per_device"] == row + 2 * 4
    assert four["labels_bytes_per_device"] * 4 == one["labels_bytes_per_device"] > 0
    for facts in (one, four):
        parts = ("weights", "cache", "labels", "lists")
        assert facts["sparse_bytes_per_device"] == sum(facts[f"{part}_bytes_per_device"] for part in parts)
        assert facts["dense_bytes_per_device"] == sum(facts[f"{part}_bytes_per_device"] for part in parts[:2])
        assert "dense_rows_that_fit" not in facts
        for kind in ("dense", "sparse"):
            # So many rows fit exactly, and in a byte less one for each group of devices does not.
            size = facts[f"{kind}_bytes_per_device"]
            for missing, rows in ((0, 4), (1, 4 - facts["data_parallel_size"])):
                more = ["--device-memory", repr((size - missing) / 1e9), *(divided if facts is four else [])]
                assert json.loads(call([*arguments, *more], capsys)[1])[f"{kind}_rows_that_fit"] == rows
    fewer = json.loads(call([*arguments, "--num-critical", "8"], capsys)[1])
    assert fewer["lists_bytes_per_device"] < one["lists_bytes_per_device"]
    status, out, _ = call(["info", config_alone, "--context", "1024"], capsys)
    assert status == 0
    assert "tensor_parallel_size      1\n" in out


def test_info_fetches_the_configuration_of_a_hub_model_alone(
    config_alone: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def snapshot_download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return config_alone

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    status, out, _ = call(["info", "organisation/name", "--context", "64", "--json"], capsys)
    assert (status, json.loads(out)["model"]) == (0, "organisation/name")
    assert asked == ["config.json", "generation_config.json", "SHA256SUMS"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tensor-parallel-size", "3"], "--tensor-parallel-size 3 devices cannot divide 2 kv heads, 8 query heads"),
        (["--tensor-parallel-size", "16"], "possible are 1, 2, 4, 8"),
        (["--data-parallel-size", "3"], "--batch 1 rows cannot be divided evenly over 3 devices"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size 0 must be at least 1"),
        (["--context", "5000"], "--context 5000 must lie between 1 and the model's 4096 positions"),
        (["--device-memory", "0"], "--device-memory 0 must be above 0"),
        (["--num-probes", "8"], "--num-probes does not change what a device holds"),
        (["--quantize", "int8"], "--quantize int8 has no effect"),
        (["--plan"], "--context counts bytes and --plan shows plans"),
    ],
)
def test_what_no_device_can_hold_is_a_mistake_in_the_call(
    config_alone: str, more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(["info", config_alone, "--context", "64", *more], capsys)
    assert (status, out) == (2, "")
    assert told in err


def test_options_of_devices_need_a_context(config_alone: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(["info", config_alone, "--tensor-parallel-size", "2"], capsys)
    assert status == 2
    assert "--tensor-parallel-size is for counting what a device holds; add --context" in err
    assert call(["info", config_alone], capsys)[0] != 0  # all other facts need the weights


def test_a_prompt_beyond_the_model_is_told_before_the_model_is_loaded(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    status, out, err = call(plan_call(tiny, tmp_path, ["there " * 200]), capsys)
    assert (status, out) == (2, "")
    assert "; this model has room for 511: shorten the prompt" in err
