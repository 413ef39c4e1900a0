"""One decode step: a token per row in, logits and the next state out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hshare_jax.attend import decode_attend
from hshare_jax.decode_state import DecodeState
from hshare_jax.methods.base import Step
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
            row's age, so that rows that started at different times can share a batch. Other methods ignore it.
        is_active: bool, rows that take part [B]; the others append nothing and keep their length, and their logits mean
            nothing. None: all.
        impl: what computes selection and attention: `auto` takes the Pallas kernels on an NVIDIA GPU and plain jnp
            elsewhere; `pallas` and `reference` name one; `interpret` runs the kernels on any machine, slowly.

    Raises:
        ValueError: arrays whose shape does not fit the state, or an `impl` that cannot run here.
    """
    cache, selection = state.cache, state.method_state
    positions = cache.lengths
    check_rows("tokens", tokens, positions.shape, jnp.integer)
    if is_active is not None:
        check_rows("is_active", is_active, positions.shape, jnp.bool_)
    active = jnp.ones_like(positions, dtype=bool) if is_active is None else is_active
    lengths = positions + active
    slots = jnp.where(active, positions, cache.capacity)[:, None]
    step = Step(config, slots, lengths, active, refresh, impl)
    if selection is not None:
        selection = selection.begin(step)
    decoder, variables = Decoder(config), {"params": params}
    state = DecodeState(cache, selection)
    hidden, state = decoder.apply(variables, tokens[:, None], positions[:, None], decode_attend(step), state)  # pyright: ignore[reportAssignmentType]
    logits = decoder.apply(variables, hidden[:, 0], method="unembed")
    logits = jnp.where((active & (positions >= min(cache.capacity, config.max_positions)))[:, None], jnp.nan, logits)  # pyright: ignore[reportArgumentType]
    return logits, DecodeState(dataclasses.replace(state.cache, lengths=lengths), state.method_state)
