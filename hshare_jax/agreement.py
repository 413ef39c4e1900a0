"""Agreement: how often a way of decoding picks the token that another one picked, step by step on that one's text."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from hshare_jax.config import HShareConfig
from hshare_jax.decode import decode_step
from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.generate import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill


def token_agreement(
    model: Model, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]], *, hshare: HShareConfig | None
) -> list[float]:
    """Returns, for each row, the fraction of its continuation that greedy decoding would have chosen too.

    Each step reads the continuation's own token (teacher forcing), so that one difference does not make all later ones
    count: this is the measure of the sparse step itself. The first token comes of the dense prefill and is left out.

    Args:
        model: from `load_model`.
        prompts: as for `generate`.
        continuations: token ids, for instance `generate(..., hshare=None).tokens`, at least two a row.
        hshare: the settings to measure; None measures dense decoding.
    """
    encoded = encode_prompts(model, prompts)
    if len(continuations) != len(encoded) or min(map(len, continuations)) < 2:
        raise ValueError(f"continuations must hold at least 2 tokens for each of the {len(encoded)} prompts")
    tokens, lengths = pad_prompts(encoded)
    forced, sizes = pad_prompts(encode_prompts(model, continuations))
    longest = int(sizes.max())
    capacity = choose_capacity(model.config, encoded, longest, None)
    state = init_state(model.config, len(encoded), capacity, hshare=hshare, dtype=jnp.dtype(model.dtype))
    _, state = prefill(model.params, jnp.asarray(tokens), jnp.asarray(lengths), state, config=model.config)
    chosen = np.asarray(_choose_forced(model.params, jnp.asarray(forced), state, config=model.config)[0])
    return [float((chosen[row, : size - 1] == forced[row, 1:size]).mean()) for row, size in enumerate(sizes.tolist())]


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _choose_forced(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig
) -> tuple[Array, DecodeState]:
    def step(state: DecodeState, token: Array) -> tuple[DecodeState, Array]:
        logits, state = decode_step(params, token, state, config=config)
        return state, jnp.argmax(logits, axis=-1)

    state, chosen = lax.scan(step, state, tokens[:, :-1].T)
    return chosen.T, state  # the state too, so that its buffers are used again
