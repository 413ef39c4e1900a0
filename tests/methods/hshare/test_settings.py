"""HShare's settings: the counts that the published ratios stand for, and the values that are refused."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import MODEL

from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.hshare.share_plan import SharePlan


def config_of(num_layers, num_heads, num_kv_heads):
    return dataclasses.replace(
        MODEL, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64,
        windows=(None,) * num_layers,
    )  # fmt: skip


# `layers` layers copy, `lists` lists of a layer copy, and a refresh computes `computed` lists. Numbers of copies are
# rounded half up, and at least one layer and one list of a layer do not copy.
@pytest.mark.parametrize(
    ("ratio", "shape", "lists_per", "dense", "layers", "lists", "computed"),
    [
        ("7/8-3/4-1/2", (32, 32, 32), "query_head", 0, 4, 8, 28 * 24),  # LLaMA2-7b, as published
        ("3/4-3/4-1/2", (32, 32, 32), "query_head", 0, 8, 8, 24 * 24),
        ("1/2-1/2-1/2", (32, 32, 32), "query_head", 0, 16, 16, 16 * 16),
        ("1/2-1/2-1/2", (80, 64, 8), "query_head", 0, 40, 32, 40 * 32),  # LLaMA3-70b
        ("7/8-3/4-1/2", (30, 9, 3), "query_head", 0, 4, 2, 26 * 7),  # SmolLM2
        ("7/8-3/4-1/2", (30, 9, 3), "kv_head", 0, 4, 1, 26 * 2),
        ("7/8-3/4-1/2", (30, 9, 3), "kv_head", 1, 4, 1, 25 * 2),  # 29 sparse layers
        ("1-1-1", (30, 9, 3), "kv_head", 0, 0, 0, 90),
        ("1-1-1", (30, 9, 3), "kv_head", 2, 0, 0, 84),
        ("1/100-1/100-1", (30, 9, 3), "kv_head", 0, 29, 2, 1),
        ("1/2-1/2-1", (4, 9, 3), "kv_head", 4, 0, 2, 0),  # all layers are dense
        ("1/2-1/2-1", (4, 9, 3), "kv_head", 9, 0, 2, 0),
    ],
)
def test_a_ratio_stands_for_the_published_counts(ratio, shape, lists_per, dense, layers, lists, computed):
    settings = HShareSettings(lists_per=lists_per, dense_layers=dense)
    method = HShare(settings, PlanSearch(plan_kind="published")).with_sharing_ratio(ratio)
    given = method.settings, config_of(*shape)
    assert (method.search.num_shared_layers(*given), method.search.num_shared_lists(*given)) == (layers, lists)
    assert method.search.num_computed_lists(*given) == computed
    assert method.sharing_ratio == ratio


@pytest.mark.parametrize(
    ("ratio", "shape", "lists_per", "dense", "computed"),
    [
        ("1/3-1-1", (30, 9, 3), "kv_head", 1, 29),  # SmolLM2 has 87 lists in sparse layers
        ("1/3-1-1", (30, 9, 3), "query_head", 1, 87),
        ("7/8-3/4-1/2", (32, 32, 32), "query_head", 0, 672),  # the same number as the published plan
        ("7/8-3/4-1/2", (30, 9, 3), "kv_head", 1, 57),  # 21/32 of 87 is 57.1
        ("1/2-1-1", (5, 9, 3), "kv_head", 0, 7),  # a half is rounded up to a list that copies
        ("1/100-1/100-1", (30, 9, 3), "kv_head", 0, 1),
        ("1-1-1", (30, 9, 3), "kv_head", 2, 84),
        ("1/2-1-1", (4, 9, 3), "kv_head", 4, 0),
    ],
)
def test_units_compute_the_product_of_both_ratios_of_all_lists(ratio, shape, lists_per, dense, computed):
    method = HShare(HShareSettings(lists_per=lists_per, dense_layers=dense)).with_sharing_ratio(ratio)
    assert method.search.num_computed_lists(method.settings, config_of(*shape)) == computed


def test_the_default_has_the_papers_larger_budget_and_shares_layers_alone():
    method = HShare()
    assert (method.settings.budget, method.sharing_ratio) == (512, "1/2-1-1")
    assert method.settings.max_recent == method.settings.num_recent
    assert dataclasses.replace(method.settings, refresh_interval=3).max_recent == method.settings.num_recent + 2


@pytest.mark.parametrize(("min_length", "dense_below"), [(None, 24), (0, 0), (7, 7)])
def test_by_default_rows_below_twice_the_budget_read_everything(min_length, dense_below):
    settings = HShareSettings(num_sinks=2, num_critical=6, num_recent=4, min_length=min_length)
    assert settings.dense_below == dense_below


def test_with_a_ratio_as_the_budget_short_rows_are_sparse_too():
    assert HShareSettings(budget_ratio=Fraction(1, 8)).dense_below == 0


def test_the_published_method_shares_layers_then_heads_and_is_never_dense():
    method = HShare.paper()
    settings, search = method.settings, method.search
    assert (settings.num_sinks, settings.num_critical, settings.num_recent) == (8, 88, 32)
    assert (search.plan_kind, settings.lists_per, search.plan_scope) == ("published", "query_head", "sequence")
    assert (settings.dense_layers, settings.min_length, settings.refresh_interval) == (0, 0, 2)
    assert (settings.dilate, search.num_probes, settings.scoring, settings.label_bits) == (False, "all", "labels", 4)
    assert (method.sharing_ratio, settings.budget_ratio, settings.tail) == ("7/8-3/4-1/2", None, None)


def test_a_method_with_a_plan_and_channels_is_hashable_and_equal_by_value():
    channels = np.arange(24).reshape(1, 3, 8)
    one, other = (HShare(plan=SharePlan(((0, 1, 2),)), channels=given) for given in (channels, jnp.asarray(channels)))
    assert one == other
    assert hash(one) == hash(other)
    assert one != HShare(plan=SharePlan(((0, 1, 1),)), channels=channels)


def test_settings_and_the_search_are_changed_by_field_name():
    method = HShare().with_settings({"num_sinks": 3, "num_probes": 5, "plan_kind": "published"})
    assert method == HShare(HShareSettings(num_sinks=3), PlanSearch(num_probes=5, plan_kind="published"))


@pytest.mark.parametrize(("head_dim", "channels"), [(128, 32), (64, 32), (32, 32), (6, 6)])
def test_labels_keep_32_channels_or_all_of_a_smaller_head(head_dim, channels):
    assert HShareSettings().num_label_channels(dataclasses.replace(MODEL, head_dim=head_dim)) == channels


def test_more_label_channels_than_a_head_has_are_refused():
    with pytest.raises(ValueError, match="label_channels=9 must be at most the model's head_dim=8"):
        HShareSettings(label_channels=9).num_label_channels(MODEL)


@pytest.mark.parametrize("ratio", ["1/2-1/2", "a-b-c", "1/2-1/2-1/0", "1/2-1/2-1/2-1/2", ""])
def test_a_malformed_sharing_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="must be three fractions layer-head-query, such as 7/8-3/4-1/2"):
        HShare().with_sharing_ratio(ratio)


@pytest.mark.parametrize("ratio", ["1-1-2/3", "1-1-2", "1-1-0"])
def test_a_query_ratio_is_one_over_a_whole_number(ratio):
    with pytest.raises(ValueError, match="must end in one over the refresh interval"):
        HShare().with_sharing_ratio(ratio)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sinks": -1}, "num_sinks=-1 must be at least 0"),
        ({"num_critical": 0}, "num_critical=0 must be at least 1"),
        ({"num_recent": 0}, "num_recent=0 must be at least 1"),
        ({"num_recent": 10**25}, "must be at most 268435456"),
        ({"refresh_interval": 0}, "refresh_interval=0 must be at least 1"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"layer_ratio": Fraction(0)}, r"layer_ratio=0 must lie in \(0, 1\]"),
        ({"head_ratio": Fraction(3, 2)}, r"head_ratio=3/2 must lie in \(0, 1\]"),
        ({"budget_ratio": Fraction(0)}, r"budget_ratio=0 must lie in \(0, 1\], because .* tokens that a row reads"),
        ({"budget_ratio": Fraction(9, 8)}, r"budget_ratio=9/8 must lie in \(0, 1\]"),
        ({"label_channels": 0}, "label_channels=0 must be at least 1"),
        ({"num_probes": "some"}, "num_probes='some' must be at least 1, a whole number"),
        ({"num_critical": 1.5}, "num_critical=1.5 must be at least 1, a whole number"),
        ({"dense_layers": -1}, "dense_layers=-1 must be at least 0"),
        ({"min_length": -1}, "min_length=-1 must be at least 0"),
        ({"label_bits": 2}, "label_bits=2 must be one of 4, 8, None"),
        ({"tail": "learned"}, "tail='learned' must be one of 'fitted', None"),
        ({"tail_rank": -1}, "tail_rank=-1 must be at least 0"),
        ({"scoring": "guess"}, "scoring='guess' must be one of 'labels', 'exact'"),
        ({"lists_per": "layer"}, "lists_per='layer' must be one of 'kv_head', 'query_head'"),
        ({"plan_kind": "none"}, "plan_kind='none' must be one of 'units', 'published', 'anchors'"),
        ({"plan_kind": "anchors", "head_ratio": Fraction(1, 2)}, "must be 1 with plan_kind='anchors'"),
        ({"plan_scope": "head"}, "plan_scope='head' must be one of 'sequence', 'batch'"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HShare().with_settings(changes)


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"unknown settings plan; there are num_sinks, .*, num_probes"):
        HShare().with_settings({"plan": "units"})
