"""A SettingError in the words of the command line."""

from fractions import Fraction
from pathlib import Path

import pytest

from hshare_jax.cli.errors import UsageError, usage_error, usage_errors
from hshare_jax.errors import SettingError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SettingError("num_critical", 0, "must be at least 1"), "--num-critical 0 must be at least 1"),
        (
            SettingError("layer_ratio", Fraction(3, 2), "is above 1"),
            "the layer ratio of --sharing-ratio, 3/2 is above 1",
        ),
        (SettingError("count", 0, "must be at least 1", "give more"), "--limit 0 must be at least 1: give more"),
        (SettingError("window", 8, "has no effect"), "--kv-window 8 has no effect"),
        (SettingError("label_bits", None, "is idle"), "--label-bits none is idle"),
        (SettingError("dilate", False, "is idle"), "--no-dilate is idle"),
        (SettingError("num_kv_layers", 5, "is too much"), "num_kv_layers=5 is too much"),
        (SettingError("kv_layer_map[2]", 1, "points nowhere"), "kv_layer_map[2]=1 points nowhere"),
        (
            SettingError(
                "forward_passes", -1, "must be at least 0; {forward_passes} repeats", "", {"forward_passes": None}
            ),
            "--forward-passes -1 must be at least 0; --forward-passes exact repeats",
        ),
        (
            SettingError("head_ratio", Fraction(3, 4), "must be 1 with {plan_kind}", others={"plan_kind": "anchors"}),
            "the head ratio of --sharing-ratio, 3/4 must be 1 with --plan-kind anchors",
        ),
        (ValueError("num_critical=0 is text"), "num_critical=0 is text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_are_named_by_their_options(error: ValueError, message: str) -> None:
    assert str(usage_error(error)) == message


def test_errors_of_the_library_become_mistakes_within_the_context(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--impl x is unknown$"), usage_errors():
        raise SettingError("impl", "x", "is unknown")
    with pytest.raises(UsageError, match=r"none\.json: No such file or directory$"), usage_errors():
        (tmp_path / "none.json").read_text()
    with pytest.raises(UsageError, match=r"^it does not exist$"), usage_errors():
        raise FileNotFoundError("it does not exist")
    with pytest.raises(RuntimeError), usage_errors():
        raise RuntimeError


def test_a_name_with_braces_breaks_no_message():
    error = SettingError("count", 9, "must be at most 3: {count} of book{1}{x}.txt", others={"count": 9})
    assert str(usage_error(error)) == "--limit 9 must be at most 3: --limit 9 of book{1}{x}.txt"
