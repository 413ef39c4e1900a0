"""The methods by their names, each at the same budget of tokens."""

import dataclasses
from collections.abc import Sequence

from hshare_jax.methods import H2O, Quest, SnapKV, StreamingLLM, double_sparsity, exact_topk
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig

METHODS = (
    "hshare", "dense", "exact_topk", "streaming_llm", "h2o", "quest", "quest_window", "snapkv", "snapkv_fixed",
    "double_sparsity",
)  # fmt: skip
_OF_BUDGET = ("num_sinks", "num_critical", "num_recent", "dense_layers")
_OF_METHOD = {
    "dense": (),
    "exact_topk": (*_OF_BUDGET, "budget_ratio", "min_length"),
    "double_sparsity": (*_OF_BUDGET, "budget_ratio", "min_length", "label_channels", "label_bits", "channels_file"),
}
WITHOUT_GATES = ("streaming_llm", "h2o", "quest", "quest_window", "snapkv", "snapkv_fixed")


def has_use_for(name: str, setting: str) -> bool:
    """Returns whether a method takes a setting of HShare, by its name: all have a budget, HShare itself takes all."""
    return name == "hshare" or setting in _OF_METHOD.get(name, _OF_BUDGET)


def tell_short(
    hshare: HShareSettings, config: ModelConfig, sizes: Sequence[tuple[int, int]], *, needs_plan: bool
) -> list[str]:
    """Returns what a user must know of texts that are too short for the settings to show; nothing where none is.

    Args:
        hshare: the budget of all methods, and HShare's settings.
        config: the model.
        sizes: of each text, (tokens that are prefilled, tokens in the end).
        needs_plan: whether HShare finds a plan from each of them.
    """
    notes = []
    is_whole = [hshare.budget_ratio is None and size <= hshare.budget for _, size in sizes]
    if num_whole := sum(is_whole):
        notes.append(
            f"{num_whole} of {len(sizes)} texts are no longer than the {hshare.budget} tokens that a head reads: every "
            "method decodes them as dense decoding does; choose fewer critical or recent tokens"
        )
    has_none = [prefilled <= hshare.first_probe for prefilled, _ in sizes]
    num_unshared = sum(short and not whole for short, whole in zip(has_none, is_whole, strict=True))
    if needs_plan and hshare.shares_lists(config) and num_unshared:
        notes.append(
            f"{num_unshared} of {len(sizes)} texts have fewer than the {hshare.first_probe + 1} tokens before decoding "
            "that a plan is found from: hshare shares nothing across layers and heads there; give a plan and channels "
            "made beforehand, by hshare-jax calibrate"
        )
    return notes


def method_named(
    name: str, hshare: HShareSettings, *, max_new_tokens: int | None = None
) -> HShareSettings | Method | None:
    """Returns a method's settings at the budget of `hshare`: as many tokens a head, its own way to spend them.

    `hshare` returns these settings themselves, `dense` None. All share the number of dense first layers. The others
    split the budget as their papers do: StreamingLLM 4 sinks and the rest recent; H2O half heavy, half recent; Quest
    whole pages of 16, or as many, rounded up, beside HShare's own sinks and recent tokens (`quest_window`); SnapKV its
    last 32 queries and the rest chosen, and what is generated on top (`snapkv`) or within it (`snapkv_fixed`). Exact
    top-k and Double Sparsity keep HShare's own sinks and recent tokens, gates and labels.

    Args:
        name: one of `METHODS`.
        hshare: the budget, and HShare's settings.
        max_new_tokens: what decoding will add at most, which SnapKV makes room for; None: whatever the cache holds.

    Raises:
        ValueError: a name that is none, a budget too small for the method, or a gate that it does not have.
    """
    budget, dense = hshare.budget, hshare.dense_layers
    split = (hshare.num_sinks, hshare.num_critical, hshare.num_recent)
    page = Quest().page_size
    gates = {"budget_ratio": hshare.budget_ratio, "min_length": hshare.min_length}
    observed = min(SnapKV().num_observed, budget // 2)
    least = {"streaming_llm": 5, "h2o": 2, "quest": page, "quest_window": page + hshare.num_sinks + hshare.num_recent}
    if budget < least.get(name, 1):
        raise ValueError(f"a budget of {budget} tokens is too small for {name}; it needs at least {least[name]}")
    for gate, off in (("budget_ratio", None), ("min_length", 0)):
        if name in WITHOUT_GATES and getattr(hshare, gate) != off:
            raise ValueError(
                f"{gate}={getattr(hshare, gate)} is for methods that list by score; {name} has no such gate"
            )
    match name:
        case "hshare":
            return hshare
        case "dense":
            return None
        case "exact_topk":
            return dataclasses.replace(exact_topk(*split, dense_layers=dense), **gates)
        case "double_sparsity":
            labels = {"label_channels": hshare.label_channels, "label_bits": hshare.label_bits}
            return dataclasses.replace(double_sparsity(*split, dense_layers=dense), **gates, **labels)
        case "streaming_llm":
            return StreamingLLM(4, dense, num_recent=budget - 4)
        case "h2o":
            return H2O(0, dense, num_heavy=budget // 2, num_recent=budget - budget // 2)
        case "quest":
            return Quest(0, dense, num_pages=budget // page - 1)
        case "quest_window":
            pages = -(-hshare.num_critical // page)
            return Quest(hshare.num_sinks, dense, num_pages=pages, num_recent=hshare.num_recent)
        case "snapkv":
            return SnapKV(
                0, dense, num_critical=budget - observed, num_observed=observed, max_new_tokens=max_new_tokens
            )
        case "snapkv_fixed":
            return SnapKV(0, dense, num_critical=budget - observed, num_observed=observed, keeps_generated=False)
    raise ValueError(f"method={name!r} must be one of {', '.join(METHODS)}")
