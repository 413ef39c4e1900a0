"""One decode step: a token per row in, logits and the next state out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hshare_jax.attend import decode_attend
from hshare_jax.decode_state import DecodeState, on_parts
from hshare_jax.kernels.api import project
from hshare_jax.methods.base import Step
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts, run_decoder, unembed
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
    """Decodes one token per row: float32 logits for the next token [B, V], and the next state.

    The function is jitted; inside a caller's own jit or scan it is traced in place. The state is donated, so use the
    returned one. A row whose cache is full yields NaN logits from then on, because its tokens can no longer be kept.

    Args:
        params: the decoder's parameters.
        tokens: the last token of each row [B], which this step appends to the cache.
        state: from `prefill` or a previous step.
        config: the model.
        refresh: for HShare, whether this step chooses critical tokens anew. True or False is a static schedule: True on
            the first step after prefill and on every `refresh_interval`-th step from there. None follows each row's
            age, so that rows that started at different times can share a batch. Other methods ignore it.
        is_active: rows that take part [B]; None means all. Other rows append nothing and keep their length, and their
            logits mean nothing.
        impl: which implementation appends, and computes selection, attention and projections, as `kernels.api`
            describes it. `auto` takes the Pallas kernels on an NVIDIA GPU, on a CPU the native ones if they were
            compiled when the package was installed, and plain jnp elsewhere.

    Raises:
        ValueError: arrays whose shape does not fit the state, or an `impl` that cannot run here.
    """
    positions = state.cache.lengths
    check_rows("tokens", tokens, positions.shape, jnp.integer)
    if is_active is not None:
        check_rows("is_active", is_active, positions.shape, jnp.bool_)
    active = jnp.ones_like(positions, dtype=bool) if is_active is None else is_active
    step = functools.partial(_step, refresh=refresh, impl=impl)
    args, takes = (params, tokens, active), (parameter_layouts(params, state.mesh), "B", "B")
    logits, new = on_parts(step, state, config, args, takes, ("B V", state))
    return logits, dataclasses.replace(new, mesh=state.mesh)


def _step(
    state: DecodeState,
    params: dict,
    tokens: PerRow,
    active: RowMask,
    *,
    config: ModelConfig,
    refresh: bool | None,
    impl: str,
) -> tuple[Logits, DecodeState]:
    """`decode_step` on one device."""
    cache, method_state, positions = state.cache, state.method_state, state.cache.lengths
    lengths = positions + active
    slots = jnp.where(active, positions, cache.capacity)[:, None]
    step = Step(config, slots, lengths, active, refresh, impl)
    if method_state is not None:
        method_state = method_state.begin(step)
    state = DecodeState(cache, method_state)
    how = {"config": config, "project": functools.partial(project, impl=impl)}
    hidden, state = run_decoder(params, tokens[:, None], positions[:, None], decode_attend(step), state, **how)
    logits = unembed(params, hidden[:, 0], **how)
    is_full = active & (positions >= min(cache.capacity, config.max_positions))
    logits = jnp.where(is_full[:, None], jnp.nan, logits)
    return logits, DecodeState(dataclasses.replace(state.cache, lengths=lengths), state.method_state)
