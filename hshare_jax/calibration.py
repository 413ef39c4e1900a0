"""Calibration: label channels and a share plan, made once from texts, that then serve every prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from hshare_jax.decode_state import state_for
from hshare_jax.errors import SettingError
from hshare_jax.kv_cache import KVCache
from hshare_jax.mesh import to_host
from hshare_jax.methods.base import MethodState, PromptQueries
from hshare_jax.methods.hshare.channels import channel_statistic
from hshare_jax.methods.hshare.method import HShare, measure_prompt, plan_from
from hshare_jax.methods.hshare.share_plan import SharePlan, to_share_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.prefill import prefill_prompts, read_prompt
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts

if TYPE_CHECKING:
    from hshare_jax.models.pretrained import Model, ModelFiles


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Label channels of a model on some texts, and a plan that was found with these channels.

    `dataclasses.replace(method, plan=calibration.plan, channels=calibration.channels)` decodes with both.
    """

    channels: Int[np.ndarray, "L K H"]  # all channels of every kv head, the best first
    plan: SharePlan
    num_tokens: int  # tokens of the texts


def calibrate(
    model: "Model",
    texts: Sequence[Prompt],
    *,
    method: HShare = HShare(),  # noqa: B008 (frozen)
    block_length: int | None = None,
    max_blocks: int | None = None,
) -> Calibration:
    """Finds channels and one plan for all prompts, from texts that are cut into blocks and prefilled.

    Channels are ranked by the mean of |q x k|, after RoPE, over all pairs of a query and a key of one block, summed
    over a group's query heads. A second pass measures similarity on the labels of these channels. The plan is found
    from the mean similarity over the probes of all blocks. The last block of a text may be shorter; a block that is too
    short for a probe counts only for the channels.

    Args:
        model: from `load_model`.
        texts: texts or token ids. A block never spans two texts.
        method: the settings and the search that the plan is for.
        block_length: tokens that are prefilled together. None takes 2,048, or more if a plan needs more
            (`first_probe` + 1), but no more than the model's positions.
        max_blocks: read only so many blocks from the beginning; None reads all.

    Raises:
        ValueError: texts that `generate` would refuse; no text long enough for a probe (`HShareSettings.first_probe`);
            a block that is too short for a probe or beyond the model's positions. All are found before anything is
            computed.
    """
    blocks = cut_blocks(model, texts, method=method, block_length=block_length, max_blocks=max_blocks)
    num_tokens, method = sum(map(len, blocks)), dataclasses.replace(method, plan=None, channels=None)
    with tqdm(total=2 * num_tokens, desc="calibrate", unit="token", leave=False, disable=None) as bar:
        channels = _rank_channels(model, blocks, bar)
        plan = _find_plan(model, blocks, method, channels, bar)
    return Calibration(channels, plan, num_tokens)


def cut_blocks(
    model: "Model | ModelFiles",
    texts: Sequence[Prompt],
    *,
    method: HShare,
    block_length: int | None = None,
    max_blocks: int | None = None,
) -> list[list[int]]:
    """The blocks of token ids that `calibrate` reads. See `calibrate` for arguments and errors."""
    ids, longest, least = encode_prompts(model, texts), model.config.max_positions, method.settings.first_probe + 1
    block_length = min(max(2048, least), longest) if block_length is None else block_length
    if not least <= block_length <= longest:
        rule = f"must lie between {least}, so that a plan can be found, and the model's {model.config.positions_told}"
        raise SettingError("block_length", block_length, rule)
    if max_blocks is not None and max_blocks < 1:
        raise SettingError("max_blocks", max_blocks, "must be at least 1, or None for all")
    blocks = [row[start : start + block_length] for row in ids for start in range(0, len(row), block_length)]
    blocks = blocks[:max_blocks]
    if (found := max(map(len, blocks))) < least:
        raise ValueError(
            f"the longest block has {found} tokens; a plan needs {least}, with which there are twice as many "
            "candidates as critical tokens: give a longer text or a smaller budget"
        )
    return blocks


def _rank_channels(model: "Model", blocks: list[list[int]], bar: tqdm) -> Int[np.ndarray, "L K H"]:
    total, capacity = np.zeros(()), max(map(len, blocks))
    for block in blocks:
        queries, cache, _ = _read_block(model, block, capacity, None, bar)
        total = total + to_host(_channel_statistics(queries, cache, config=model.config)).astype(np.float64)
    return np.argsort(-total, axis=-1, kind="stable")


def _find_plan(model: "Model", blocks: list[list[int]], method: HShare, channels: np.ndarray, bar: tqdm) -> SharePlan:
    has_channels = method.settings.scoring == "labels"  # nothing else reads them
    method = dataclasses.replace(method, channels=channels if has_channels else None)
    method = method.with_settings({"tail": None, "dense_layers": method.settings.num_dense})
    settings, search, config = method.settings, method.search, model.config
    total, num_probes, capacity = [], 0, max(map(len, blocks))
    for block in blocks:
        if len(block) <= settings.first_probe:
            bar.update(len(block))
            continue
        queries, cache, lists = _read_block(model, block, capacity, method, bar)
        assert isinstance(lists, SharedLists)
        similarity = measure_prompt(
            lists, queries, cache, config=config, similarity=search.similarity, mesh=model.mesh
        ).similarity
        count = int((queries.positions >= 0).sum())
        arrays = [count * to_host(array).astype(np.float64) for array in jax.tree.leaves(similarity)]
        total = [old + new for old, new in zip(total, arrays, strict=True)] if total else arrays
        num_probes += count
    mean = [jnp.asarray(array / num_probes, jnp.float32) for array in total]
    similarity = mean[0] if len(mean) == 1 else tuple(mean)
    found = plan_from(similarity, config=config, settings=settings, search=search, mesh=model.mesh)
    return to_share_plan(to_host(found)[0])


def _read_block(
    model: "Model", block: list[int], capacity: int, method: HShare | None, bar: tqdm
) -> tuple[PromptQueries, KVCache, MethodState | None]:
    """What prefill keeps of a block, its cache, and the method's empty state; without a method no probes are kept."""
    state = state_for(model, 1, capacity, method=method)
    tokens, lengths = jnp.asarray([block], jnp.int32), jnp.asarray([len(block)], jnp.int32)
    positions = jnp.zeros((1, 0), jnp.int32)
    if method is not None:
        positions = method.probe_positions(jnp.zeros_like(lengths), lengths, len(block))
    prompt = model.params, tokens, lengths, state.cache, positions
    _, cache, queries = read_prompt(*prompt, config=model.config, progress=bar.update, mesh=model.mesh)
    assert queries is not None
    return queries, cache, state.method_state


@functools.partial(jax.jit, static_argnames=("config",))
def _channel_statistics(queries: PromptQueries, cache: KVCache, *, config: ModelConfig) -> Float[Array, "L K H"]:
    """Sums of |q x k| over a block's pairs; added over blocks, they weigh every pair alike."""
    by_keys = zip(queries.sizes, cache.keys, strict=True)
    found = [channel_statistic(sizes, keys, cache.lengths)[0] for sizes, keys in by_keys]
    return jnp.stack([found[config.kv_index(layer)] for layer in range(config.num_layers)])


def find_plans(
    model: "Model",
    prompts: Sequence[Prompt],
    *,
    method: HShare = HShare(),  # noqa: B008 (frozen)
) -> list[SharePlan]:
    """The plan that decoding each prompt would follow. A prompt too short for a probe shares nothing."""
    ids = encode_prompts(model, prompts)
    _, state = prefill_prompts(model, ids, choose_capacity(model.config, ids, 1, None), method=method)
    assert isinstance(state.method_state, SharedLists)
    return [to_share_plan(source) for source in to_host(state.method_state.source)]
