"""Calibration: label channels and a share plan made once from text, and the files that keep them.

The files are JSON. Channels are written, and both are read, in the form that HShare's and Double Sparsity's published
code keeps them in, too: `model.layers.N.self_attn.qk_proj` lists every head's channels, the best first, and
`layer.share_config` names for every layer the one whose lists it copies.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from hshare_jax.decode_state import init_state
from hshare_jax.files.atomic import whole_file
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.base import PromptQueries
from hshare_jax.methods.hshare.channels import channel_statistic
from hshare_jax.methods.hshare.settings import PLAN_SETTINGS, HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, find_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, ModelFiles
from hshare_jax.prefill import prefill, read_prompt
from hshare_jax.prompts import Prompt, choose_capacity, encode_prompts, pad_prompts
from hshare_jax.shapes import Similarity

_OURS, _PUBLISHED_PLAN = "hshare_jax", "layer.share_config"
_CHANNELS = "model.layers.{}.self_attn.qk_proj"


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What a text tells of a model: its label channels, and a plan found with these."""

    channels: Int[np.ndarray, "L K H"]  # all channels of every kv head, the best first
    plan: SharePlan
    num_tokens: int  # read


def calibrate(
    model: Model,
    texts: Sequence[Prompt],
    *,
    hshare: HShareSettings = HShareSettings(),  # noqa: B008 (frozen)
    block_length: int | None = None,
    max_blocks: int | None = None,
) -> Calibration:
    """Returns channels and one plan for all prompts, from texts that are cut into blocks and prefilled.

    Channels are ranked by the mean of |q x k|, after RoPE, over all pairs of a query and a key of one block, summed
    over a group's query heads. Then, in a second pass, similarity is measured on the labels of just these channels, its
    mean is taken over the probes of all blocks, and the plan is found from it. A text's last block may be shorter;
    too short for a probe it counts for the channels alone.

    Args:
        model: from `load_model`.
        texts: texts, or token ids; a block never spans two of them.
        hshare: the settings that the plan is for.
        block_length: tokens that are prefilled together. None: 2,048, more where the budget asks for it, or all
            positions of a model with fewer.
        max_blocks: read no more than these first blocks. None reads all.

    Raises:
        ValueError: texts that `generate` would refuse, or none long enough for a probe (`HShareSettings.first_probe`); a
            block that is shorter than this or beyond the model's positions; before anything is computed.
    """
    blocks = cut_blocks(model, texts, hshare=hshare, block_length=block_length, max_blocks=max_blocks)
    num_tokens = sum(map(len, blocks))
    with tqdm(total=2 * num_tokens, desc="calibrate", unit="token", leave=False, disable=None) as bar:
        channels = _rank_channels(model, blocks, hshare, bar)
        plan = _find_plan(model, blocks, hshare, channels, bar)
    return Calibration(channels, plan, num_tokens)


def cut_blocks(
    model: Model | ModelFiles,
    texts: Sequence[Prompt],
    *,
    hshare: HShareSettings,
    block_length: int | None = None,
    max_blocks: int | None = None,
) -> list[list[int]]:
    """Returns the blocks of token ids that `calibrate` reads; arguments and errors are its own."""
    ids, longest, least = encode_prompts(model, texts), model.config.max_positions, hshare.first_probe + 1
    block_length = min(max(2048, least), longest) if block_length is None else block_length
    if not least <= block_length <= longest:
        raise ValueError(
            f"block_length={block_length} must lie between {least}, so that a plan can be found, and the model's "
            f"{longest} positions"
        )
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks} must be at least 1, or None for all")
    blocks = [row[start : start + block_length] for row in ids for start in range(0, len(row), block_length)]
    blocks = blocks[:max_blocks]
    if (found := max(map(len, blocks))) < least:
        raise ValueError(
            f"the longest block has {found} tokens; a plan needs {least}, with which there are twice as many "
            "candidates as critical tokens: give a longer text or a smaller budget"
        )
    return blocks


def _rank_channels(
    model: Model, blocks: list[list[int]], hshare: HShareSettings, bar: tqdm
) -> Int[np.ndarray, "L K H"]:
    total, capacity = np.zeros(()), max(map(len, blocks))
    for block in blocks:
        kept, _, cache, _ = _read_block(model, block, capacity, hshare, None, bar)
        total = total + np.asarray(_channel_statistics(kept, cache, config=model.config), np.float64)
    return np.argsort(-total, axis=-1, kind="stable")


def _find_plan(
    model: Model, blocks: list[list[int]], hshare: HShareSettings, channels: np.ndarray, bar: tqdm
) -> SharePlan:
    total, num_probes, capacity = [], 0, max(map(len, blocks))
    for block in blocks:
        if len(block) <= hshare.first_probe:
            bar.update(len(block))
            continue
        kept, positions, cache, shared = _read_block(model, block, capacity, hshare, channels, bar)
        _, similarity = measure_prompt(shared, kept, positions, cache, config=model.config)
        count = int((positions >= 0).sum())
        arrays = [count * np.asarray(array, np.float64) for array in jax.tree.leaves(similarity)]
        total = [old + new for old, new in zip(total, arrays, strict=True)] if total else arrays
        num_probes += count
    mean = [jnp.asarray(array / num_probes, jnp.float32) for array in total]
    return to_share_plan(plan_from(mean[0] if len(mean) == 1 else tuple(mean), model=model.config, config=hshare)[0])


def _read_block(
    model: Model, block: list[int], capacity: int, hshare: HShareSettings, channels: np.ndarray | None, bar: tqdm
) -> tuple[PromptQueries, Array, KVCache, SharedLists]:
    dtype = jnp.dtype(model.dtype)
    channels = channels if hshare.scoring == "labels" else None  # which nothing else reads
    state = init_state(model.config, 1, capacity, method=hshare, channels=channels, dtype=dtype)
    tokens, lengths = jnp.asarray([block], jnp.int32), jnp.asarray([len(block)], jnp.int32)
    shared = state.method_state
    assert isinstance(shared, SharedLists)
    positions = shared.probe_positions(jnp.zeros_like(lengths), lengths, len(block))
    _, cache, kept = read_prompt(
        model.params, tokens, lengths, state.cache, positions, config=model.config, progress=bar.update
    )
    assert kept is not None
    return kept, positions, cache, shared


@functools.partial(jax.jit, static_argnames=("config",))
def _channel_statistics(kept: PromptQueries, cache: KVCache, *, config: ModelConfig) -> Float[Array, "L K H"]:
    """Returns the sums of |q x k| over a block's pairs; added over blocks, they weigh every pair alike."""
    by_keys = zip(kept.sizes, cache.keys, strict=True)
    found = [channel_statistic(q, k, cache.lengths)[0] for q, k in by_keys]
    return jnp.stack([found[config.kv_index(layer)] for layer in range(config.num_layers)])


@functools.partial(jax.jit, static_argnames=("config",))
def measure_prompt(
    lists: SharedLists, queries: PromptQueries, positions: Array, cache: KVCache, *, config: ModelConfig
) -> tuple[SharedLists, Similarity]:
    """Returns (lists with the labels of what the cache holds, what its plan is found from) (jitted)."""
    lists = lists.label_prompt(queries, cache, config)
    return lists, lists.measure_similarity(queries, positions, cache, config)


plan_from = jax.jit(find_plan, static_argnames=("model", "config"))


def find_plans(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    hshare: HShareSettings = HShareSettings(),  # noqa: B008 (frozen)
    channels: Int[Array | np.ndarray, "L K ranks"] | None = None,
) -> list[SharePlan]:
    """Returns the plan that decoding each prompt would follow; a prompt too short for a probe shares nothing."""
    ids = encode_prompts(model, prompts)
    tokens, lengths = pad_prompts(ids)
    capacity = choose_capacity(model.config, ids, 1, None)
    state = init_state(model.config, len(ids), capacity, method=hshare, channels=channels, dtype=jnp.dtype(model.dtype))
    _, state = prefill(model.params, jnp.asarray(tokens), jnp.asarray(lengths), state, config=model.config)
    assert isinstance(state.method_state, SharedLists)
    return [to_share_plan(source) for source in np.asarray(state.method_state.source)]


def to_share_plan(source: Int[Array | np.ndarray, "L J"]) -> SharePlan:
    """Returns one row's plan as a constant."""
    return SharePlan(tuple(tuple(layer) for layer in np.asarray(source).tolist()))


def save_channels(
    path: str | os.PathLike[str], channels: Int[np.ndarray, "L K ranks"], model: Model, *, overwrite: bool = False
) -> None:
    """Writes `channels`, the best first, as a file that `load_channels` reads: all of it or, on an error, nothing.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    table = {_CHANNELS.format(layer): heads for layer, heads in enumerate(channels.tolist())}
    _write(path, {_OURS: _origin("channels", model), **table}, overwrite)


def save_plan(
    path: str | os.PathLike[str], plan: SharePlan, model: Model, hshare: HShareSettings, *, overwrite: bool = False
) -> None:
    """Writes `plan`, found with the settings `hshare`, as a file that `load_plan` reads: all of it or nothing.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    settings = {field.name: str(getattr(hshare, field.name)) for field in dataclasses.fields(hshare)}
    _write(path, {_OURS: {**_origin("plan", model), "settings": settings}, "source": plan.source}, overwrite)


def load_channels(path: str | os.PathLike[str], model: Model | ModelFiles) -> Int[np.ndarray, "L K ranks"]:
    """Returns the channels of every kv head, the best first, from a file of `save_channels` or a published one.

    Published files rank the channels of every query head: those of a group are merged by mean rank, the lower channel
    on ties. Their other keys (`q_proj`, `v_proj`, ...) are not used.

    Args:
        path: the file.
        model: that the channels are for. Of ModelFiles only the shapes are checked: what tells a model from another of
            the same shape is known once its weights are loaded.

    Raises:
        ValueError: a file of another model, or one that holds something else than different channels for each head.
        OSError: a file that cannot be read.
    """
    table, config = _read(path, "channels", model), model.config
    names = [_CHANNELS.format(layer) for layer in range(config.num_layers)]
    if lacking := [name for name in names if name not in table]:
        raise ValueError(f"{path}: key {lacking[0]} is missing; a file for this model has {config.num_layers} layers")
    if extra := [key for key in table if key.endswith("self_attn.qk_proj") and key not in names]:
        raise ValueError(f"{path}: key {extra[0]} is too much; a file for this model has {config.num_layers} layers")
    layers = [_channels_of(f"{path}: {name}", table[name], config) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{path}: {name} has {layer.shape[1]} channels a head, but layer 0 has {layers[0].shape[1]}; all "
                "layers must have as many"
            )
    return np.stack(layers)


def _channels_of(where: str, heads: object, config: ModelConfig) -> Int[np.ndarray, "K ranks"]:
    K, N, H = config.num_kv_heads, config.num_heads, config.head_dim
    if not isinstance(heads, list) or len(heads) not in (K, N):
        found = f"{len(heads)} entries" if isinstance(heads, list) else json.dumps(heads)[:40]
        raise ValueError(f"{where} must have a list for each of {K} kv heads or {N} query heads; it has {found}")
    for head, channels in enumerate(heads):
        at = f"{where}[{head}]"
        if not channels or not _is_whole(channels):
            raise ValueError(f"{at} must be a list of channel numbers, at least one")
        if not 0 <= min(channels) <= max(channels) < H:
            outside = min(channels) if min(channels) < 0 else max(channels)
            raise ValueError(f"{at} holds channel {outside}; channels must lie in [0, head_dim={H})")
        if len(set(channels)) < len(channels):
            raise ValueError(f"{at} holds a channel twice; the channels of a head must differ")
        if len(channels) != len(heads[0]):
            raise ValueError(
                f"{at} has {len(channels)} channels, but head 0 has {len(heads[0])}; all must have as many"
            )
    ranked = np.array(heads)
    if len(heads) == K:
        return ranked
    if ranked.shape[1] != H:
        raise ValueError(
            f"{where} ranks {ranked.shape[1]} channels of each query head; to merge those of a group it must rank all "
            f"head_dim={H}"
        )
    ranks = np.argsort(ranked, axis=1)  # a ranking's inverse: the rank of every channel
    return np.argsort(ranks.reshape(K, N // K, H).sum(axis=1), axis=1, kind="stable")


def load_plan(path: str | os.PathLike[str], model: Model | ModelFiles, hshare: HShareSettings) -> SharePlan:
    """Returns the plan in a file of `save_plan`, or in a published one, whose lists copy those of the same head.

    Args:
        path: the file.
        model: that the plan is for; of ModelFiles only the shapes are checked, as for `load_channels`.
        hshare: the settings to decode with.

    Raises:
        ValueError: a file of another model, or one that holds no plan for this model and these settings.
        OSError: a file that cannot be read.
    """
    table, J = _read(path, "plan", model), hshare.num_lists(model.config)
    if _OURS in table:
        source = table.get("source")
        if not isinstance(source, list) or not all(map(_is_whole, source)):
            raise ValueError(f"{path}: source must be a list of whole numbers for each layer")
    elif _PUBLISHED_PLAN in table:
        layers = _check_layer_map(f"{path}: {_PUBLISHED_PLAN}", table[_PUBLISHED_PLAN], model.config)
        source = [[layer * J + j for j in range(J)] for layer in layers]
    else:
        raise ValueError(f"{path}: neither key {_OURS} nor {_PUBLISHED_PLAN}; this is no file of a plan")
    try:
        plan = SharePlan(tuple(map(tuple, source)))
        plan.check(model.config, hshare)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return plan


def differing_settings(path: str | os.PathLike[str], hshare: HShareSettings) -> dict[str, str]:
    """Returns what the plan in a file of `save_plan` was found with where these settings would find another, by name.

    Of a published plan nothing is known, so that all of them differ.
    """
    found_with = json.loads(Path(path).read_bytes()).get(_OURS, {}).get("settings", {})
    settings = {name: str(getattr(hshare, name)) for name in PLAN_SETTINGS}
    return {n: found_with.get(n, "unknown") for n, value in settings.items() if found_with.get(n) != value}


def _check_layer_map(where: str, layers: object, config: ModelConfig) -> list[int]:
    if not _is_whole(layers) or len(layers) != config.num_layers:
        raise ValueError(f"{where} must be a list of {config.num_layers} layer numbers, one for each layer")
    for layer, copied in enumerate(layers):
        if not 0 <= copied <= layer or layers[copied] != copied:
            raise ValueError(
                f"{where}[{layer}]={copied} must be a layer from 0 to {layer} that maps to itself: a layer copies a "
                "lower one that is computed"
            )
    return layers


def _is_whole(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _origin(kind: Literal["channels", "plan"], model: Model) -> dict[str, object]:
    return {"kind": kind, "model": model.name, "identity": model.identity}


def _read(path: str | os.PathLike[str], kind: Literal["channels", "plan"], model: Model | ModelFiles) -> dict[str, Any]:
    try:
        table = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(table).__name__}")
    if _OURS not in table:
        return table
    origin = table[_OURS]
    if not isinstance(origin, dict) or origin.get("kind") != kind:
        found = origin.get("kind") if isinstance(origin, dict) else origin
        raise ValueError(f"{path}: key {_OURS} must be of kind {kind!r}; it is {found!r}")
    if isinstance(model, Model) and origin.get("identity") != model.identity:
        raise ValueError(
            f"{path} was made with {origin.get('model')}, identity {origin.get('identity')}; this model, {model.name}, "
            f"has identity {model.identity} in {model.dtype}: calibrate again with it (float32 and bfloat16 may share)"
        )
    return table


def _write(path: str | os.PathLike[str], table: dict[str, Any], overwrite: bool) -> None:
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or ask to overwrite it")
    with whole_file(path) as draft:
        draft.write_text(json.dumps(table) + "\n", encoding="utf-8")
