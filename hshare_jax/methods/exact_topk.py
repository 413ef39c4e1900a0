"""Exact top-k: the tokens with the highest true scores. It is the yardstick of the methods that estimate scores."""

import dataclasses

from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings


def exact_topk(settings: HShareSettings = HShareSettings()) -> HShare:  # noqa: B008 (frozen)
    """Every query head reads the tokens with the highest q . k on all channels, chosen anew on every step.

    Scoring reads every key, so this is no faster than dense decoding. The method has no tail;
    `.with_settings({"tail": "fitted"})` adds one.

    Args:
        settings: the budget and gates.
    """
    settings = dataclasses.replace(settings, lists_per="query_head", scoring="exact", tail=None, pool=1)
    return HShare(settings).with_sharing_ratio("1-1-1")
