"""Teacher forcing: decode steps that read a given text, and how well each step predicts the text's next token."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from hshare_jax.decode_state import DecodeState, count_reads
from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.recall import measure_recall, recall_of, without_recall
from hshare_jax.mesh import to_host
from hshare_jax.methods.base import Method
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill_prompts, refit
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.shapes import Tokens


def force_steps(
    params: dict,
    tokens: Tokens,
    state: DecodeState,
    observe: Callable[[Array, DecodeState, Any], Any],
    given: Any = None,
    *,
    config: ModelConfig,
    impl: str = "auto",
) -> tuple[Any, DecodeState]:
    """Runs decode steps that read a given text: the values of `observe`, stacked over the steps, and the last state.

    This is a scan for a caller's own jit; the functions below are its jitted forms.

    Args:
        params: the decoder's parameters.
        tokens: the text [B, T], which follows the tokens in the state.
        state: from `prefill`.
        observe: called with a step's logits [B, V], the state after the step, and the step's part of `given`.
        given: a pytree of arrays [T, ...].
        config: the model.
        impl: as for `decode_step`.
    """

    def step(state: DecodeState, inputs: tuple[Array, Any]) -> tuple[DecodeState, Any]:
        token, of_step = inputs
        logits, state = decode_step(params, token, state, config=config, impl=impl)
        return state, observe(logits, state, of_step)

    state, observed = lax.scan(step, state, (tokens.T, given))
    return observed, state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepScores:
    """Scores of the decode steps that read a given text."""

    chosen: Array  # [T, B], the most probable next token
    loss: Array  # [T, B], negative log-likelihood of the text's next token, in nats
    reads: Array  # [T, B], tokens read, the mean over layers and heads
    divergence: Array | None  # [T, B], KL(reference || these steps), in nats
    agrees: Array | None  # [T, B], whether the reference's most probable token is the same
    observed: Array | None  # [T, B], the values of `observe`


Observe = Callable[[DecodeState, ModelConfig], Float[Array, "B"]]


@functools.partial(jax.jit, static_argnames=("config", "impl", "observe"), donate_argnames=("state",))
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
    """Scores decode steps that read a given text (jitted): the scores, and the last state. It never refits.

    Args:
        params: the decoder's parameters.
        tokens: the text [B, T + 1], which follows the tokens in the state; its last token is only predicted.
        state: from `prefill`; it is donated, so use the returned one.
        config: the model.
        reference: logits of the same steps to compare with [T, B, V], from `forced_logits`.
        impl: as for `decode_step`.
        observe: a function of the state after each step and of the model, whose values [B] are kept too; traced.
    """

    def score(logits: Array, state: DecodeState, given: tuple[Array, Array | None]) -> StepScores:
        following, expected = given
        log_p = jax.nn.log_softmax(logits, axis=-1)
        loss = -jnp.take_along_axis(log_p, following[:, None], axis=1)[:, 0]
        chosen = jnp.argmax(logits, axis=-1)
        divergence = agrees = None
        if expected is not None:
            log_r = jax.nn.log_softmax(expected, axis=-1)
            divergence = (jnp.exp(log_r) * (log_r - log_p)).sum(axis=-1)
            agrees = jnp.argmax(expected, axis=-1) == chosen
        observed = None if observe is None else observe(state, config)
        return StepScores(chosen, loss, count_reads(state, config), divergence, agrees, observed)

    given = (tokens[:, 1:].T, reference)
    return force_steps(params, tokens[:, :-1], state, score, given, config=config, impl=impl)


def score_text(
    params: dict,
    tokens: Tokens,
    state: DecodeState,
    *,
    config: ModelConfig,
    method: Method | None,
    reference: Array | None = None,
    impl: str = "auto",
    recall_every: int | None = None,
) -> tuple[StepScores, DecodeState]:
    """The scores of `score_steps` and the last state, with refits as often as the method asks for them.

    The steps between two refits are one dispatch.

    Args:
        params, tokens, state, config, reference, impl: as for `score_steps`.
        method: the method that the state began with; None is dense decoding.
        recall_every: recall is measured on the first of so many steps, and `observed` holds it; NaN on the other steps.
            None never measures it.
    """
    T = tokens.shape[1] - 1
    interval = T if method is None or method.refit_interval is None else method.refit_interval
    found = []
    for start in range(0, T, interval):
        if start > 0:
            assert method is not None
            # Rows that outgrew the cache have lost their last tokens.
            sizes = jnp.where(state.cache.lengths > state.cache.capacity, 0, REFIT_TOKENS)
            last = tokens[:, start - REFIT_TOKENS : start]
            state = refit(params, last, sizes, state, config=config, method=method, impl=impl)
        end = min(start + interval, T)
        scores, state = score_steps(
            params, tokens[:, start : end + 1], state if recall_every is None else measure_recall(state, recall_every),
            config=config, reference=None if reference is None else reference[start:end], impl=impl,
            observe=None if recall_every is None else recall_of,
        )  # fmt: skip
        if recall_every is not None:
            is_measured = jnp.arange(end - start)[:, None] % recall_every == 0
            scores = dataclasses.replace(scores, observed=jnp.where(is_measured, scores.observed, jnp.nan))
            state = without_recall(state)
        found.append(scores)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found), state


@functools.partial(jax.jit, static_argnames=("config", "impl"), donate_argnames=("state",))
def forced_logits(
    params: dict, tokens: Tokens, state: DecodeState, *, config: ModelConfig, impl: str = "auto"
) -> tuple[Float[Array, "T B V"], DecodeState]:
    """Logits of decode steps that read a given text [B, T], and the last state (jitted). The given state is donated."""
    return force_steps(params, tokens, state, lambda logits, state, _: logits, config=config, impl=impl)


def token_agreement(
    model: Model,
    prompts: Sequence[Prompt],
    continuations: Sequence[Sequence[int]],
    *,
    method: Method | None,
    impl: str = "auto",
) -> list[float]:
    """The fraction of each row's continuation that greedy decoding by `method` would have chosen, too.

    Each step reads the continuation's own token, so that one difference does not make all later tokens differ: this
    measures the sparse step itself. The first token comes from the dense prefill and is left out.

    Args:
        model: from `load_model`.
        prompts: as for `generate`.
        continuations: token ids, at least two a row, for instance `generate(..., method=None).tokens`.
        method: the method to measure; None measures dense decoding.
        impl: as for `decode_step`.

    Raises:
        ValueError: continuations that are missing or too short, or prompts that `generate` refuses.
    """
    encoded = encode_prompts(model, prompts)
    if len(continuations) != len(encoded) or min(map(len, continuations)) < 2:
        raise ValueError(f"continuations must hold at least 2 tokens for each of the {len(encoded)} prompts")
    forced, sizes = pad_prompts(encode_prompts(model, continuations, name="continuations"))
    capacity = choose_capacity(model.config, encoded, int(sizes.max()), None)
    _, state = prefill_prompts(model, encoded, capacity, method=method, impl=impl)
    scores, _ = score_text(model.params, jnp.asarray(forced), state, config=model.config, method=method, impl=impl)
    chosen = to_host(scores.chosen).T
    return [float((chosen[row, : size - 1] == forced[row, 1:size]).mean()) for row, size in enumerate(sizes.tolist())]
