"""Log-likelihoods of given continuations, by decode steps of the method that is measured."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hshare_jax.errors import check_whole
from hshare_jax.evaluation.teacher_forcing import score_text
from hshare_jax.kernels.api import check_impl
from hshare_jax.methods.base import Method
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill_prompts
from hshare_jax.prompts import check_ids, choose_capacity, pad_prompts
from hshare_jax.shapes import Logits, PerRow, round_up_coarsely

Request = tuple[Sequence[int], Sequence[int]]  # token ids of a context and of the continuation


def log_likelihoods(
    model: Model,
    requests: Sequence[Request],
    *,
    method: Method | None,
    batch_size: int,
    impl: str = "auto",
    progress: Callable[[dict[int, tuple[float, bool]]], object] | None = None,
) -> list[tuple[float, bool]]:
    """The log-likelihood of each request's continuation in nats, and whether greedy decoding would choose it.

    One forward pass over context and continuation would never decode, and so never use a sparse method. Here only the
    context without its last token is prefilled, densely. Decode steps then read that last token and the continuation's
    tokens (teacher forcing), so that a step of `method` predicts every token. A context of a single token is prefilled
    instead, and its logits predict the first token.

    Args:
        model: from `load_model`.
        requests: contexts and continuations of any lengths, each of at least one token. Rows of a batch are of similar
            lengths; a result does not depend on its batch, unless `PlanSearch.plan_scope` is "batch".
        method: the method to measure; None measures dense decoding.
        batch_size: requests that are computed together.
        impl: as for `decode_step`.
        progress: called with the results of each batch, by index of the request, once the batch is computed.

    Raises:
        ValueError: a request with an empty part, an id outside the vocabulary or more tokens than the model has
            positions, or an `impl` that cannot run here. All are found before anything is computed.
    """
    check_impl(impl)
    check_whole("batch_size", batch_size, 1)
    for index, request in enumerate(requests):
        _check_request(model, index, request)
    # Sorted by steps, then by context, the largest first: memory runs out at once or never.
    order = sorted(
        range(len(requests)),
        key=lambda index: (_pad_steps(len(requests[index][1])), len(requests[index][0])),
        reverse=True,
    )
    found: dict[int, tuple[float, bool]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        scores = _score_batch(model, [requests[index] for index in batch], method, impl)
        of_batch = dict(zip(batch, scores, strict=True))
        found |= of_batch
        if progress is not None:
            progress(of_batch)
    return [found[index] for index in range(len(requests))]


def _check_request(model: Model, index: int, request: Request) -> None:
    (context, continuation), config = request, model.config
    if len(context) == 0 or len(continuation) == 0:
        part = "context" if len(context) == 0 else "continuation"
        raise ValueError(f"requests[{index}] has an empty {part}; it must hold at least one token")
    needed = len(context) + len(continuation) - 1  # the last token is only predicted
    if needed > config.max_positions:
        raise ValueError(
            f"requests[{index}] has {len(context)} tokens of context and {len(continuation)} of continuation; that is "
            f"beyond the model's {config.positions_told}; shorten either"
        )
    check_ids(f"requests[{index}]", (*context, *continuation), config)


def _pad_steps(num_steps: int) -> int:
    """The number of steps rounded up to one of few numbers, so that few programs are compiled."""
    if num_steps <= 64:
        return max(1 << (num_steps - 1).bit_length(), 4)
    return round_up_coarsely(num_steps, 64)


def _score_batch(
    model: Model, requests: Sequence[Request], method: Method | None, impl: str
) -> list[tuple[float, bool]]:
    config = model.config
    prompts = [list(context[:-1]) or list(context) for context, _ in requests]
    texts = [
        [*context[len(prompt) :], *continuation]
        for (context, continuation), prompt in zip(requests, prompts, strict=True)
    ]
    forced, sizes = pad_prompts(texts)
    T = _pad_steps(max(int(sizes.max()) - 1, 1))
    forced = np.pad(forced, ((0, 0), (0, T + 1 - forced.shape[1])))
    # Steps beyond a row's text come last and are ignored. Where the model has no positions for them, the cache drops
    # their tokens.
    capacity = choose_capacity(config, prompts, min(T, config.max_positions - max(map(len, prompts))), None)
    logits, state = prefill_prompts(model, prompts, capacity, method=method, impl=impl)
    first_loss, first_chosen = _score_first(logits, jnp.asarray(forced[:, 0]))
    scores, _ = score_text(model.params, jnp.asarray(forced), state, config=config, method=method, impl=impl)
    loss = np.concatenate([np.asarray(first_loss)[None], scores.loss])  # [T + 1, B], of each token of `forced`
    chosen = np.concatenate([np.asarray(first_chosen)[None], scores.chosen])
    starts = sizes - [len(continuation) for _, continuation in requests]  # where each continuation begins
    places = np.arange(T + 1)[:, None]
    is_scored = (places >= starts) & (places < sizes)
    totals = -np.where(is_scored, loss, 0).sum(axis=0, dtype=np.float64)
    is_greedy = ((chosen == forced.T) | ~is_scored).all(axis=0)
    return list(zip(totals.tolist(), is_greedy.tolist(), strict=True))


@jax.jit
def _score_first(logits: Logits, tokens: PerRow) -> tuple[Array, Array]:
    """Negative log-likelihood of each row's next token [B], and the most probable token [B]."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_p, tokens[:, None], axis=1)[:, 0], jnp.argmax(logits, axis=-1)
