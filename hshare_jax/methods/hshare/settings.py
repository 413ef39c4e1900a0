"""HShare's settings: the token budget of a list, how much is shared, and when it is chosen anew."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from hshare_jax.models.config import ModelConfig

PLAN_SETTINGS = ("layer_ratio", "head_ratio", "plan", "plan_scope", "num_probes")  # that a plan is found by


@dataclasses.dataclass(frozen=True)
class HShareSettings:
    """What a decode step reads and how the choice is shared (HShare, ICLR 2025, section 4). Static and hashable.

    A head attends to `num_sinks` first tokens, `num_critical` chosen ones and the `num_recent` last ones. Ratios are
    the fraction of layers, and of lists within a layer, that still choose for themselves; the rest copy.

    The defaults are what docs/quality.md advises; `published` is the paper's method.
    """

    num_sinks: int = 8
    num_critical: int = 88
    num_recent: int = 32
    budget_ratio: Fraction | None = None  # list critical tokens up to this share of a row, sinks and recent included
    layer_ratio: Fraction = Fraction(1, 2)
    head_ratio: Fraction = Fraction(1)
    refresh_interval: int = 1  # decode steps that one choice serves
    lists_per: Literal["kv_head", "query_head"] = "kv_head"  # one list a group, whose keys are then read once
    plan: Literal["units", "published", "anchors"] = "units"  # what copies: any list; layers, then heads; whole layers
    plan_scope: Literal["sequence", "batch"] = "sequence"  # a plan of its own for each row, or one for all
    dilate: bool = True  # lists that later steps reuse also want the token after a good one
    dense_layers: int = 1  # the first layers read everything
    min_length: int = 0  # rows shorter than this read everything
    scoring: Literal["labels", "exact"] = "labels"  # exact: on all channels of the keys themselves, the yardstick
    label_channels: int | None = None  # channels of a head that labels keep; None: 32, or all of a smaller head
    label_bits: Literal[4, 8] | None = 4  # None: labels are not quantised
    num_probes: int | Literal["all"] = 64  # prompt queries that similarity is measured on; all: as published

    def __post_init__(self) -> None:
        for name, least in (
            ("num_sinks", 0), ("num_critical", 1), ("num_recent", 1), ("refresh_interval", 1),
            ("dense_layers", 0), ("min_length", 0),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), least)
        if self.num_probes != "all":
            check_whole("num_probes", self.num_probes, 1)
        if self.label_channels is not None:
            check_whole("label_channels", self.label_channels, 1)
        for name in ("layer_ratio", "head_ratio", "budget_ratio"):
            ratio = getattr(self, name)
            if ratio is None and name == "budget_ratio":
                continue
            if not isinstance(ratio, (int, Fraction)):
                raise ValueError(f"{name}={ratio!r} must be a Fraction, such as Fraction(1, 8)")
            if ratio.denominator > 1000:
                raise ValueError(f"{name}={ratio} must have a denominator of at most 1000")
            if not 0 < ratio <= 1:
                meaning = "of its tokens that a row reads" if name == "budget_ratio" else "still computed"
                raise ValueError(f"{name}={ratio} must lie in (0, 1]: it is the fraction {meaning}")
        for name, allowed in (
            ("lists_per", ("kv_head", "query_head")), ("plan", ("units", "published", "anchors")),
            ("plan_scope", ("sequence", "batch")), ("scoring", ("labels", "exact")), ("label_bits", (4, 8, None)),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}")

        if self.plan == "anchors" and self.head_ratio != 1:
            raise ValueError(
                f"head_ratio={self.head_ratio} must be 1 with plan='anchors', which shares whole layers; or use 'units'"
            )

    @classmethod
    def published(cls) -> "HShareSettings":
        """Returns the method as the paper and its code have it, at the paper's 128 tokens and 7/8-3/4-1/2.

        Similarity is measured from `first_probe` on, though, where lists can differ in all they hold; and labels keep
        32 channels, as in its code, of heads smaller than its 128 too.
        """
        published = cls(lists_per="query_head", plan="published", dilate=False, dense_layers=0, num_probes="all")
        return published.with_sharing_ratio("7/8-3/4-1/2")

    def for_decoding(self) -> "HShareSettings":
        """Returns these settings with those that only finding a plan reads as the defaults have them."""
        return dataclasses.replace(self, **{name: getattr(HShareSettings, name) for name in PLAN_SETTINGS})

    def for_measuring(self) -> "HShareSettings":
        """Returns these settings with those by which similarity becomes a plan as the defaults have them."""
        plan = "published" if self.plan == "published" else HShareSettings.plan
        return dataclasses.replace(self.for_decoding(), plan=plan, num_probes=self.num_probes)

    @property
    def budget(self) -> int:
        """Returns how many tokens a head reads right after a refresh, at most."""
        return self.num_sinks + self.num_critical + self.num_recent

    @property
    def first_probe(self) -> int:
        """Returns the first position at which similarity may be measured: with twice the candidates that a list takes.

        With as many as it takes every list would be the same, and a plan found there would mean nothing.
        """
        return self.budget + self.num_critical - 1

    @property
    def max_recent(self) -> int:
        """Returns the longest the recent range grows between two refreshes."""
        return self.num_recent + self.refresh_interval - 1

    @property
    def dilates(self) -> bool:
        """Returns whether lists are dilated: only those that later steps reuse."""
        return self.dilate and self.refresh_interval > 1

    @property
    def sharing_ratio(self) -> str:
        """Returns the ratios as the paper writes them: layer-head-query."""
        return f"{self.layer_ratio}-{self.head_ratio}-{Fraction(1, self.refresh_interval)}"

    def with_sharing_ratio(self, ratio: str) -> "HShareSettings":
        """Returns these settings at a ratio written as in the paper, layer-head-query: `7/8-3/4-1/2`.

        Raises:
            ValueError: not three fractions, or a query ratio that is not one over a whole number.
        """
        try:
            layer, head, query = (Fraction(part) for part in ratio.split("-"))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"sharing ratio {ratio!r} must be three fractions layer-head-query, such as 7/8-3/4-1/2"
            ) from error
        if query <= 0 or query.numerator != 1:
            raise ValueError(f"query ratio {query} must be one over the refresh interval: 1, 1/2, 1/3, ...")
        return dataclasses.replace(self, layer_ratio=layer, head_ratio=head, refresh_interval=query.denominator)

    def num_lists(self, model: ModelConfig) -> int:
        """Returns J, the lists of each layer."""
        return model.num_kv_heads if self.lists_per == "kv_head" else model.num_heads

    def num_label_channels(self, model: ModelConfig) -> int:
        """Returns R. Raises ValueError when more channels are asked for than a head has."""
        channels = self.label_channels or min(32, model.head_dim)
        if channels > model.head_dim:
            raise ValueError(f"label_channels={channels} must be at most the model's head_dim={model.head_dim}")
        return channels

    def num_sparse_layers(self, model: ModelConfig) -> int:
        """Returns how many layers read through lists: those after the dense first ones."""
        return max(model.num_layers - self.dense_layers, 0)

    def num_shared_layers(self, model: ModelConfig) -> int:
        """Returns how many layers copy all their lists from a lower layer, under the published plan and anchors."""
        return _num_shared(self.layer_ratio, self.num_sparse_layers(model))

    def num_shared_lists(self, model: ModelConfig) -> int:
        """Returns how many lists of a layer copy a lower list of that layer, under the published plan."""
        return _num_shared(self.head_ratio, self.num_lists(model))

    def num_computed_lists(self, model: ModelConfig) -> int:
        """Returns how many lists of all sparse layers are computed at a refresh.

        The published plan computes whole layers less whole lists, `anchors` whole layers. Under `units` it is the
        product of the two ratios.
        """
        layers, J = self.num_sparse_layers(model), self.num_lists(model)
        if self.plan == "units":
            shared = _num_shared(self.layer_ratio * self.head_ratio, layers * J)
            return layers * J - shared
        return (layers - self.num_shared_layers(model)) * (J - self.num_shared_lists(model))

    def shares_lists(self, model: ModelConfig) -> bool:
        """Returns whether any list copies another, so that a plan must be found."""
        return self.num_computed_lists(model) < self.num_sparse_layers(model) * self.num_lists(model)


def check_whole(name: str, value: object, least: int) -> None:
    """Raises ValueError, with the argument's name, unless its value is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be at least {least}, a whole number")


def _num_shared(ratio: Fraction, units: int) -> int:
    return max(min(math.floor((1 - ratio) * units + Fraction(1, 2)), units - 1), 0)
