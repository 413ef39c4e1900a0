"""The command line: what it prints where, which settings its options make, and one line for a failure."""

import dataclasses
import io
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from command_line import call
from random_weights import random_params
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.cli import main as cli
from hshare_jax.cli import options as cli_options
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models import pretrained
from hshare_jax.models.config import ModelConfig, RopeConfig

pytestmark = pytest.mark.usefixtures("cached_model")


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


def test_a_chat_template_that_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('there is no system here') }}"
    pretrained.save_model(pretrained.Model(TINY, random_params(TINY), tokenizer, (), "tiny", ""), tmp_path / "tiny")
    status, _, err = call(["generate", "hi", "--model", str(tmp_path / "tiny"), "--system", "be kind"], capsys)
    assert status == 2
    assert "the chat template of tiny refuses: there is no system here; leave out --system, or give --no-chat" in err


def test_a_device_without_memory_is_a_failure(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.")

    monkeypatch.setattr(pretrained.ModelFiles, "load", load)
    status, _, err = call(["generate", "hi", "--model", tiny], capsys)
    assert status == 1
    assert err.startswith("hshare-jax: error: out of memory, take fewer or shorter texts at once: RESOURCE_EXHAUSTED")


def test_a_damaged_model_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    status, out, err = call(["generate", "a", "--model", str(tmp_path / "model.gguf")], capsys)
    assert (status, out) == (1, "")
    assert "model.gguf" in err


def test_text_goes_to_stdout_and_statistics_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(["generate", "What is the capital of France?", "-n", "16"], capsys)
    assert (status, out) == (0, "The capital of France is Paris.\n")
    assert err.startswith(
        "hshare 1/2-1-1 budget 128 | computes 87 of 87 lists every step | reads 41.0 of 41.0 tokens | "
    )
    assert " | prompt 37 tokens, " in err
    assert err.count("\n") == 1


def settings(*arguments: str) -> HShareSettings:
    return cli_options.read_settings(cli._parser().parse_args(["generate", "a", *arguments]))


def test_without_options_the_settings_are_the_defaults() -> None:
    assert settings() == HShareSettings()


def test_a_preset_is_changed_by_the_options_that_are_given() -> None:
    assert settings("--preset", "hshare-paper") == HShareSettings.published()
    changed = ["--dilate", "--num-probes", "8", "--label-bits", "none", "--sharing-ratio", "1/2-1/2-1/4"]
    expected = dataclasses.replace(HShareSettings.published(), dilate=True, num_probes=8, label_bits=None)
    assert settings("--preset", "hshare-paper", *changed) == expected.with_sharing_ratio("1/2-1/2-1/4")


def test_every_setting_has_an_option() -> None:
    given = (
        "--num-sinks 1 --num-critical 2 --num-recent 3 --budget-ratio 1/8 --num-probes all --sharing-ratio 2/3-1/3-1/4 "
        "--lists-per query_head --plan published --plan-scope batch --no-dilate --dense-layers 6 --min-length 7 "
        "--label-channels 8 --label-bits 8"
    )
    found = settings(*given.split())
    assert found == HShareSettings(
        num_sinks=1, num_critical=2, num_recent=3, budget_ratio=Fraction(1, 8), num_probes="all",
        layer_ratio=Fraction(2, 3), head_ratio=Fraction(1, 3), refresh_interval=4, lists_per="query_head",
        plan="published", plan_scope="batch", dilate=False, dense_layers=6, min_length=7,
        label_channels=8, label_bits=8,
    )  # fmt: skip
    default, same = HShareSettings(), {"scoring"}  # which leaves no use for those of the labels
    fields = {f.name for f in dataclasses.fields(default)}
    assert {name for name in fields if getattr(found, name) == getattr(default, name)} == same
    assert settings("--scoring", "exact", "--refresh-interval", "4").scoring == "exact"


TINY = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=512,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
SMALL = [
    *("--num-sinks", "2", "--num-critical", "6", "--num-recent", "4", "--label-channels", "4"),
    *("--sharing-ratio", "1/2-1/2-1/2"),
]
TEXT = "the rain in spain stays mainly in the plain, or so it is said."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    model = pretrained.Model(TINY, random_params(TINY), byte_tokenizer(LETTERS), (), "tiny", "")
    pretrained.save_model(model, path)
    return str(path)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return str(tmp_path / "text.txt")


def test_prompts_from_everywhere_form_one_json_batch(
    tiny: str, text_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("name a fruit."))
    files = ["--prompt-file", text_file, "-f", "-"]
    status, out, _ = call(["generate", "say hello.", *files, "--model", tiny, "--json", "-n", "16"], capsys)
    result = json.loads(out)
    assert status == 0
    assert result["model"] == "tiny"
    assert len(result["outputs"]) == 3
    assert all(output["text"] and output["finish_reason"] in ("stop", "length") for output in result["outputs"])
    assert result["statistics"]["new_tokens"] == sum(len(output["tokens"]) for output in result["outputs"])


def test_what_calibrate_writes_generate_reads(
    tiny: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--channels-file", str(tmp_path / "channels.json"), "--plan-file", str(tmp_path / "plan.json")]
    status, out, err = call(["calibrate", text_file, "--model", tiny, *files, *SMALL], capsys)
    assert (status, out) == (0, "")
    # Of the two sparse layers one list: half of the layers times half of the lists.
    assert (
        f"calibrated tiny on {len(byte_tokenizer(LETTERS)(TEXT)['input_ids'])} tokens: computes 1 of 4 lists; " in err
    )
    assert f"wrote {tmp_path / 'channels.json'} and {tmp_path / 'plan.json'}\n" in err
    status, out, err = call(
        ["generate", TEXT, "--model", tiny, *files, *SMALL, "--json", "-n", "7", "--compare-dense"], capsys
    )
    assert status == 0
    found = json.loads(out)["statistics"]
    assert (found["refreshes"], found["selections"], found["possible_selections"]) == (3, 3, 24)
    assert (found["computed_lists"], found["lists"]) == (1, 4)
    assert "hshare plan from a file budget 12 | computes 1 of 4 lists every 2 steps | " in err

    for option, value, made_with in (
        ("--sharing-ratio", "1/8-1-1/2", "layer_ratio 1/2"),
        ("--num-probes", "5", "num_pro"),
        ("--plan-scope", "batch", "plan_scope sequence"),
    ):
        status, _, err = call(["generate", TEXT, "--model", tiny, *files, *SMALL, option, value], capsys)
        assert status == 2
        assert (
            f"{option} {value} has no effect: {tmp_path / 'plan.json'} says which list copies which, found with" in err
        )
        assert made_with in err

    status, _, err = call(["calibrate", text_file, "--model", tiny, *files, *SMALL], capsys)
    assert status == 2
    assert "channels.json exists; give --overwrite to replace it" in err
    table = json.loads((tmp_path / "plan.json").read_text())
    table["hshare_jax"]["identity"] = "another"
    (tmp_path / "plan.json").write_text(json.dumps(table))
    status, _, err = call(["generate", TEXT, "--model", tiny, *files, *SMALL], capsys)
    assert status == 1
    assert "plan.json was made with tiny, identity another; this model, tiny, has identity" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{text}"], "nothing to write: give --channels-file, --plan-file or both"),
        (["{text}", "--plan-file", "a", "--channels-file", "a"], "--channels-file and --plan-file are both a"),
        (["{text}", "--plan-file", "{text}"], "exists; give --overwrite to replace it"),
        (["{text}", "--plan-file", "/", "--overwrite"], "/ exists, and is nothing that this command writes; name"),
        (["no/text.txt", "--plan-file", "a"], "no/text.txt: No such file"),
        (["{text}", "--plan-file", "a", "--num-critical", "90"], "a plan needs 186, with which there are twice"),
        (["{text}", "--plan-file", "a", "--block-length", "10"], "--block-length 10 must lie between 18, so that"),
        (["{text}", "--plan-file", "a", "--max-blocks", "0"], "--max-blocks 0 must be at least 1"),
        (["{text}", "--plan-file", "a", "--scoring", "none"], "invalid choice: 'none'"),
    ],
)
def test_a_mistake_in_calibrate_is_told_before_the_model_is_loaded(
    arguments: list[str], message: str, tiny: str, text_file: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    arguments = [argument.replace("{text}", text_file) for argument in arguments]
    status, out, err = call(["calibrate", "--model", tiny, *SMALL, *arguments], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def show_plan(tiny: str, tmp_path: Path, prompts: list[str], *more: str) -> list[str]:
    files = [tmp_path / f"{row}.txt" for row in range(len(prompts))]
    for file, prompt in zip(files, prompts, strict=True):
        file.write_text(prompt, encoding="utf-8")
    return ["info", tiny, "--plan", *SMALL, *more, *(part for file in files for part in ("--prompt-file", str(file)))]


def test_info_shows_which_list_copies_which(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call(show_plan(tiny, tmp_path, [TEXT]), capsys)
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
    status, out, _ = call(show_plan(tiny, tmp_path, ["there", TEXT]), capsys)
    assert status == 0
    assert "the prompt has 3 tokens; below 18 there is no plan: nothing is shared" in out
    assert out.count("nothing is shared") == 1
    status, out, _ = call(show_plan(tiny, tmp_path, ["there", TEXT], "--json"), capsys)
    found = json.loads(out)
    assert [plan["has_probes"] for plan in found["plans"]] == [False, True]
    assert [plan["source"] for plan in found["plans"]] == [[[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 2], [2, 2]]]


@pytest.mark.parametrize("extra", [["--num-critical", "3"], ["--prompt-file", "x"]])
def test_what_belongs_to_a_plan_needs_it(tiny: str, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(["info", tiny, *extra], capsys)
    assert status == 2
    assert f"{extra[0]} is for showing a plan; add --plan" in err


def test_comparing_tells_both_speeds_and_what_dense_decoding_reads(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = call(["generate", TEXT, "--model", tiny, *SMALL, "--compare-dense", "--json"], capsys)
    found = json.loads(out)["statistics"]
    assert status == 0
    assert (found["computed_lists"], found["lists"], found["refresh_interval"]) == (1, 4, 2)
    assert found["times_dense"] == round(found["decode_tokens_per_second"] / found["dense_decode_tokens_per_second"], 2)
    assert found["mean_tokens_read"] < found["mean_length"]
    assert f"{found['times_dense']} times dense (" in err
    status, out, _ = call(["generate", TEXT, "--model", tiny, "--method", "dense", "--json"], capsys)
    found = json.loads(out)["statistics"]
    assert found["mean_tokens_read"] == found["mean_length"]
    assert "selections" not in found


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
