"""The decode loop: decode steps and the tokens sampled from them, for all rows of a batch, in one jitted program."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from hshare_jax.decode_state import DecodeState, count_reads
from hshare_jax.decode_step import decode_step
from hshare_jax.models.config import ModelConfig
from hshare_jax.sampling import SamplingParams, sample

NO_TOKEN = -1  # fills the output of a row beyond its last token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What the decode loop carries from step to step."""

    state: DecodeState
    token: Array  # [B] the last sampled token, not yet in the cache
    output: Array  # [B, M] sampled tokens; NO_TOKEN beyond the last
    count: Array  # [B] tokens in output
    is_active: Array  # [B] rows that have not ended
    seen: Array | None  # [B, V] tokens seen so far, for a repetition penalty
    keys: Array  # [B] random keys
    reads: Array  # [B] float32, tokens read, added up over steps; a step adds its mean over layers and heads


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("progress",))
def take_token(
    logits: Array, progress: Progress, ends: Array, max_new_tokens: Array, *, sampling: SamplingParams
) -> Progress:
    """Samples the next token of each active row into the output. A row ends at an end token or at its last place."""
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in)(progress.keys, progress.count)
    token = jnp.where(progress.is_active, sample(logits, keys, sampling, seen=progress.seen), progress.token)
    place = jnp.where(progress.is_active, progress.count, progress.output.shape[1])
    count = progress.count + progress.is_active
    is_end = (token[:, None] == ends[None, :]).any(axis=1)
    return dataclasses.replace(
        progress,
        token=token,
        output=progress.output.at[rows, place].set(token, mode="drop"),
        count=count,
        is_active=progress.is_active & ~is_end & (count < max_new_tokens),
        seen=None if progress.seen is None else progress.seen.at[rows, token].set(True),
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling", "impl"), donate_argnames=("progress",))
def decode_tokens(
    params: dict,
    progress: Progress,
    num_blocks: Array,
    ends: Array,
    max_new_tokens: Array,
    *,
    config: ModelConfig,
    sampling: SamplingParams,
    impl: str,
) -> Progress:
    """Runs the decode loop for `num_blocks` blocks, or until every row has ended.

    A block is one step that chooses critical tokens and the steps that reuse them, so that the schedule is static.
    """
    interval = refresh_interval(progress.state)

    def is_running(carry: tuple[Array, Progress]) -> Array:
        return (carry[0] < num_blocks) & carry[1].is_active.any()

    def run_block(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        block, progress = carry
        for step in range(interval):
            logits, state = decode_step(
                params, progress.token, progress.state,
                config=config, refresh=step == 0, is_active=progress.is_active, impl=impl,
            )  # fmt: skip
            reads = jnp.where(progress.is_active, count_reads(state, config), 0)
            progress = dataclasses.replace(progress, state=state, reads=progress.reads + reads)
            progress = take_token(logits, progress, ends, max_new_tokens, sampling=sampling)
        return block + 1, progress

    return lax.while_loop(is_running, run_block, (jnp.int32(0), progress))[1]


def refresh_interval(state: DecodeState) -> int:
    """Steps of a block: one that chooses critical tokens, and those that reuse them."""
    return 1 if state.method_state is None else state.method_state.refresh_interval
