"""Perplexity: options that cannot be, windows that fit the model, and the lines that a run writes."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from random_weights import random_params
from tiny_decoder import HSHARE, MODEL
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.evaluation.run import KEYS
from hshare_jax.evaluation.tasks.perplexity import Perplexity
from hshare_jax.evaluation.text_windows import Scorer, cut_windows
from hshare_jax.files.records import Records
from hshare_jax.models.pretrained import Model

TINY = Model(
    dataclasses.replace(MODEL, max_positions=512), random_params(MODEL), byte_tokenizer(LETTERS), (), "tiny", ""
)
TEXT = "the rain in spain stays mainly in the plain, or so it is said. " * 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": 40, "context": 40}, "steps=40 must be less than context=40"),
        ({"skip_start": Fraction(1)}, r"skip_start=1 must lie in \[0, 1\)"),
        ({"skip_start": Fraction(-1, 2)}, r"skip_start=-1/2 must lie in \[0, 1\)"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Perplexity(**options)


def test_files_are_read_by_name_and_cut_into_windows(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT, encoding="utf-8")
    task = Perplexity(limit=2, context=40, steps=4, skip_start=Fraction(1, 4))
    texts, num_bad = task.read([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert (texts, num_bad) == ({"a.txt": TEXT, "b.txt": TEXT}, 0)
    windows, num_long = task.fit(TINY, texts)
    cut = [cut_windows(TINY, name, TEXT, context=40, count=2, skip=0.25) for name in texts]
    assert (windows, num_long) == ([*cut[0], *cut[1]], 0)
    assert task.sizes(windows) == [(36, 40)] * 4


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        Perplexity().read([tmp_path / "a.txt"])
    with pytest.raises(FileNotFoundError, match="absent"):
        Perplexity().read([Path("absent.txt")])


def test_a_line_holds_the_means_of_a_windows_scores(tmp_path):
    task = Perplexity(limit=3, context=100, steps=8)
    windows, _ = task.fit(TINY, {"rain.txt": TEXT})
    records = Records(tmp_path / "out.jsonl", {}, keys=KEYS)
    task.run(TINY, windows, {"hshare": HSHARE, "dense": None}, records, batch_size=2)
    assert [(line["id"], line["method"]) for line in records.lines] == [
        *[(window.id, name) for name in ("hshare", "dense") for window in windows[:2]],
        *[(windows[2].id, name) for name in ("hshare", "dense")],
    ]
    scores = Scorer(TINY, windows[:2], 8, [HSHARE, None]).score(HSHARE)
    line = records.lines[1]
    assert line | {"scores": None} == {
        "id": windows[1].id, "method": "hshare", "task": "perplexity", "steps": 8,
        "reads": pytest.approx(scores["reads"][1].mean(), abs=1e-6), "scores": None,
    }  # fmt: skip
    expected = {name: np.nanmean(values[1]) for name, values in scores.items() if name != "reads"}
    assert line["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    task = Perplexity(limit=1, context=40, steps=4)
    windows, _ = task.fit(TINY, {"rain.txt": TEXT})
    broken = dataclasses.replace(TINY, params=jax.tree.map(lambda weight: weight * np.nan, TINY.params))
    records = Records(tmp_path / "out.jsonl", {}, keys=KEYS)
    with pytest.raises(ValueError, match=r"rain.txt:0: the loss of dense is nan in float32: the weights are"):
        task.run(broken, windows, {"dense": None}, records, batch_size=1)
    assert not records.path.exists()
