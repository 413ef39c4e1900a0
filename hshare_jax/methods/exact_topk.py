"""Exact top-k: the tokens with the highest true scores, the yardstick that no cheaper method can pass by much."""

from hshare_jax.methods.hshare.settings import HShareSettings


def exact_topk(
    num_sinks: int = 8, num_critical: int = 88, num_recent: int = 32, *, dense_layers: int = 1
) -> HShareSettings:
    """Returns settings under which every query head reads the best tokens by q . k on all channels, on every step."""
    settings = HShareSettings(
        num_sinks=num_sinks, num_critical=num_critical, num_recent=num_recent, dense_layers=dense_layers,
        scoring="exact", lists_per="query_head",
    )  # fmt: skip
    return settings.with_sharing_ratio("1-1-1")
