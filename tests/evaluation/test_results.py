"""Results files: lines of studies and evaluations become one form; files that contradict one another are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from result_lines import EARLIER, EVAL, STUDY, eval_line, text_line, write

from hshare_jax.evaluation.results import read_results


def test_results_of_studies_and_evaluations_become_one(tmp_path: Path) -> None:
    line = text_line("quest", 64, 100, [[0.4]])
    passkey = {"kind": "passkey", "budget": 64, "name": "quest", "found": [1]}
    study = write(tmp_path / "study.jsonl", STUDY, line | {"recall": 0.9, "settings": "Quest()"}, passkey, end='{"kin')
    published = EVAL | {"settings": EVAL["settings"] | {"plan_kind": "published", "refresh_interval": "2"}}
    files = [
        study,
        write(tmp_path / "eval.jsonl", EVAL, eval_line("hshare", 0.02), eval_line("h2o", 0.2)),
        write(tmp_path / "more.jsonl", EVAL | {"data": ["b.txt"]}, eval_line("hshare", 0.04, "b.txt:0")),
        write(tmp_path / "published.jsonl", published, eval_line("hshare", 0.5)),
        write(tmp_path / "plan.jsonl", EVAL | {"plan_file": "made/plan.json"}, eval_line("hshare", 0.6)),
        write(tmp_path / "task.jsonl", {"model": "tiny", "task": "gsm8k"}, {"task": "gsm8k", "scores": {}}),
    ]
    lines, model = read_results(files)
    assert model == "tiny"
    of_eval = {"kind": "text", "context": 512, "budget": 128, "reads": 140.0}
    assert lines == [
        line,
        of_eval | {"name": "hshare 1/2-1-1", "divergence": 0.02},
        of_eval | {"name": "h2o", "divergence": 0.2},
        of_eval | {"name": "hshare 1/2-1-1", "divergence": 0.04},
        of_eval | {"name": "published 1/2-1-1/2", "divergence": 0.5},
        of_eval | {"name": "hshare plan.json", "divergence": 0.6},
    ]


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    lines = [eval_line("hshare", 0.02), eval_line("h2o", 0.2)]
    today = write(tmp_path / "today.jsonl", EVAL, *lines)
    earlier = write(tmp_path / "earlier.jsonl", EARLIER, *lines)
    assert read_results([earlier]) == read_results([today])
    published = EARLIER | {"settings": EARLIER["settings"] | {"plan": "published"}}
    found, _ = read_results([write(tmp_path / "published.jsonl", published, eval_line("hshare", 0.5))])
    assert [line["name"] for line in found] == ["published 1/2-1-1"]
    # A method that `min_length` means something to was measured in another way; H2O was not.
    gated = EVAL | {"settings": EVAL["settings"] | {"min_length": "None"}}
    before = EARLIER | {"settings": EARLIER["settings"] | {"min_length": "0"}}
    files = [write(tmp_path / f"{name}.jsonl", study, lines[1]) for name, study in (("a", gated), ("b", before))]
    assert [line["name"] for line in read_results(files)[0]] == ["h2o", "h2o"]
    files = [write(tmp_path / f"{name}.jsonl", study, lines[0]) for name, study in (("a", gated), ("b", before))]
    with pytest.raises(ValueError, match=r"both hold hshare 1/2-1-1 .* differ in min_length, None and 0; plot them"):
        read_results(files)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "does not begin with a line that names the model"),
        ([{"text": "a story"}], "does not begin with a line that names the model"),
        ([STUDY, {"kind": "text", "context": 1024}], "second.jsonl:2 is without 'budget'"),
        ([STUDY, text_line("h2o", 64, 90, float("nan"))], "second.jsonl:2: divergence=nan must be finite numbers"),
        ([EVAL | {"settings": 3}, eval_line("h2o", 0.1)], "second.jsonl: settings=3 must be an object"),
        ([STUDY | {"model": "other"}], "first.jsonl and .*second.jsonl both hold .* differ in model, tiny and other"),
        ([STUDY | {"identity": "1"}], "first.jsonl and .*second.jsonl both hold .* differ in identity, None and 1"),
        (
            [STUDY | {"steps": 64}, text_line("h2o", 64, 100, [[0.4]])],
            "both hold results of 1024 tokens, but differ in steps, 256 and 64; plot them apart",
        ),
        (
            [
                EVAL | {"context": "1024", "settings": EVAL["settings"] | {"num_critical": "24"}},
                eval_line("quest", 0.3),
            ],
            "both hold quest at 64 of 1024 tokens, but differ in what made them, a study and hshare-jax eval",
        ),
    ],
)
def test_results_that_cannot_stand_together_are_refused(
    lines: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    first = write(tmp_path / "first.jsonl", STUDY, text_line("quest", 64, 90, [[0.3]]))
    with pytest.raises(ValueError, match=message):
        read_results([first, write(tmp_path / "second.jsonl", *lines)])


def test_runs_of_other_settings_share_the_methods_that_have_no_use_for_them(tmp_path: Path) -> None:
    other = EVAL | {"settings": EVAL["settings"] | {"layer_ratio": "1/3"}, "plan_file": "p", "plan_file_sha256": "0"}
    files = [
        write(tmp_path / "a.jsonl", EVAL, eval_line("hshare", 0.02), eval_line("h2o", 0.2)),
        write(tmp_path / "b.jsonl", other, eval_line("hshare", 0.03), eval_line("h2o", 0.4), eval_line("dense", 0.0)),
    ]
    lines, _ = read_results(files)
    assert [line["name"] for line in lines] == ["hshare 1/2-1-1", "h2o", "hshare p", "h2o", "dense"]
    budget = EVAL | {"settings": EVAL["settings"] | {"dense_layers": "2"}}
    with pytest.raises(ValueError, match=r"both hold h2o at .* differ in dense_layers"):
        read_results([files[0], write(tmp_path / "c.jsonl", budget, eval_line("h2o", 0.2))])


def test_a_study_of_several_models_is_no_results_file(tmp_path: Path) -> None:
    path = write(tmp_path / "models.jsonl", {"model": {"layers": 4}}, {"kind": "loss"})
    with pytest.raises(ValueError, match="does not begin with a line that names the model"):
        read_results([path])


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text(json.dumps(STUDY) + "\nIt is a truth\n")
    with pytest.raises(ValueError, match=r"prose.jsonl:2 is not JSON"):
        read_results([path])
