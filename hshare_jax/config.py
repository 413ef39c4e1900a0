"""HShare's settings: the token budget of a list, how much is shared, and when it is chosen anew."""

import dataclasses
import math
from fractions import Fraction
from typing import Literal

from hshare_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class HShareConfig:
    """What a decode step reads and how the choice is shared (HShare, ICLR 2025, section 4). Static and hashable.

    A head attends to `num_sinks` first tokens, `num_critical` chosen ones and the `num_recent` last ones. Ratios are
    the fraction of layers, and of lists within a layer, that still choose for themselves; the rest copy.
    """

    num_sinks: int = 8
    num_critical: int = 88
    num_recent: int = 32
    layer_ratio: Fraction = Fraction(7, 8)
    head_ratio: Fraction = Fraction(3, 4)
    refresh_interval: int = 2  # decode steps that one choice serves
    lists_per: Literal["kv_head", "query_head"] = (
        "kv_head"  # query_head as published; kv_head reads a group's keys once
    )
    label_channels: int | None = None  # channels of a head that scores are taken on; None: a quarter of them
    num_probes: int = 32  # prompt queries that similarity is measured on

    def __post_init__(self) -> None:
        for name, least in (
            ("num_sinks", 0), ("num_critical", 1), ("num_recent", 1), ("refresh_interval", 1), ("num_probes", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be at least {least}, a whole number")
        for name in ("layer_ratio", "head_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]: it is the fraction still computed")
        if self.lists_per not in ("kv_head", "query_head"):
            raise ValueError(f"lists_per={self.lists_per!r} must be 'kv_head' or 'query_head'")
        if self.label_channels is not None and self.label_channels < 1:
            raise ValueError(f"label_channels={self.label_channels} must be at least 1")

    @property
    def budget(self) -> int:
        """Returns how many tokens a head reads right after a refresh."""
        return self.num_sinks + self.num_critical + self.num_recent

    @property
    def max_recent(self) -> int:
        """Returns the longest the recent range grows between two refreshes."""
        return self.num_recent + self.refresh_interval - 1

    @property
    def sharing_ratio(self) -> str:
        """Returns the ratios as the paper writes them: layer-head-query."""
        return f"{self.layer_ratio}-{self.head_ratio}-{Fraction(1, self.refresh_interval)}"

    def with_sharing_ratio(self, ratio: str) -> "HShareConfig":
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
        channels = self.label_channels or math.ceil(model.head_dim / 4)
        if channels > model.head_dim:
            raise ValueError(f"label_channels={channels} must be at most the model's head_dim={model.head_dim}")
        return channels

    def num_shared_layers(self, model: ModelConfig) -> int:
        """Returns how many layers copy all their lists from a lower layer."""
        return _num_shared(self.layer_ratio, model.num_layers)

    def num_shared_lists(self, model: ModelConfig) -> int:
        """Returns how many lists of a layer copy a lower list of that layer."""
        return _num_shared(self.head_ratio, self.num_lists(model))


def _num_shared(ratio: Fraction, units: int) -> int:
    return min(math.floor((1 - ratio) * units + Fraction(1, 2)), units - 1)
