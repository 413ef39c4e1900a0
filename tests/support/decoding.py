"""Decoding in the tiny decoder: the first tokens of ragged rows are prefilled, and the next ones decoded."""

import jax.numpy as jnp
import numpy as np
from tiny_decoder import LENGTHS, MODEL, TAILED, params, prefill_rows

from hshare_jax.decode_state import DecodeState
from hshare_jax.decode_step import decode_step
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import EMPTY

SAME = 1e-5  # absolute, between two float32 programs of the same model


def shared_of(state: DecodeState) -> SharedLists:
    assert isinstance(state.method_state, SharedLists)
    return state.method_state


def tokens_at(rows, lengths, step):
    return jnp.asarray([row[length + step] for row, length in zip(rows, lengths, strict=True)], jnp.int32)


def start(rows, lengths=LENGTHS, **settings):
    """The state after the first `lengths` tokens of the rows."""
    return prefill_rows([row[:length] for row, length in zip(rows, lengths, strict=True)], **settings)[1]


def decode(rows, state, steps, *, lengths=LENGTHS, config=MODEL, dtype="float32", refresh=lambda step: None):
    """Decodes the next tokens of the rows: (logits [steps, B, V], the state after the last step)."""
    found = []
    for step in range(steps):
        logits, state = decode_step(
            params(config, dtype), tokens_at(rows, lengths, step), state, config=config, refresh=refresh(step)
        )
        found.append(np.asarray(logits))
    return np.stack(found), state


def lists_of(state):
    """The lists [L][B][J] without their padding, as Python lists."""
    return [
        [[[t for t in tokens if t != EMPTY] for tokens in of_row] for of_row in of_layer]
        for of_layer in shared_of(state).token_indices.tolist()
    ]


def on_schedule(step):
    """Whether a row that was just prefilled refreshes on this step, under TAILED's interval."""
    return step % TAILED.settings.refresh_interval == 0
