"""HShare's settings: the counts that the published ratios stand for, and what is refused."""

import dataclasses
from fractions import Fraction

import pytest
from tiny_decoder import MODEL

from hshare_jax.config import HShareConfig


def model(num_layers, num_heads, num_kv_heads):
    return dataclasses.replace(
        MODEL, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64,
        windows=(None,) * num_layers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "shape", "lists_per", "layers", "lists"),
    [
        ("7/8-3/4-1/2", (32, 32, 32), "query_head", 4, 8),  # LLaMA2-7b, as published
        ("3/4-3/4-1/2", (32, 32, 32), "query_head", 8, 8),
        ("1/2-1/2-1/2", (32, 32, 32), "query_head", 16, 16),
        ("1/2-1/2-1/2", (80, 64, 8), "query_head", 40, 32),  # LLaMA3-70b
        ("7/8-3/4-1/2", (30, 9, 3), "query_head", 4, 2),  # SmolLM2
        ("7/8-3/4-1/2", (30, 9, 3), "kv_head", 4, 1),
        ("1-1-1", (30, 9, 3), "kv_head", 0, 0),
        ("1/100-1/100-1", (30, 9, 3), "kv_head", 29, 2),  # one of each is left
    ],
)
def test_a_ratio_stands_for_the_published_counts(ratio, shape, lists_per, layers, lists):
    config = HShareConfig(lists_per=lists_per).with_sharing_ratio(ratio)
    assert (config.num_shared_layers(model(*shape)), config.num_shared_lists(model(*shape))) == (layers, lists)
    assert config.sharing_ratio == ratio


def test_the_default_is_the_published_budget_and_ratio():
    config = HShareConfig()
    assert (config.budget, config.sharing_ratio) == (128, "7/8-3/4-1/2")
    assert config.max_recent == config.num_recent + 1


@pytest.mark.parametrize(("head_dim", "channels"), [(128, 32), (64, 16), (6, 2)])
def test_a_quarter_of_the_channels_are_labels(head_dim, channels):
    assert HShareConfig().num_label_channels(dataclasses.replace(MODEL, head_dim=head_dim)) == channels


def test_more_label_channels_than_a_head_has_are_refused():
    with pytest.raises(ValueError, match="label_channels=9 must be at most the model's head_dim=8"):
        HShareConfig(label_channels=9).num_label_channels(MODEL)


@pytest.mark.parametrize("ratio", ["1/2-1/2", "a-b-c", "1/2-1/2-1/0", "1/2-1/2-1/2-1/2", ""])
def test_what_is_no_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="must be three fractions layer-head-query, such as 7/8-3/4-1/2"):
        HShareConfig().with_sharing_ratio(ratio)


@pytest.mark.parametrize("ratio", ["1-1-2/3", "1-1-2", "1-1-0"])
def test_a_query_ratio_is_one_over_a_whole_number(ratio):
    with pytest.raises(ValueError, match="must be one over the refresh interval"):
        HShareConfig().with_sharing_ratio(ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sinks": -1}, "num_sinks=-1 must be at least 0"),
        ({"num_critical": 0}, "num_critical=0 must be at least 1"),
        ({"num_recent": 0}, "num_recent=0 must be at least 1"),
        ({"refresh_interval": 0}, "refresh_interval=0 must be at least 1"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"layer_ratio": Fraction(0)}, r"layer_ratio=0 must lie in \(0, 1\]"),
        ({"head_ratio": Fraction(3, 2)}, r"head_ratio=3/2 must lie in \(0, 1\]"),
        ({"label_channels": 0}, "label_channels=0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HShareConfig(**changes)
