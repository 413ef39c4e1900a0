"""The options of settings: they are made from the dataclasses, and together they make a method."""

import argparse
import dataclasses
import os
import re
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
from command_line import call

from hshare_jax.cli import options
from hshare_jax.cli.errors import option_name
from hshare_jax.cli.main import _parser
from hshare_jax.cli.options import add_fields, read_method, unicode_text
from hshare_jax.errors import setting
from hshare_jax.kernels.api import IMPLS
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.sampling_params import SamplingParams


def method(*arguments: str) -> HShare:
    given = ["generate", "a", *arguments]
    return read_method(_parser(given).parse_args(given))


@pytest.mark.parametrize(
    ("given", "encoding", "text"),
    [
        (b"caf\xc3\xa9", "iso8859-1", "café"),  # UTF-8 in a locale of Latin-1
        (b"caf\xc3\xa9", "ascii", "café"),
        (b"caf\xe9", "iso8859-1", "café"),  # Latin-1 itself
        (b"\xef\xbb\xbfthe", "iso8859-1", "the"),
    ],
)
def test_an_argument_in_utf8_is_read_as_utf8_in_every_locale(
    given: bytes, encoding: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    monkeypatch.setattr(os, "fsencode", lambda argument: argument.encode(encoding, "surrogateescape"))
    assert unicode_text(given.decode(encoding, "surrogateescape")) == text
    assert unicode_text("日本") == "日本"  # a caller in Python, whose text the locale lacks


def test_what_a_kill_left_of_a_compiled_program_is_removed(tmp_path: Path) -> None:
    whole = zlib.compress(bytes(range(256)) * 99)
    for time, (name, data) in enumerate({"a": whole, "b": b"", "c": whole, "d": whole[:-5]}.items()):
        (tmp_path / f"{name}-cache").write_bytes(data)
        os.utime(tmp_path / f"{name}-cache", (time, time))
    (tmp_path / "notes").touch()
    for _ in range(2):  # the second time, the newest one is whole
        options._remove_half_written(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a-cache", "c-cache", "notes"]
    (tmp_path / "e-cache").write_bytes(b"\x28\xb5\x2f\xfd of a later Python")
    options._remove_half_written(tmp_path)
    options._remove_half_written(tmp_path / "absent")


def test_without_options_the_method_is_the_default() -> None:
    assert method() == HShare()


def test_a_preset_is_changed_by_the_options_that_are_given() -> None:
    assert method("--preset", "hshare-paper") == HShare.paper()
    changed = ["--dilate", "--num-probes", "8", "--label-bits", "none", "--sharing-ratio", "1/2-1/2-1/4"]
    expected = HShare.paper().with_settings({"dilate": True, "num_probes": 8, "label_bits": None})
    assert method("--preset", "hshare-paper", *changed) == expected.with_sharing_ratio("1/2-1/2-1/4")


def test_every_setting_has_an_option() -> None:
    given = (
        "--num-sinks 1 --num-critical 2 --num-recent 3 --budget-ratio 1/8 --num-probes all --sharing-ratio 2/3-1/3-1/4 "
        "--lists-per query_head --plan-kind published --plan-scope batch --no-dilate --dense-layers 6 --min-length 7 "
        "--label-channels 8 --label-bits 8 --tail none --pool 2 --refit-interval 99"
    )
    found, default = method(*given.split()), HShare()
    assert found.settings == HShareSettings(
        num_sinks=1, num_critical=2, num_recent=3, budget_ratio=Fraction(1, 8), refresh_interval=4,
        lists_per="query_head", dilate=False, dense_layers=6, min_length=7, label_channels=8, label_bits=8,
        tail=None, pool=2,
    )  # fmt: skip
    assert found.search == PlanSearch(
        layer_ratio=Fraction(2, 3), head_ratio=Fraction(1, 3), plan_kind="published", plan_scope="batch",
        num_probes="all", refit_interval=99,
    )  # fmt: skip
    same = set()
    for record in ("settings", "search"):
        ours, theirs = getattr(found, record), getattr(default, record)
        fields = [field.name for field in dataclasses.fields(ours)]
        same |= {name for name in fields if getattr(ours, name) == getattr(theirs, name)}
    # Exact scoring leaves no use for the options of labels, and without a tail its rank has none.
    assert same == {"scoring", "tail_rank"}
    assert method("--tail-rank", "4").settings.tail_rank == 4
    exact = method("--scoring", "exact", "--refresh-interval", "4", "--budget-ratio", "none")
    assert (exact.settings.scoring, exact.settings.refresh_interval, exact.settings.budget_ratio) == ("exact", 4, None)


def help_text(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    status, out, _ = call([*arguments, "--help"], capsys)
    assert status == 0
    return " ".join(out.split())


def test_help_shows_the_help_and_the_default_of_every_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    shown = help_text("generate", capsys=capsys)
    for record in (HShareSettings, PlanSearch, SamplingParams):
        for field in dataclasses.fields(record):
            if field.name not in ("layer_ratio", "head_ratio"):
                assert option_name(field.name) in shown
                assert field.metadata["help"] in shown
    for text in ("first tokens that every head reads (default: 16)", "(default: 1/2-1-1)", "a good one (default: yes)"):
        assert text in shown
    for impl in IMPLS:
        assert impl in shown[shown.index("--impl NAME what") : shown.index("--stop TEXT end")]


@dataclasses.dataclass(frozen=True)
class Record:
    """A field of every kind that an option can be made from."""

    whole: int = setting(1, "a")
    real: float = setting(0.5, "b: 100 %")
    ratio: Fraction | None = setting(None, "c")
    word: Literal["up", "down"] = setting("up", "d")
    bits: Literal[4, 8] | None = setting(4, "e")
    count: int | Literal["all"] = setting(64, "f")
    switch: bool = setting(True, "g")
    left_out: int = setting(1, "h")


RECORD = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, exit_on_error=False)
add_fields(RECORD, Record, leave_out=("left_out",))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("--whole -3", {"whole": -3}),
        ("--real 1e-3", {"real": 0.001}),
        ("--ratio 2/6", {"ratio": Fraction(1, 3)}),
        ("--ratio none", {"ratio": None}),
        ("--word down", {"word": "down"}),
        ("--bits 8", {"bits": 8}),
        ("--bits none", {"bits": None}),
        ("--count all", {"count": "all"}),
        ("--count 7", {"count": 7}),
        ("--no-switch", {"switch": False}),
    ],
)
def test_an_option_reads_what_its_field_holds_and_leaves_no_trace_if_it_is_not_given(
    text: str, value: dict[str, object]
) -> None:
    assert vars(RECORD.parse_args(text.split())) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--whole many", "'many' is not a whole number"),
        ("--ratio 1/0", "'1/0' is not a fraction such as 1/8 or none"),
        ("--bits 5", "'5' is not 4, 8 or none"),
        ("--count some", "'some' is not a whole number or all"),
        ("--word left", "invalid choice: 'left'"),
    ],
)
def test_a_value_that_a_field_cannot_hold_is_told_with_those_it_can(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=re.escape(message)):
        RECORD.parse_args(text.split())


def test_a_default_is_shown_as_it_is_typed() -> None:
    shown = " ".join(RECORD.format_help().split())
    for text in ("--real X b: 100 % (default: 0.5)", "--ratio A/B|none c --word", "--count N|all f (default: 64)"):
        assert text in shown
