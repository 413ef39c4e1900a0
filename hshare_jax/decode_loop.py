"""The decode loop: decode steps and the tokens sampled from them, for all rows of a batch, in one jitted program."""

import dataclasses
import functools
from dataclasses import field

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from hshare_jax.decode_state import DecodeState, count_reads
from hshare_jax.decode_step import decode_step
from hshare_jax.mesh import by_parts, dims, num_parts
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import parameter_layouts
from hshare_jax.sampling import SamplingParams, sample

NO_TOKEN = -1  # fills the output of a row beyond its last token
NOT_FINITE = -2  # ends the output of a row whose logits are no finite numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """What the decode loop carries from step to step."""

    state: DecodeState
    token: Array = field(metadata=dims("B"))  # the last sampled token, not yet in the cache
    output: Array = field(metadata=dims("B"))  # [B, M] sampled tokens, or NOT_FINITE; NO_TOKEN after
    count: Array = field(metadata=dims("B"))  # tokens in output
    is_active: Array = field(metadata=dims("B"))  # rows that have not ended
    seen: Array | None = field(metadata=dims("B V"))  # tokens seen so far, for a repetition penalty
    random_keys: Array = field(metadata=dims("B"))
    # float32, tokens read, added up over steps; a step adds its mean over layers and heads
    reads: Array = field(metadata=dims("B"))


@functools.partial(jax.jit, static_argnames=("sampling",), donate_argnames=("loop",))
def take_token(
    logits: Array, loop: LoopState, end_tokens: Array, max_new_tokens: Array, *, sampling: SamplingParams
) -> LoopState:
    """Samples the next token of each active row into the output. A row ends at an end token or at its last place.

    A row also ends, with NOT_FINITE in place of a token, where its largest logit is NaN or infinite. `jnp.max` returns
    NaN if one logit is NaN.

    Args:
        logits: float32 [B, V].
        loop: donated.
        end_tokens: token ids at which a row ends; NO_TOKEN where there are none.
        max_new_tokens: int32 scalar, at most the width of `output`.
        sampling: how tokens are drawn.
    """
    if (mesh := loop.state.mesh) is not None:
        take, loop = functools.partial(take_token, sampling=sampling), _without_mesh(loop)
        args = logits, loop, end_tokens, max_new_tokens
        return _on_mesh(by_parts(take, mesh, args, ("B V", loop, "E", ""), loop), mesh)
    rows = jnp.arange(logits.shape[0])
    keys = jax.vmap(jax.random.fold_in)(loop.random_keys, loop.count)
    is_finite = jnp.isfinite(logits.max(axis=1))
    sampled = jnp.where(is_finite, sample(logits, keys, sampling, seen=loop.seen), NOT_FINITE)
    token = jnp.where(loop.is_active, sampled, loop.token)
    place = jnp.where(loop.is_active, loop.count, loop.output.shape[1])
    count = loop.count + loop.is_active
    is_end = (token[:, None] == end_tokens[None, :]).any(axis=1) | (token == NOT_FINITE)
    return dataclasses.replace(
        loop,
        token=token,
        output=loop.output.at[rows, place].set(token, mode="drop"),
        count=count,
        is_active=loop.is_active & ~is_end & (count < max_new_tokens),
        seen=None if loop.seen is None else loop.seen.at[rows, token].set(True),
    )


@functools.partial(jax.jit, static_argnames=("config", "sampling", "impl"), donate_argnames=("loop",))
def decode_tokens(
    params: dict,
    loop: LoopState,
    num_blocks: Array,
    end_tokens: Array,
    max_new_tokens: Array,
    *,
    config: ModelConfig,
    sampling: SamplingParams,
    impl: str,
) -> LoopState:
    """Runs the decode loop for `num_blocks` blocks, or until every row has ended.

    A block is one step that chooses critical tokens and the steps that reuse them, so that the schedule is static.

    Args:
        params: the decoder's parameters.
        loop: from `take_token` or a previous call; donated.
        num_blocks: int32 scalar; a new value compiles nothing.
        end_tokens, max_new_tokens, sampling: as for `take_token`.
        config: the model.
        impl: as for `decode_step`.
    """
    if (mesh := loop.state.mesh) is not None:
        how = {"config": config.part(num_parts(mesh)), "sampling": sampling, "impl": impl}
        loop = _without_mesh(loop)
        args = params, loop, num_blocks, end_tokens, max_new_tokens
        takes = parameter_layouts(params, mesh), loop, "", "E", ""
        return _on_mesh(by_parts(functools.partial(decode_tokens, **how), mesh, args, takes, loop), mesh)
    interval = refresh_interval(loop.state)

    def is_running(carry: tuple[Array, LoopState]) -> Array:
        return (carry[0] < num_blocks) & carry[1].is_active.any()

    def run_block(carry: tuple[Array, LoopState]) -> tuple[Array, LoopState]:
        block, loop = carry
        for step in range(interval):
            logits, state = decode_step(
                params, loop.token, loop.state,
                config=config, refresh=step == 0, is_active=loop.is_active, impl=impl,
            )  # fmt: skip
            reads = jnp.where(loop.is_active, count_reads(state, config), 0)
            loop = dataclasses.replace(loop, state=state, reads=loop.reads + reads)
            loop = take_token(logits, loop, end_tokens, max_new_tokens, sampling=sampling)
        return block + 1, loop

    return lax.while_loop(is_running, run_block, (jnp.int32(0), loop))[1]


def _without_mesh(loop: LoopState) -> LoopState:
    return _on_mesh(loop, None)


def _on_mesh(loop: LoopState, mesh: Mesh | None) -> LoopState:
    return dataclasses.replace(loop, state=dataclasses.replace(loop.state, mesh=mesh))


def refresh_interval(state: DecodeState) -> int:
    """Steps of a block: one that chooses critical tokens, and those that reuse them."""
    return 1 if state.method_state is None else state.method_state.refresh_interval
