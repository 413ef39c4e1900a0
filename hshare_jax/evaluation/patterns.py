"""Patterns: how alike the critical tokens of a text are, between a layer's lists, between layers and between steps."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from hshare_jax.decode_state import DecodeState
from hshare_jax.errors import SettingError, check_whole
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.evaluation.teacher_forcing import force_steps
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.base import PromptQueries
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, to_share_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.methods.hshare.similarity import LabelledPrompt, measure_overlap
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.shapes import EMPTY


@dataclasses.dataclass(frozen=True, eq=False)
class Patterns:
    """The overlaps that sharing rests on, in one text. Dense layers have no lists, and zeros everywhere."""

    head_overlap: Float[np.ndarray, "L J J"]  # of the lists of a layer (`measure_overlap`)
    layer_overlap: Float[np.ndarray, "L L"]  # of layers, over their lists (`measure_overlap`)
    step_overlap: Float[np.ndarray, "D L"]  # of lists with the same lists 1, 2, ... D steps later (`overlap_of_steps`)
    plan: SharePlan  # the plan that decoding this text follows


def measure_patterns(
    model: Model,
    prompt: Sequence[int],
    *,
    method: HShare = HShare(),  # noqa: B008 (frozen)
    steps: int = 64,
) -> Patterns:
    """Measures how alike critical tokens are, at the prompt's probes and from one decode step to the next ones.

    Lists and layers are compared at the probes that the plan is found from. For steps, the last 2 * `steps` tokens of
    the prompt are not prefilled but read by decode steps, and every list is chosen anew at every step (sharing ratio
    1-1-1). The tokens come from the prompt, because text that a small model makes soon repeats, and so do the lists.

    Args:
        model: from `load_model`.
        prompt: token ids.
        method: HShare's settings, search and channels.
        steps: D, the longest distance between two steps; 0 decodes nothing.

    Raises:
        ValueError: `check_prompt` refuses the prompt. Nothing has been computed then.
    """
    check_prompt(model.config, len(prompt), settings=method.settings, steps=steps)
    length = len(prompt) - 2 * steps
    tokens, lengths = jnp.asarray([prompt[:length]], jnp.int32), jnp.asarray([length], jnp.int32)
    method = dataclasses.replace(method, plan=None)  # the plan is what is looked at
    unshared = method.with_sharing_ratio("1-1-1")
    with tqdm(total=length, desc="prefill", unit="token", leave=False, disable=None) as bar:
        prefilled = prefill_for(model, tokens, lengths, len(prompt), [method, unshared], progress=bar.update)
    state = prefilled.start(method)
    lists = state.method_state
    assert isinstance(lists, SharedLists)
    assert prefilled.queries is not None
    of_layers, of_heads = _measure_overlap(
        prefilled.queries, state.cache, lists, config=model.config, settings=method.settings
    )
    plan = to_share_plan(lists.source[0])
    of_steps = np.zeros((0, model.config.num_layers), np.float32)
    prefilled.take_back(state)
    if steps:
        state, rest = prefilled.start(unshared), jnp.asarray([prompt[length:]], jnp.int32)
        chosen, _ = _collect_lists(model.params, rest, state, config=model.config)
        of_steps = overlap_of_steps(np.asarray(chosen), steps)
    return Patterns(np.asarray(of_heads[0]), np.asarray(of_layers[0]), of_steps, plan)


def check_prompt(config: ModelConfig, num_tokens: int, *, settings: HShareSettings, steps: int) -> None:
    """Raises ValueError for a text in which `measure_patterns` finds nothing to measure.

    Args:
        config: the model.
        num_tokens: length of the prompt.
        settings: HShare's settings.
        steps: as for `measure_patterns`.
    """
    check_whole("steps", steps, 0)
    if settings.num_sparse_layers(config) == 0:
        rule = f"leaves none of the model's {config.num_layers} layers a list"
        raise SettingError("dense_layers", settings.num_dense, rule)
    least = settings.first_probe + 1 + 2 * steps
    if num_tokens < least:
        decoded = f", and 2 * {steps} that are decoded" if steps else ""
        raise ValueError(
            f"the prompt has {num_tokens} tokens; it needs {least}, with twice as many candidates as critical "
            f"tokens{decoded}: give a longer one or a smaller budget"
        )
    if num_tokens > config.max_positions:
        raise ValueError(f"the prompt's {num_tokens} tokens are beyond the model's {config.positions_told}")


@functools.partial(jax.jit, static_argnames=("config", "settings"))
def _measure_overlap(
    queries: PromptQueries, cache: KVCache, lists: SharedLists, *, config: ModelConfig, settings: HShareSettings
) -> tuple[Float[Array, "B L L"], Float[Array, "B L J J"]]:
    prompt = LabelledPrompt(queries, cache.keys, lists.labels, lists.channels)
    return measure_overlap(prompt, config=config, settings=settings)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _collect_lists(
    params: dict, tokens: Array, state: DecodeState, *, config: ModelConfig
) -> tuple[Int[Array, "T L J C"], DecodeState]:
    """One row's lists after each step that reads these tokens. The state is returned so that its buffers are reused."""

    def observe(logits: Array, state: DecodeState, given: None) -> Array:
        assert isinstance(state.method_state, SharedLists)
        return state.method_state.token_indices[:, 0]

    return force_steps(params, tokens, state, observe, config=config)


def overlap_of_steps(lists: Int[np.ndarray, "T L J C"], num_distances: int) -> Float[np.ndarray, "D L"]:
    """The share of a list's tokens that are in the same list 1, 2, ... D steps later, over a layer's lists.

    Each distance is measured from the same first T - D steps, so that all distances count alike. A layer without lists
    has zeros.

        # one list, D = 1:  {1, 2}, {2, 3}, {4, 3}  -> from the first two steps 1 of 2 and 1 of 2 remain: .5
    """
    T, L, J, _ = lists.shape
    if not 1 <= num_distances < T:
        rule = f"must lie between 1 and {T - 1}, less than the {T} steps"
        raise SettingError("num_distances", num_distances, rule)
    n, slots = T - num_distances, int(lists.max()) + 1
    found = np.zeros((num_distances, L), np.float32)
    for layer in range(L):
        marks = np.zeros((T, J, slots + 1), bool)  # EMPTY is marked in one more slot, past the end
        of_layer = lists[:, layer]
        np.put_along_axis(marks, np.where(of_layer == EMPTY, slots, of_layer), True, axis=-1)
        marks = marks[:, :, :slots]
        most = max(np.count_nonzero(marks[:n]), 1)
        for d in range(1, num_distances + 1):
            found[d - 1, layer] = np.count_nonzero(marks[:n] & marks[d : d + n]) / most
    return found
