"""Double Sparsity: tokens chosen by a few label channels, by each head on each step (Yang et al., arXiv 2408.07092)."""

from hshare_jax.methods.hshare.settings import HShareSettings


def double_sparsity(
    num_sinks: int = 8, num_critical: int = 88, num_recent: int = 32, *, dense_layers: int = 1
) -> HShareSettings:
    """Returns its settings: HShare at ratio 1-1-1, lists per query head, 4-bit labels (sections 3.1 and 3.2).

    Label channels are the prompt's own unless `channels` from a calibration are given, as the paper does offline.
    """
    settings = HShareSettings(
        num_sinks=num_sinks, num_critical=num_critical, num_recent=num_recent, dense_layers=dense_layers,
        lists_per="query_head",
    )  # fmt: skip
    return settings.with_sharing_ratio("1-1-1")
