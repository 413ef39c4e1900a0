"""Double Sparsity: each head chooses tokens by a few label channels, on each step (Yang et al., arXiv 2408.07092)."""

import dataclasses

from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings


def double_sparsity(settings: HShareSettings = HShareSettings()) -> HShare:  # noqa: B008 (frozen)
    """Double Sparsity: HShare at ratio 1-1-1 with a list for each query head (sections 3.1 and 3.2).

    Label channels are the prompt's own, unless the returned method is given `channels` from a calibration, as the paper
    does offline. The method has no tail; `.with_settings({"tail": "fitted"})` adds one.

    Args:
        settings: the budget, gates and labels.
    """
    settings = dataclasses.replace(settings, lists_per="query_head", scoring="labels", tail=None, pool=1)
    return HShare(settings).with_sharing_ratio("1-1-1")
