"""Agreement: how close a way of decoding stays to another one, step by step on the same text."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.decode_state import DecodeState, count_reads, for_decoding, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.shapes import Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepScores:
    """What each decode step of a given text is worth."""

    chosen: Array  # [T, B], the likeliest next token
    loss: Array  # [T, B], negative log-likelihood of the text's own next token, in nats
    reads: Array  # [T, B], tokens read, mean over layers and heads
    divergence: Array | None  # [T, B], KL(reference || this), in nats
    agrees: Array | None  # [T, B], whether the reference chose the same token
    observed: Array | None  # [T, B], what `observe` returned


def token_agreement(
    model: Model,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[int]],
    *,
    method: HShareSettings | Method | None,
    plan: SharePlan | None = None,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
    impl: str = "auto",
) -> list[float]:
    """Returns, for each row, the fraction of its continuation that greedy decoding would have chosen too.

    Each step reads the continuation's own token (teacher forcing), so that one difference does not make all later ones
    count: this is the measure of the sparse step itself. The first token comes of the dense prefill and is left out.

    Args:
        model: from `load_model`.
        prompts: as for `generate`.
        continuations: token ids, for instance `generate(..., method=None).tokens`, at least two a row.
        method: the settings to measure; None measures dense decoding.
        plan, channels, impl: as for `generate`.
    """
    encoded = encode_prompts(model, prompts)
    if len(continuations) != len(encoded) or min(map(len, continuations)) < 2:
        raise ValueError(f"continuations must hold at least 2 tokens for each of the {len(encoded)} prompts")
    tokens, lengths = pad_prompts(encoded)
    forced, sizes = pad_prompts(encode_prompts(model, continuations, name="continuations"))
    longest = int(sizes.max())
    capacity = choose_capacity(model.config, encoded, longest, None)
    dtype = jnp.dtype(model.dtype)
    state = init_state(model.config, len(encoded), capacity, method=method, plan=plan, channels=channels, dtype=dtype)
    _, state = prefill(model.params, jnp.asarray(tokens), jnp.asarray(lengths), state, config=model.config)
    scores, _ = score_steps(model.params, jnp.asarray(forced), state, config=model.config, impl=impl)
    chosen = np.asarray(scores.chosen).T
    return [float((chosen[row, : size - 1] == forced[row, 1:size]).mean()) for row, size in enumerate(sizes.tolist())]


Observe = Callable[[DecodeState, ModelConfig], Float[Array, "B"]]


@functools.partial(jax.jit, static_argnames=("config", "impl", "observe"), donate_argnames=("state",))
def _score_steps(
    params: dict,
    tokens: Array,
    state: DecodeState,
    reference: Array | None,
    *,
    config: ModelConfig,
    impl: str,
    observe: Observe | None,
) -> tuple[StepScores, DecodeState]:
    def step(state: DecodeState, given: tuple[Array, Array, Array | None]) -> tuple[DecodeState, StepScores]:
        token, following, expected = given
        logits, state = decode_step(params, token, state, config=config, impl=impl)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        loss = -jnp.take_along_axis(log_p, following[:, None], axis=1)[:, 0]
        chosen = jnp.argmax(logits, axis=-1)
        divergence = agrees = None
        if expected is not None:
            log_r = jax.nn.log_softmax(expected, axis=-1)
            divergence = (jnp.exp(log_r) * (log_r - log_p)).sum(axis=-1)
            agrees = jnp.argmax(expected, axis=-1) == chosen
        observed = None if observe is None else observe(state, config)
        return state, StepScores(chosen, loss, count_reads(state, config), divergence, agrees, observed)

    following = tokens[:, 1:].T
    state, scores = lax.scan(step, state, (tokens[:, :-1].T, following, reference))
    return scores, state


def score_steps(
    params: dict,
    tokens: Tokens,
    state: DecodeState,
    *,
    config: ModelConfig,
    reference: Array | None = None,
    impl: str = "auto",
    observe: Observe | None = None,
) -> tuple[StepScores, DecodeState]:
    """Returns (scores of decode steps that read a given text (teacher forcing), the state); one jitted scan.

    The state is that of `for_decoding`: made for more decode steps, not for another prefill.

    Args:
        params: the decoder's parameters.
        tokens: the text that follows what the state holds [B, T + 1]; the last token is only predicted.
        state: from `prefill`; it is donated: use the returned one.
        config: the model.
        reference: logits to compare with, of the same steps [T, B, V]; see `forced_logits`.
        impl: what computes the steps, as for `decode_step`.
        observe: a function of the state after each step and the model, whose values [B] are kept too; traced.
    """
    state = for_decoding(state)
    return _score_steps(params, tokens, state, reference, config=config, impl=impl, observe=observe)


@functools.partial(jax.jit, static_argnames=("config", "impl"), donate_argnames=("state",))
def _force(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig, impl: str
) -> tuple[Array, DecodeState]:
    def step(state: DecodeState, token: Array) -> tuple[DecodeState, Array]:
        logits, state = decode_step(params, token, state, config=config, impl=impl)
        return state, logits

    state, logits = lax.scan(step, state, tokens.T)
    return logits, state


def forced_logits(
    params: dict, tokens: Tokens, state: DecodeState, *, config: ModelConfig, impl: str = "auto"
) -> tuple[Float[Array, "T B V"], DecodeState]:
    """Returns (logits of decode steps that read a given text [B, T], the state, as of `score_steps`).

    The state that is given is donated.
    """
    return _force(params, tokens, for_decoding(state), config=config, impl=impl)
