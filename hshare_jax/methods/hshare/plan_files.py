"""Plan files: share plans and label channels on disk, as this package writes them and as they are published.

The files are JSON. Channels are written in the form that the published code of HShare and Double Sparsity uses:
`model.layers.N.self_attn.qk_proj` lists every head's channels, the best first. Plans of HShare's published code are
read too: their `layer.share_config` names, for every layer, the layer whose lists it copies.
"""

import dataclasses
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from jaxtyping import Int

from hshare_jax.errors import SettingError
from hshare_jax.files.atomic import whole_file
from hshare_jax.files.texts import parse_json
from hshare_jax.methods.hshare.channels import check_channels
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model, ModelFiles

_OURS, _PUBLISHED_PLAN = "hshare_jax", "layer.share_config"
_CHANNELS = "model.layers.{}.self_attn.qk_proj"
_OLD_NAMES = {"plan_kind": "plan"}  # what files of earlier versions call a setting


@dataclasses.dataclass(frozen=True)
class FileOrigin:
    """The model that a plan file or a channels file was made with. A published file does not name one."""

    path: str
    model: str | None
    identity: str | None  # None in a published file, which serves every model of the right shapes

    def check(self, model: Model) -> None:
        """Raises ValueError if the file was made with another model."""
        if self.identity not in (None, model.identity):
            raise ValueError(
                f"{self.path} was made with {self.model}, identity {self.identity}; this model, {model.name}, has "
                f"identity {model.identity} in {model.dtype}: calibrate again with it (float32 and bfloat16 may share)"
            )


def save_channels(
    path: str | os.PathLike[str], channels: Int[np.ndarray, "L K ranks"], model: Model, *, overwrite: bool = False
) -> None:
    """Writes channels, the best first, as a file that `load_channels` reads. On an error nothing is written.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    table = {_CHANNELS.format(layer): heads for layer, heads in enumerate(channels.tolist())}
    _write(path, {_OURS: _origin("channels", model), **table}, overwrite)


def save_plan(
    path: str | os.PathLike[str], plan: SharePlan, model: Model, method: HShare, *, overwrite: bool = False
) -> None:
    """Writes a plan that `method` found, as a file that `load_plan` reads. On an error nothing is written.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False.
    """
    settings = _as_text(method.settings) | _as_text(method.search)
    _write(path, {_OURS: {**_origin("plan", model), "settings": settings}, "source": plan.source}, overwrite)


def load_channels(path: str | os.PathLike[str], model: Model | ModelFiles) -> Int[np.ndarray, "L K ranks"]:
    """The channels of every kv head, the best first, from a file of `save_channels` or a published file.

    Published files rank the channels of every query head. The rankings of a group are merged by mean rank; on ties the
    lower channel comes first. Other keys of such files (`q_proj`, `v_proj`, ...) are not used.

    Args:
        path: the file.
        model: the model that the channels are for. For ModelFiles only the shapes are checked, because two models of
            one shape can be told apart only by their weights.

    Raises:
        ValueError: a file of another model, or a file without different channels for each head.
        OSError: a file that cannot be read.
    """
    table, origin = _read(path, "channels")
    if isinstance(model, Model):
        origin.check(model)
    return _channels_in(path, table, model.config)


def _channels_in(
    path: str | os.PathLike[str], table: dict[str, Any], config: ModelConfig
) -> Int[np.ndarray, "L K ranks"]:
    names = [_CHANNELS.format(layer) for layer in range(config.num_layers)]
    if lacking := [name for name in names if name not in table]:
        raise ValueError(f"{path}: key {lacking[0]} is missing; a file for this model has {config.num_layers} layers")
    if extra := [key for key in table if key.endswith("self_attn.qk_proj") and key not in names]:
        raise ValueError(f"{path}: key {extra[0]} is unexpected; a file for this model has {config.num_layers} layers")
    layers = [_channels_of(f"{path}: {name}", table[name], config) for name in names]
    for name, layer in zip(names, layers, strict=True):
        if layer.shape != layers[0].shape:
            raise ValueError(
                f"{path}: {name} has {layer.shape[1]} channels a head, but layer 0 has {layers[0].shape[1]}; all "
                "layers must have the same number"
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


def load_plan(path: str | os.PathLike[str], model: Model | ModelFiles, method: HShare) -> SharePlan:
    """The plan in a file of `save_plan`, or in a published file, whose lists copy lists of the same head.

    Args:
        path: the file.
        model: the model that the plan is for; for ModelFiles only the shapes are checked, as for `load_channels`.
        method: the method to decode with.

    Raises:
        ValueError: a file of another model, or a file without a plan for this model and these settings.
        OSError: a file that cannot be read.
    """
    table, origin = _read(path, "plan")
    if isinstance(model, Model):
        origin.check(model)
    return _plan_in(path, table, model.config, method.settings)


def _plan_in(
    path: str | os.PathLike[str], table: dict[str, Any], config: ModelConfig, settings: HShareSettings
) -> SharePlan:
    J = settings.num_lists(config)
    if _OURS in table:
        source = table.get("source")
        if not isinstance(source, list) or not all(map(_is_whole, source)):
            raise ValueError(f"{path}: source must be a list of whole numbers for each layer")
    elif _PUBLISHED_PLAN in table:
        layers = _check_layer_map(f"{path}: {_PUBLISHED_PLAN}", table[_PUBLISHED_PLAN], config)
        source = [[layer * J + j for j in range(J)] for layer in layers]
    else:
        raise ValueError(f"{path}: neither key {_OURS} nor {_PUBLISHED_PLAN}; this is not a plan file")
    try:
        plan = SharePlan(tuple(map(tuple, source)))
        plan.check(config, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return plan


def _differing(table: dict[str, Any], search: PlanSearch) -> dict[str, str]:
    """The search settings that a plan file was written with, where `search` differs from them, by name.

    Nothing is known about a published plan, so all settings differ from it.
    """
    found_with = table.get(_OURS, {}).get("settings", {})
    found = {name: found_with.get(name, found_with.get(_OLD_NAMES.get(name))) for name in _as_text(search)}
    return {name: found[name] or "unknown" for name, value in _as_text(search).items() if found[name] != value}


def with_files(
    method: HShare,
    model: Model | ModelFiles,
    *,
    plan_file: str | os.PathLike[str] | None = None,
    channels_file: str | os.PathLike[str] | None = None,
    given: Collection[str] = (),
) -> HShare:
    """The same method with the plan and the channels of these files.

    See `read_files` for arguments and errors. A Model must also be the one that the files were made with.
    """
    method, origins = read_files(method, model, plan_file=plan_file, channels_file=channels_file, given=given)
    if isinstance(model, Model):
        for origin in origins:
            origin.check(model)
    return method


def read_files(
    method: HShare,
    model: Model | ModelFiles,
    *,
    plan_file: str | os.PathLike[str] | None = None,
    channels_file: str | os.PathLike[str] | None = None,
    given: Collection[str] = (),
) -> tuple[HShare, list[FileOrigin]]:
    """The same method with the plan and the channels of these files, and the models that the files were made with.

    Each file is read once, and only the shapes of the model are needed. So files can be read before the weights are
    loaded, and `FileOrigin.check` compares the loaded model later.

    Args:
        method: the method.
        model: the model that the files are for.
        plan_file, channels_file: the files; None reads nothing.
        given: names of the search settings that the user chose. The plan in a file must not contradict them.

    Raises:
        SettingError: a setting that a file leaves without effect, or channels under exact scoring.
        ValueError: a file without a plan or without channels for this model's shapes and these settings.
        OSError: a file that cannot be read.
    """
    settings, config, origins = method.settings, model.config, []
    if channels_file is not None and settings.scoring == "exact":
        others = {"scoring": "exact"}
        rule = "has no effect: {scoring} reads keys and has no labels"
        raise SettingError("channels_file", str(channels_file), rule, "leave it out", others)
    if plan_file is not None:
        table, origin = _read(plan_file, "plan")
        method = dataclasses.replace(method, plan=_plan_in(plan_file, table, config, settings))
        for name, found_with in _differing(table, method.search).items():
            if name in given:
                rule = f"has no effect: {{plan_file}} says which list copies which, and was found with {{{name}}}"
                others = {"plan_file": str(plan_file), name: found_with}
                raise SettingError(name, getattr(method.search, name), rule, "leave it out", others)
        origins.append(origin)
    if channels_file is not None:
        table, origin = _read(channels_file, "channels")
        channels = _channels_in(channels_file, table, config)
        check_channels(channels, config, settings.num_label_channels(config))
        method = dataclasses.replace(method, channels=channels)
        origins.append(origin)
    return method, origins


def _as_text(settings: Any) -> dict[str, str]:
    return {field.name: str(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


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


def _read(path: str | os.PathLike[str], kind: Literal["channels", "plan"]) -> tuple[dict[str, Any], FileOrigin]:
    try:
        table = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds a {type(table).__name__}")
    if _OURS not in table:
        return table, FileOrigin(str(path), None, None)
    origin = table[_OURS]
    if not isinstance(origin, dict) or origin.get("kind") != kind:
        found = origin.get("kind") if isinstance(origin, dict) else origin
        raise ValueError(f"{path}: key {_OURS} must be of kind {kind!r}; it is {found!r}")
    return table, FileOrigin(str(path), str(origin.get("model")), str(origin.get("identity")))


def _write(path: str | os.PathLike[str], table: dict[str, Any], overwrite: bool) -> None:
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or ask to overwrite it")
    with whole_file(path) as draft:
        draft.write_text(json.dumps(table) + "\n", encoding="utf-8")
