"""One decode step: a token per row in, logits and the next state out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.attend import decode_attend
from hshare_jax.decode_state import DecodeState
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.shapes import Logits, PerRow, RowMask, check_rows


@functools.partial(jax.jit, static_argnames=("config", "refresh", "impl"), donate_argnames=("state",))
def decode_step(
    params: dict,
    tokens: PerRow,
    state: DecodeState,
    *,
    config: ModelConfig,
    refresh: bool | None = None,
    is_active: RowMask | None = None,
    impl: str = "auto",
) -> tuple[Logits, DecodeState]:
    """Returns (float32 logits for the next token [B, V], the next state).

    Jitted; inside a user's own jit or scan it is traced in place. The state is donated: use the returned one. A row
    whose cache is full yields NaN logits from then on, since its tokens can no longer be kept.

    Args:
        params: the decoder's parameters.
        tokens: the last token of each row [B]; it is appended to the cache here.
        state: from `prefill` or a previous step.
        config: the model.
        refresh: with shared lists, whether this step chooses critical tokens anew. True or False is a static schedule:
            True on the first step after prefill and on every `refresh_interval`-th from there. None leaves it to each
            row's age, so that rows that started at different times can share a batch. Ignored by dense decoding.
        is_active: bool, rows that take part [B]; the others append nothing and keep their length, and their logits mean
            nothing. None: all.
        impl: what computes selection and attention: `auto` takes the Pallas kernels on an NVIDIA GPU and plain jnp
            elsewhere; `pallas` and `reference` name one; `interpret` runs the kernels on any machine, slowly.

    Raises:
        ValueError: arrays whose shape does not fit the state, or an `impl` that cannot run here.
    """
    cache, shared = state.cache, state.shared
    positions = cache.lengths
    check_rows("tokens", tokens, positions.shape, jnp.integer)
    if is_active is not None:
        check_rows("is_active", is_active, positions.shape, jnp.bool_)
    active = jnp.ones_like(positions, dtype=bool) if is_active is None else is_active
    lengths = positions + active
    is_due: Array | bool = False
    if shared is not None:
        if refresh is not False:
            is_due = active if refresh else active & (shared.age % shared.config.refresh_interval == 0)
        # The recent range starts where it did at the refresh and grows; a caller who never refreshes has it slide.
        start = jnp.where(is_due, lengths - shared.config.num_recent, shared.recent_start)
        start = jnp.maximum(start, lengths - shared.config.max_recent)
        shared = dataclasses.replace(shared, recent_start=jnp.maximum(start, 0))
    slots = jnp.where(active, positions, cache.capacity)[:, None]
    attend = decode_attend(config, slots, lengths, is_due, impl)
    decoder, variables = Decoder(config), {"params": params}
    hidden, state = decoder.apply(variables, tokens[:, None], positions[:, None], attend, DecodeState(cache, shared))  # pyright: ignore[reportAssignmentType]
    logits = decoder.apply(variables, hidden[:, 0], method="unembed")
    logits = jnp.where((active & (positions >= min(cache.capacity, config.max_positions)))[:, None], jnp.nan, logits)  # pyright: ignore[reportArgumentType]
    cache, shared = dataclasses.replace(state.cache, lengths=lengths), state.shared
    if shared is not None:
        shared = dataclasses.replace(shared, age=shared.age + active)
    return logits, DecodeState(cache, shared)
