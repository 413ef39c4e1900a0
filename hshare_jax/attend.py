"""The attention that a model is given: prefill over the cache, or a decode step, dense or through the plan."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.critical_tokens import candidate_range, find_critical_tokens, num_critical_in_budget, weigh_tokens
from hshare_jax.decode_state import DecodeState, SharedLists
from hshare_jax.kernels.api import dense_decode, dispatch, prefill_attention, shared_decode
from hshare_jax.kernels.select import select_labels, select_scores
from hshare_jax.kv_cache import KVCache, append
from hshare_jax.labels import label_query, make_labels, score_keys, score_labels
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Attend
from hshare_jax.shapes import Lists


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptQueries:
    """What is kept of a prompt's rotated queries until channels and plan are found from them."""

    probes: tuple[Array, ...]  # L x [B, P, N, H], zero where a row lacks a probe
    sizes: tuple[Array, ...]  # L x [B, N, H] float32, the sum of |q| over the prompt


def prefill_attend(
    config: ModelConfig, slots: Int[Array, "B T"], starts: Int[Array, "B"], probe_positions: Int[Array, "B P"] | None
) -> Attend[tuple[KVCache, PromptQueries | None]]:
    """Returns exact causal attention over the cache; it also keeps what is asked of the queries.

    Args:
        config: the model.
        slots: where each new token is written; at or beyond the capacity for padding.
        starts: the position of each row's first new token.
        probe_positions: queries to keep; None keeps nothing.
    """

    def attend(
        layer: int, q: Array, k: Array, v: Array, state: tuple[KVCache, PromptQueries | None]
    ) -> tuple[Array, tuple[KVCache, PromptQueries | None]]:
        cache, kept = state
        cache = _append_layer(cache, layer, k, v, slots)
        if kept is not None and probe_positions is not None:
            kept = _keep_queries(kept, layer, q, slots < cache.capacity, probe_positions - starts[:, None])
        out = prefill_attention(q, cache.keys[layer], cache.values[layer], starts, window=config.windows[layer])
        return out, (cache, kept)

    return attend


def _keep_queries(
    kept: PromptQueries,
    layer: int,
    q: Float[Array, "B T N H"],
    is_token: Bool[Array, "B T"],
    offsets: Int[Array, "B P"],
) -> PromptQueries:
    is_here = (offsets >= 0) & (offsets < q.shape[1])
    picked = jnp.take_along_axis(q, jnp.maximum(offsets, 0)[:, :, None, None], axis=1, mode="clip")
    probes = jnp.where(is_here[:, :, None, None], picked, kept.probes[layer])
    size = jnp.where(is_token[:, :, None, None], jnp.abs(q.astype(jnp.float32)), 0).sum(axis=1)
    return PromptQueries(
        _replace_layer(kept.probes, layer, probes), _replace_layer(kept.sizes, layer, kept.sizes[layer] + size)
    )


def decode_attend(
    config: ModelConfig,
    slots: Int[Array, "B 1"],
    lengths: Int[Array, "B"],
    is_due: Bool[Array, "B"] | bool,
    impl: str = "auto",
) -> Attend[DecodeState]:
    """Returns the attention of one decode step: dense where the state shares no lists, else through its plan.

    Args:
        config: the model.
        slots: where each row's new token is written; at or beyond the capacity for rows that have finished.
        lengths: tokens of each row, the new one included.
        is_due: rows that choose their lists anew on this step; False when none does, known before tracing.
        impl: what runs it (`kernels.api.dispatch`).
    """

    def attend(layer: int, q: Array, k: Array, v: Array, state: DecodeState) -> tuple[Array, DecodeState]:
        window = config.windows[layer]
        cache = _append_layer(state.cache, layer, k, v, slots)
        query, keys, values, shared = q[:, 0], cache.keys[layer], cache.values[layer], state.shared
        if shared is None or layer < shared.config.dense_layers:
            out = dense_decode(query, keys, values, lengths, window=window, impl=impl)
            return out[:, None], DecodeState(cache, shared)
        hshare, shared = shared.config, _append_labels(shared, layer, k, slots)
        if is_due is not False:
            shared = _refresh(shared, layer, query, keys, lengths, jnp.asarray(is_due), window, impl)
        out = shared_decode(
            query, keys, values, shared.token_indices, shared.source, layer, lengths, shared.recent_start,
            num_sinks=hshare.num_sinks, max_recent=hshare.max_recent, window=window, min_length=hshare.min_length,
            impl=impl,
        )  # fmt: skip
        return out[:, None], DecodeState(cache, shared)

    return attend


def _refresh(
    shared: SharedLists, layer: int, query: Float[Array, "B N H"], keys: Array, lengths: Array, is_due: Array,
    window: int | None, impl: str,
) -> SharedLists:  # fmt: skip
    """Chooses the lists of this layer that are their own source, in rows that are due; the others stay as they are.

    A layer in which no row chooses costs nothing; on a GPU a few launches that return at once, but under exact scoring
    the scores of the whole cache.
    """
    if shared.plan is not None and not shared.plan.owns(layer):
        return shared
    J, labels, config = shared.source.shape[2], shared.labels[layer], shared.config
    lists, channels, bits = shared.token_indices, shared.channels[:, layer], config.label_bits
    is_own = shared.source[:, layer] == layer * J + jnp.arange(J, dtype=jnp.int32)[None, :]
    is_chosen = is_own & is_due[:, None]

    def plain() -> Lists:
        def choose() -> Int[Array, "B J C"]:
            scores = score_keys(query, keys) if labels is None else score_labels(query, labels, channels, bits)
            new = find_critical_tokens(scores, lengths, num_lists=J, config=config, window=window)
            return jnp.where(is_chosen[:, :, None], new, lists[layer])

        return lists.at[layer].set(lax.cond(is_chosen.any(), choose, lambda: lists[layer]))

    def pallas(interpret: bool) -> Lists:
        first, last = candidate_range(lengths, config, window)
        allowed = num_critical_in_budget(lengths, config)
        if allowed is None:
            allowed = jnp.full_like(lengths, config.num_critical)
        competing = (shared.source, is_due, first, last, allowed)
        if labels is None:
            weights = weigh_tokens(score_keys(query, keys), lengths, num_lists=J, config=config, window=window)
            return select_scores(lists, layer, weights, *competing, interpret=interpret)
        return select_labels(
            lists, layer, label_query(query, channels, bits), labels.codes, labels.scales, *competing,
            dilate=config.dilates, interpret=interpret,
        )  # fmt: skip

    return dataclasses.replace(shared, token_indices=dispatch(impl, pallas=pallas, plain=plain))


def _append_layer(cache: KVCache, layer: int, k: Array, v: Array, slots: Array) -> KVCache:
    keys, values = append(cache.keys[layer], k, slots), append(cache.values[layer], v, slots)
    return dataclasses.replace(
        cache, keys=_replace_layer(cache.keys, layer, keys), values=_replace_layer(cache.values, layer, values)
    )


def _append_labels(shared: SharedLists, layer: int, k: Float[Array, "B 1 K H"], slots: Array) -> SharedLists:
    labels = shared.labels[layer]
    if labels is None:
        return shared
    new = make_labels(k.swapaxes(1, 2), shared.channels[:, layer], shared.config.label_bits)
    labels = jax.tree.map(lambda old, one: append(old, jnp.moveaxis(one, 3, 1), slots, axis=3), labels, new)
    return dataclasses.replace(shared, labels=_replace_layer(shared.labels, layer, labels))


def _replace_layer(arrays: tuple, layer: int, new: object) -> tuple:
    return (*arrays[:layer], new, *arrays[layer + 1 :])
