"""Similarity: how far the critical tokens of two layers, or of two lists of a layer, overlap on the prompt."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.config import HShareConfig
from hshare_jax.critical_tokens import find_critical_tokens
from hshare_jax.models.config import ModelConfig


def probe_positions(
    starts: Int[Array, "B"], lengths: Int[Array, "B"], config: HShareConfig
) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """Returns (positions, is_probe): the prompt queries that similarity is measured on, spread evenly over each row.

    A probe needs num_critical candidates, so it stands no earlier than the last token of a full budget; only the tokens
    of this prefill, at [start, length), can be probes. A row with fewer such positions than probes uses each once; one
    without any has no probe and keeps the identity plan. A position that is no probe is -1.
    """
    first = jnp.maximum(starts, config.budget - 1)
    count = jnp.maximum(lengths - first, 0)
    used = jnp.minimum(count, config.num_probes)[:, None]
    index = jnp.arange(config.num_probes, dtype=jnp.int32)[None, :]
    positions = first[:, None] + index * (count[:, None] - 1) // jnp.maximum(used - 1, 1)
    is_probe = index < used
    return jnp.where(is_probe, positions, -1), is_probe


def measure_similarity(
    probes: tuple[Array, ...],
    labels: tuple[Array, ...],
    channels: Int[Array, "B L K R"],
    positions: Int[Array, "B P"],
    *,
    model: ModelConfig,
    config: HShareConfig,
) -> tuple[Float[Array, "B L L"], Float[Array, "B L J J"]]:
    """Returns (similarity of layers, of the lists within each layer): mean over probes of |A and B| / num_critical.

    Only the chosen tokens count, not sinks and recent ones; that of layers is pooled over their lists (HShare, ICLR
    2025, section 4.2). Probes are taken one after the other, so memory holds one mark per list and slot and never one
    per pair of tokens.

    Args:
        probes: L x [B, P, N, H], rotated queries.
        labels: L x [B, K, S, R].
        channels: the label channels of every layer.
        positions: where the probes stand; negative where there is none.
    """
    B = positions.shape[0]
    S, J, L = labels[0].shape[2], config.num_lists(model), model.num_layers
    windows = jnp.asarray([S if window is None else window for window in model.windows], jnp.int32)
    # Stacked, so that one layer is compiled and not L.
    layers = (jnp.stack(labels), jnp.moveaxis(channels, 1, 0), windows)
    rows, lists = jnp.arange(B)[:, None, None], jnp.arange(J)[None, :, None]

    def overlap(queries: Array, position: Array) -> tuple[Array, Array]:
        def mark(layer: tuple[Array, Array, Array, Array]) -> Array:
            q, label, channel, window = layer
            tokens = find_critical_tokens(q, label, channel, position + 1, num_lists=J, config=config, window=window)
            # EMPTY is written to a slot of its own, past the end.
            tokens = jnp.where(tokens < 0, S, tokens)
            return jnp.zeros((B, J, S + 1), jnp.float32).at[rows, lists, tokens].set(1.0)[..., :S]

        marked = lax.map(mark, (queries, *layers))
        return jnp.einsum("LBJS,MBJS->BLM", marked, marked), jnp.einsum("LBJS,LBIS->BLJI", marked, marked)

    def add(total: tuple[Array, Array], probe: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        queries, position = probe
        is_probe = position >= 0
        layers, heads = overlap(queries, position)
        layers = total[0] + jnp.where(is_probe[:, None, None], layers, 0)
        return (layers, total[1] + jnp.where(is_probe[:, None, None, None], heads, 0)), None

    zeros = (jnp.zeros((B, L, L), jnp.float32), jnp.zeros((B, L, J, J), jnp.float32))
    (of_layers, of_lists), _ = lax.scan(add, zeros, (jnp.stack(probes, axis=1).swapaxes(0, 2), positions.T))
    # Divided only now: sums of whole numbers are exact, so equal overlaps are equal numbers and ties break by order.
    most = config.num_critical * jnp.maximum((positions >= 0).sum(axis=1), 1)
    return of_layers / (most * J)[:, None, None], of_lists / most[:, None, None, None]
