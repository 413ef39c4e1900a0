"""HShare's settings: which tokens a head reads, and how the plan that shares the choice of these tokens is found.

The text beside each setting is the help of the setting's command-line option.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from hshare_jax.errors import SettingError, check_one_of, check_whole, setting
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class HShareSettings:
    """What a head reads on a decode step, and how those tokens are chosen (HShare, ICLR 2025, section 4).

    A head attends to the first `num_sinks` tokens, to `num_critical` tokens that are chosen by score, and to the last
    `num_recent` tokens. A tail stands for the tokens that the head does not read (`kernels.tail.Tail`).

    The settings are static and hashable: they are part of every compiled decode step.

    Raises:
        SettingError: a value outside its range.
    """

    num_sinks: int = setting(16, "first tokens that every head reads")
    num_critical: int = setting(432, "tokens in each list, chosen by score")
    num_recent: int = setting(64, "last tokens that every head reads")
    budget_ratio: Fraction | None = setting(
        None, "list critical tokens up to this share of a text, first and last tokens included"
    )
    refresh_interval: int = setting(1, "decode steps that one choice of tokens serves")
    lists_per: Literal["kv_head", "query_head"] = setting("kv_head", "who chooses: a group of query heads or each head")
    dilate: bool = setting(True, "lists that later steps reuse also favour the token after a good one")
    dense_layers: int | None = setting(
        None, "first layers that read everything; by default none with a tail, and one without"
    )
    min_length: int | None = setting(
        None, "shorter texts read everything; by default twice the budget, with a budget ratio 0"
    )
    scoring: Literal["labels", "exact"] = setting("labels", "score a few channels of each key, or whole keys")
    label_channels: int | None = setting(None, "channels that labels keep of each head; by default 32, or all if fewer")
    label_bits: Literal[4, 8] | None = setting(4, "bits of a label channel; none: not quantised")
    tail: Literal["fitted"] | None = setting(
        "fitted",
        "fitted: virtual tokens, fitted on each prompt, stand for what a head does not read; none: nothing does",
    )
    tail_rank: int = setting(2, "virtual tokens of each head beside the first, which let the tail follow the query")
    pool: int = setting(1, "a computed list keeps so many times its tokens, among which copies choose their own")

    def __post_init__(self) -> None:
        for name, least in (
            ("num_sinks", 0), ("num_critical", 1), ("num_recent", 1), ("refresh_interval", 1), ("tail_rank", 0),
            ("pool", 1),
        ):  # fmt: skip
            check_whole(name, getattr(self, name), least)
        for name, least in (("dense_layers", 0), ("min_length", 0), ("label_channels", 1)):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least)
        if self.budget_ratio is not None:
            _check_ratio("budget_ratio", self.budget_ratio, "of its tokens that a row reads")
        check_one_of("lists_per", self.lists_per, ("kv_head", "query_head"))
        check_one_of("scoring", self.scoring, ("labels", "exact"))
        check_one_of("label_bits", self.label_bits, (4, 8, None))
        check_one_of("tail", self.tail, ("fitted", None))

    @property
    def budget(self) -> int:
        """The most tokens that a head reads right after a refresh."""
        return self.num_sinks + self.num_critical + self.num_recent

    @property
    def num_dense(self) -> int:
        """How many first layers read everything: `dense_layers`, or none with a tail and one without.

        Attention is spread widest in the first layer. Without a tail a list loses much of it.
        """
        if self.dense_layers is not None:
            return self.dense_layers
        return int(self.tail is None)

    @property
    def pool_size(self) -> int:
        """The tokens that a computed list keeps: a list, or with `pool` several times as many."""
        return self.pool * self.num_critical

    @property
    def dense_below(self) -> int:
        """The length below which a row reads everything: `min_length`, or twice the budget.

        A `budget_ratio` bounds what short rows read, so with one the default is 0.
        """
        if self.min_length is not None:
            return self.min_length
        return 2 * self.budget if self.budget_ratio is None else 0

    @property
    def first_probe(self) -> int:
        """The first position at which similarity may be measured.

        Twice as many tokens compete there as a list takes. With fewer, lists would overlap whatever they chose, and a
        plan found there would mean nothing.
        """
        return self.budget + self.num_critical - 1

    @property
    def max_recent(self) -> int:
        """The longest that the recent range grows between two refreshes."""
        return self.num_recent + self.refresh_interval - 1

    @property
    def dilates(self) -> bool:
        """Whether lists are dilated. Only lists that later steps reuse are."""
        return self.dilate and self.refresh_interval > 1

    def num_lists(self, config: ModelConfig) -> int:
        """J, the lists of each layer."""
        return config.num_kv_heads if self.lists_per == "kv_head" else config.num_heads

    def num_label_channels(self, config: ModelConfig) -> int:
        """R, the label channels of each head.

        Raises:
            SettingError: more channels are asked for than a head has.
        """
        channels = self.label_channels or min(32, config.head_dim)
        if channels > config.head_dim:
            raise SettingError("label_channels", channels, f"must be at most the model's head_dim={config.head_dim}")
        return channels

    def check(self, config: ModelConfig) -> None:
        """Raises SettingError if the settings are not for this model."""
        self.num_label_channels(config)

    def num_sparse_layers(self, config: ModelConfig) -> int:
        """How many layers read through lists: those after the dense first layers."""
        return max(config.num_layers - self.num_dense, 0)


@dataclasses.dataclass(frozen=True)
class PlanSearch:
    """How a plan is found from a prompt: which lists may copy another list, and how many; and when it is found anew.

    A decode step reads none of these settings, so one compiled step serves every plan that is found.

    Raises:
        SettingError: a value outside its range.
    """

    layer_ratio: Fraction = setting(Fraction(1, 2), "fraction of the layers that choose for themselves")
    head_ratio: Fraction = setting(Fraction(1), "fraction of a layer's lists that choose for themselves")
    plan_kind: Literal["units", "published", "anchors"] = setting(
        "units", "units: any list copies any lower list; published: layers, then heads; anchors: whole layers"
    )
    plan_scope: Literal["sequence", "batch"] = setting("sequence", "one plan for each prompt, or one for the batch")
    num_probes: int | Literal["all"] = setting(
        64, "last queries of a prompt that plan and tails are found from, or all for the plan"
    )
    refit_interval: int | None = setting(
        512, "decode steps after which plan and tails are found anew, from a row's last tokens; none: never"
    )

    def __post_init__(self) -> None:
        if self.num_probes != "all":
            check_whole("num_probes", self.num_probes, 1)
        if self.refit_interval is not None:
            check_whole("refit_interval", self.refit_interval, REFIT_TOKENS)
        for name in ("layer_ratio", "head_ratio"):
            _check_ratio(name, getattr(self, name), "still computed")
        check_one_of("plan_kind", self.plan_kind, ("units", "published", "anchors"))
        check_one_of("plan_scope", self.plan_scope, ("sequence", "batch"))
        if self.plan_kind == "anchors" and self.head_ratio != 1:
            rule = "must be 1 with {plan_kind}, which shares whole layers"
            others = {"plan_kind": self.plan_kind}
            raise SettingError("head_ratio", self.head_ratio, rule, "or use plan kind 'units'", others)

    @property
    def similarity(self) -> Literal["overlap", "mass"]:
        """The measure that a plan is found from: the published plan's overlap of lists, or attention mass."""
        return "overlap" if self.plan_kind == "published" else "mass"

    def num_shared_layers(self, settings: HShareSettings, config: ModelConfig) -> int:
        """How many layers copy all their lists from a lower layer, in published and anchor plans."""
        return _num_shared(self.layer_ratio, settings.num_sparse_layers(config))

    def num_shared_lists(self, settings: HShareSettings, config: ModelConfig) -> int:
        """How many lists of a layer copy a lower list of that layer, in published plans."""
        return _num_shared(self.head_ratio, settings.num_lists(config))

    def num_computed_lists(self, settings: HShareSettings, config: ModelConfig) -> int:
        """How many lists of all sparse layers are computed at a refresh.

        The published plan removes whole layers and then whole lists, `anchors` removes whole layers. Under `units` the
        number is the product of both ratios.
        """
        layers, J = settings.num_sparse_layers(config), settings.num_lists(config)
        if self.plan_kind == "units":
            return layers * J - _num_shared(self.layer_ratio * self.head_ratio, layers * J)
        return (layers - self.num_shared_layers(settings, config)) * (J - self.num_shared_lists(settings, config))

    def shares_lists(self, settings: HShareSettings, config: ModelConfig) -> bool:
        """Whether any list copies another list, so that a plan must be found."""
        all_lists = settings.num_sparse_layers(config) * settings.num_lists(config)
        return self.num_computed_lists(settings, config) < all_lists


def read_sharing_ratio(text: str) -> tuple[Fraction, Fraction, int]:
    """Layer ratio, head ratio and refresh interval from the paper's notation layer-head-query, such as `7/8-3/4-1/2`.

    Raises:
        SettingError: not three fractions, or a query ratio that is not one over a whole number.
    """
    try:
        layer, head, query = (Fraction(part) for part in text.split("-"))
    except (ValueError, ZeroDivisionError) as error:
        rule = "must be three fractions layer-head-query, such as 7/8-3/4-1/2"
        raise SettingError("sharing_ratio", text, rule) from error
    if query <= 0 or query.numerator != 1:
        rule = f"must end in one over the refresh interval (1, 1/2, 1/3, ...), not in {query}"
        raise SettingError("sharing_ratio", text, rule)
    return layer, head, query.denominator


def _check_ratio(name: str, ratio: object, meaning: str) -> None:
    if not isinstance(ratio, (int, Fraction)):
        raise SettingError(name, ratio, "must be a Fraction, such as Fraction(1, 8)")
    if ratio.denominator > 1000:
        raise SettingError(name, ratio, "must have a denominator of at most 1000")
    if not 0 < ratio <= 1:
        raise SettingError(name, ratio, f"must lie in (0, 1], because it is the fraction {meaning}")


def _num_shared(ratio: Fraction, units: int) -> int:
    return max(min(math.floor((1 - ratio) * units + Fraction(1, 2)), units - 1), 0)
