"""The methods by their names, each at the same budget of tokens."""

from collections.abc import Sequence

from hshare_jax.errors import SettingError, check_one_of
from hshare_jax.methods.base import Method
from hshare_jax.methods.double_sparsity import double_sparsity
from hshare_jax.methods.exact_topk import exact_topk
from hshare_jax.methods.h2o import H2O
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.names import METHODS, takes_setting
from hshare_jax.methods.quest import Quest
from hshare_jax.methods.snapkv import SnapKV
from hshare_jax.methods.streaming_llm import StreamingLLM
from hshare_jax.models.config import ModelConfig


def method_named(name: str, hshare: HShare, *, max_new_tokens: int | None = None) -> Method | None:
    """The method of this name, at the budget of `hshare`: each head reads the same number of tokens.

    All methods keep the number of dense first layers; where none is given it is one, but for HShare with a tail. They
    split the budget as their papers do:

    - StreamingLLM reads 4 sinks, and recent tokens for the rest.
    - H2O spends half of the budget on heavy hitters and half on recent tokens.
    - Quest reads whole pages of 16. `quest_window` reads as many pages, rounded up, beside HShare's sinks and recent
      tokens.
    - SnapKV reads the prompt's last 32 tokens and chooses the rest. Generated tokens come on top (`snapkv`) or are part
      of the budget (`snapkv_fixed`).
    - Exact top-k and Double Sparsity keep HShare's sinks, recent tokens, `budget_ratio` and `min_length`. Double
      Sparsity also keeps labels and channels.

    Args:
        name: one of `METHODS`. `hshare` returns `hshare` itself; `dense` returns None.
        hshare: the budget, and HShare's settings, plan and channels.
        max_new_tokens: the most that decoding will add, for which SnapKV makes room; None means the whole cache.

    Raises:
        SettingError: an unknown name, or a setting that the method cannot follow.
        ValueError: a budget that is too small for the method.
    """
    check_one_of("method", name, METHODS)
    settings = hshare.settings
    budget = settings.budget
    dense = 1 if settings.dense_layers is None else settings.dense_layers  # of methods without a tail
    page = Quest().page_size
    observed = min(SnapKV().num_observed, budget // 2)
    sinks_and_recent = settings.num_sinks + settings.num_recent
    least = {"streaming_llm": 5, "h2o": 2, "quest": page, "quest_window": page + sinks_and_recent}.get(name, 1)
    if budget < least:
        raise ValueError(f"a budget of {budget} tokens is too small for {name}; it needs at least {least}")
    for gate, off in (("budget_ratio", (None,)), ("min_length", (None, 0))):
        if not takes_setting(name, gate) and getattr(settings, gate) not in off and name != "dense":
            takers = ", ".join(taker for taker in METHODS if takes_setting(taker, gate))
            rule = f"is for {takers}; {name} does not use it"
            raise SettingError(gate, getattr(settings, gate), rule)
    match name:
        case "hshare":
            return hshare
        case "exact_topk":
            return exact_topk(settings)
        case "double_sparsity":
            method = double_sparsity(settings)
            return HShare(method.settings, method.search, channels=hshare.channels)
        case "streaming_llm":
            return StreamingLLM(dense_layers=dense, num_sinks=4, num_recent=budget - 4)
        case "h2o":
            return H2O(dense_layers=dense, num_heavy=budget // 2, num_recent=budget - budget // 2)
        case "quest":
            return Quest(dense_layers=dense, num_pages=budget // page - 1)
        case "quest_window":
            return Quest(
                dense_layers=dense, num_sinks=settings.num_sinks,
                num_pages=-(-settings.num_critical // page), num_recent=settings.num_recent,
            )  # fmt: skip
        case "snapkv":
            return SnapKV(
                dense_layers=dense, num_critical=budget - observed, num_observed=observed,
                max_new_tokens=max_new_tokens,
            )  # fmt: skip
        case "snapkv_fixed":
            return SnapKV(
                dense_layers=dense, num_critical=budget - observed, num_observed=observed, keeps_generated=False
            )
    return None  # dense


def notes_on_short_texts(
    hshare: HShare, config: ModelConfig, sizes: Sequence[tuple[int, int]], *, names: Sequence[str]
) -> list[str]:
    """Notes for the user on texts that are too short for the methods to differ; an empty list if there are none.

    Args:
        hshare: the budget of all methods, and HShare's settings and plan.
        config: the model.
        sizes: for each text, the tokens that are prefilled and the tokens in the end.
        names: the methods that are compared.
    """
    settings, notes = hshare.settings, []
    if list(names) == ["dense"]:
        return notes
    is_whole = [settings.budget_ratio is None and size <= settings.budget for _, size in sizes]
    if num_whole := sum(is_whole):
        notes.append(
            f"{num_whole} of {len(sizes)} texts are no longer than the {settings.budget} tokens that a head reads: "
            "every method decodes them as dense decoding does; choose fewer critical or recent tokens"
        )
    gated = [name for name in names if takes_setting(name, "min_length")]
    num_gated = sum(size < settings.dense_below and not whole for (_, size), whole in zip(sizes, is_whole, strict=True))
    if gated and num_gated:
        notes.append(
            f"{num_gated} of {len(sizes)} texts stay below {settings.dense_below} tokens, where {', '.join(gated)} "
            "read everything; give a smaller min_length (0 for none), or longer texts"
        )
    has_probes = [prefilled > settings.first_probe for prefilled, _ in sizes]
    num_unshared = sum(
        not probed and size >= max(settings.dense_below, settings.budget + 1)
        for probed, (_, size) in zip(has_probes, sizes, strict=True)
    )
    finds_plan = "hshare" in names and hshare.plan is None and hshare.search.shares_lists(settings, config)
    if finds_plan and num_unshared:
        found, lost = "a plan is", ""
        if settings.tail is not None:
            found, lost = "a plan and tails are", ", and loses what it does not read"
        notes.append(
            f"{num_unshared} of {len(sizes)} texts have fewer than the {settings.first_probe + 1} tokens before "
            f"decoding that {found} found from: hshare shares nothing across layers and heads there{lost}; give a plan "
            "and channels made beforehand, by hshare-jax calibrate"
        )
    return notes
