"""The names of the methods, and which settings each method takes. Nothing here computes, so a start stays short."""

METHODS = (
    "hshare", "dense", "exact_topk", "streaming_llm", "h2o", "quest", "quest_window", "snapkv", "snapkv_fixed",
    "double_sparsity",
)  # fmt: skip

_BUDGET = ("num_sinks", "num_critical", "num_recent", "dense_layers")
_GATES = ("budget_ratio", "min_length")
_SETTINGS = {
    "dense": (),
    "exact_topk": (*_BUDGET, *_GATES),
    "double_sparsity": (*_BUDGET, *_GATES, "label_channels", "label_bits", "channels_file"),
}


def has_use_for(name: str, setting: str) -> bool:
    """Whether a method takes a setting of HShare: HShare takes all settings, the others at least the budget."""
    return name == "hshare" or setting in _SETTINGS.get(name, _BUDGET)
