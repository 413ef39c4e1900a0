"""`hshare-jax calibrate`: its files, which `generate` reads, and its mistakes."""

import json
from pathlib import Path

import pytest
from command_line import SMALL, TEXT, call
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.models import pretrained


def test_what_calibrate_writes_generate_reads_once(
    tiny: str, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or read_bytes(path))
    files = ["--channels-file", str(tmp_path / "channels.json"), "--plan-file", str(tmp_path / "plan.json")]
    status, out, err = call(["calibrate", text_file, "--model", tiny, *files, *SMALL], capsys)
    assert (status, out) == (0, "")
    # Of the three layers one list: an eighth of the six lists, but at least one.
    assert (
        f"calibrated tiny on {len(byte_tokenizer(LETTERS)(TEXT)['input_ids'])} tokens: computes 1 of 6 lists; " in err
    )
    assert f"wrote {tmp_path / 'channels.json'} and {tmp_path / 'plan.json'}\n" in err
    status, out, err = call(
        ["generate", TEXT, "--model", tiny, *files, *SMALL, "--json", "-n", "7", "--compare-dense"], capsys
    )
    assert status == 0
    assert sorted(name for name in reads if name in ("channels.json", "plan.json")) == ["channels.json", "plan.json"]
    found = json.loads(out)["statistics"]
    assert (found["refreshes"], found["selections"], found["possible_selections"]) == (3, 3, 36)
    assert (found["computed_lists"], found["lists"]) == (1, 6)
    assert "hshare plan from a file budget 12 | computes 1 of 6 lists every 2 steps | " in err

    for option, value, name, ours, made_with in (
        ("--sharing-ratio", "1/8-1-1/2", "the layer ratio of --sharing-ratio, {}", "1/8", "1/2"),
        ("--num-probes", "5", "--num-probes {}", "5", "64"),
        ("--plan-scope", "batch", "--plan-scope {}", "batch", "sequence"),
    ):
        status, _, err = call(["generate", TEXT, "--model", tiny, *files, *SMALL, option, value], capsys)
        assert status == 2
        assert (
            f"{name.format(ours)} has no effect: --plan-file {tmp_path / 'plan.json'} says which list copies which, "
            f"and was found with {name.format(made_with)}: leave it out"
        ) in err

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
        (["{text}", "--plan-file", "{tmp}/there"], "exists; give --overwrite to replace it"),
        (
            ["{text}", "--plan-file", "{text}", "--overwrite"],
            "text.txt exists, and is nothing that",
        ),
        (["{text}", "--plan-file", "{tmp}/soft", "--overwrite"], "soft exists, and is nothing that"),
        (["{text}", "--channels-file", "{tmp}/hard", "--overwrite"], "hard exists, and is nothing that"),
        (["{text}", "--plan-file", "{model}/model.json", "--overwrite"], "model.json exists, and is nothing that"),
        (
            ["{text}", "--plan-file", "{tmp}/a", "--channels-file", "{tmp}/b/../a"],
            "--channels-file and --plan-file are",
        ),
        (["{text}", "--plan-file", "/", "--overwrite"], "/ exists, and is nothing that this command writes; name"),
        (["no/text.txt", "--plan-file", "a"], "no/text.txt: No such file"),
        (["{text}", "--plan-file", "a", "--num-critical", "90"], "a plan needs 186, with which there are twice"),
        (["{text}", "--plan-file", "a", "--block-length", "10"], "--block-length 10 must lie between 18, so that"),
        (["{text}", "--plan-file", "a", "--max-blocks", "0"], "--max-blocks 0 must be at least 1"),
        (["{text}", "--plan-file", "a", "--scoring", "none"], "invalid choice: 'none'"),
    ],
)
def test_a_mistake_in_calibrate_is_told_before_the_model_is_loaded(
    arguments: list[str], message: str, tiny: str, text_file: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(pretrained.ModelFiles, "load", None)
    (tmp_path / "there").write_text('{"hshare_jax": {"kind": "plan"}}')
    (tmp_path / "soft").symlink_to(text_file)
    (tmp_path / "hard").hardlink_to(text_file)
    for name, path in {"{text}": text_file, "{tmp}": str(tmp_path), "{model}": tiny}.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    status, out, err = call(["calibrate", "--model", tiny, *SMALL, *arguments], capsys)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
