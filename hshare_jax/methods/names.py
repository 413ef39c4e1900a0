"""The names of the methods, which settings each takes, and what all know. No jax: the command line starts fast."""

REFIT_TOKENS = 64  # last tokens of each row that a refit reads once more; refits are at least as many steps apart

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


def takes_setting(name: str, setting: str) -> bool:
    """Whether a method takes a setting of HShare. HShare takes all, `dense` none, the others the budget or more."""
    return name == "hshare" or setting in _SETTINGS.get(name, _BUDGET)
