"""How alike the critical tokens of a text are: between the lists of a layer, between layers, and between steps."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int
from tqdm import tqdm

from hshare_jax.calibration import to_share_plan
from hshare_jax.decode_state import DecodeState
from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.methods.hshare.similarity import measure_overlap
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.shapes import EMPTY


@dataclasses.dataclass(frozen=True, eq=False)
class Patterns:
    """What sharing rests on, in one text. Dense layers, which have no lists, are zero throughout."""

    head_overlap: Float[np.ndarray, "L J J"]  # of the lists of a layer: `measure_overlap`
    layer_overlap: Float[np.ndarray, "L L"]  # of layers, over their lists: `measure_overlap`
    step_overlap: Float[np.ndarray, "D L"]  # of lists with themselves 1, 2, ... D steps later: `overlap_of_steps`
    plan: SharePlan  # that decoding this text follows


def measure_patterns(
    model: Model,
    prompt: Sequence[int],
    *,
    hshare: HShareSettings = HShareSettings(),  # noqa: B008 (frozen)
    steps: int = 64,
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
) -> Patterns:
    """Returns how alike critical tokens are: at the prompt's probes, and from one decode step to the next ones.

    Lists and layers are compared at the probes that the plan is found from, whatever it is then found by. For steps,
    the last 2 * `steps` tokens of the prompt are not prefilled but read by decode steps, and every list is chosen anew
    on each of them: sharing ratio 1-1-1. (What a small model says by itself soon repeats, and so do its lists.)

    Args:
        model: from `load_model`.
        prompt: token ids.
        hshare: the settings.
        steps: D, the longest distance between two steps; 0 decodes nothing.
        channels: label channels, as for `init_state`; None takes those of the prompt.

    Raises:
        ValueError: what `check_prompt` refuses, before anything is computed.
    """
    check_prompt(model.config, len(prompt), hshare=hshare, steps=steps)
    length = len(prompt) - 2 * steps
    tokens, lengths = jnp.asarray([prompt[:length]], jnp.int32), jnp.asarray([length], jnp.int32)
    alone = dataclasses.replace(
        hshare, plan="units", layer_ratio=Fraction(1), head_ratio=Fraction(1), refresh_interval=1
    )
    with tqdm(total=length, desc="prefill", unit="token", leave=False, disable=None) as bar:
        prefilled = prefill_for(model, tokens, lengths, len(prompt), [hshare, alone], progress=bar.update)
    state = prefilled.start(hshare, channels=channels)
    shared = state.method_state
    assert isinstance(shared, SharedLists)
    assert prefilled.queries is not None
    of_layers, of_heads = _measure_overlap(
        prefilled.queries.probes, state.cache.keys, shared.labels, shared.channels,
        jnp.asarray(prefilled.positions), model=model.config, config=dataclasses.replace(hshare, plan="published"),
    )  # fmt: skip
    of_steps = np.zeros((0, model.config.num_layers), np.float32)
    prefilled.take_back(state)
    if steps:
        state, rest = prefilled.start(alone, channels=channels), jnp.asarray([prompt[length:]], jnp.int32)
        lists, _ = _collect_lists(model.params, rest, state, config=model.config)
        of_steps = overlap_of_steps(np.asarray(lists), steps)
    return Patterns(np.asarray(of_heads[0]), np.asarray(of_layers[0]), of_steps, to_share_plan(shared.source[0]))


def check_prompt(model: ModelConfig, num_tokens: int, *, hshare: HShareSettings, steps: int) -> None:
    """Raises ValueError for a text in which `measure_patterns` finds nothing to measure.

    Args:
        model: the model.
        num_tokens: of the prompt.
        hshare, steps: as for `measure_patterns`.
    """
    if steps < 0:
        raise ValueError(f"steps={steps} must be at least 0")
    if hshare.num_sparse_layers(model) == 0:
        raise ValueError(
            f"dense_layers={hshare.dense_layers} leaves none of the model's {model.num_layers} layers a list"
        )
    least = hshare.first_probe + 1 + 2 * steps
    if num_tokens < least:
        decoded = f", and 2 * {steps} that are decoded" if steps else ""
        raise ValueError(
            f"the prompt has {num_tokens} tokens; it needs {least}, with twice as many candidates as critical "
            f"tokens{decoded}: give a longer one or a smaller budget"
        )
    if num_tokens > model.max_positions:
        raise ValueError(f"the prompt's {num_tokens} tokens are beyond the model's {model.max_positions} positions")


_measure_overlap = jax.jit(measure_overlap, static_argnames=("model", "config"))


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _collect_lists(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig
) -> tuple[Int[Array, "T L J C"], DecodeState]:
    """Returns one row's lists after each step that reads these tokens; the state too, so that its buffers serve it."""

    def step(state: DecodeState, token: Array) -> tuple[DecodeState, Array]:
        _, state = decode_step(params, token, state, config=config)
        assert isinstance(state.method_state, SharedLists)
        return state, state.method_state.token_indices[:, 0]

    state, lists = lax.scan(step, state, tokens.T)
    return lists, state


def overlap_of_steps(lists: Int[np.ndarray, "T L J C"], num_distances: int) -> Float[np.ndarray, "D L"]:
    """Returns the share of a list's tokens that are in the same list 1, 2, ... D steps later, over a layer's lists.

    Each distance is measured from the same T - D first steps, so that all count alike. A layer without lists has zeros.

        # one list, D = 1:  {1, 2}, {2, 3}, {4, 3}  -> from the first two steps 1 of 2 and 1 of 2 remain: .5
    """
    T, L, J, _ = lists.shape
    if not 1 <= num_distances < T:
        raise ValueError(f"num_distances={num_distances} must lie between 1 and {T - 1}, less than the {T} steps")
    n, slots = T - num_distances, int(lists.max()) + 1
    found = np.zeros((num_distances, L), np.float32)
    for layer in range(L):
        marks = np.zeros((T, J, slots + 1), bool)  # EMPTY has a slot of its own, past the end
        of_layer = lists[:, layer]
        np.put_along_axis(marks, np.where(of_layer == EMPTY, slots, of_layer), True, axis=-1)
        marks = marks[:, :, :slots]
        most = max(np.count_nonzero(marks[:n]), 1)
        for d in range(1, num_distances + 1):
            found[d - 1, layer] = np.count_nonzero(marks[:n] & marks[d : d + n]) / most
    return found
