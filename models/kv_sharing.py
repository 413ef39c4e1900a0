"""Cross-layer KV sharing: which layer uses the keys and values of which, and the weights of a model that shares.

Wu, Wu, Tu: A Systematic Study of Cross-Layer KV Sharing for Efficient LLM Inference (NAACL 2025, arXiv 2410.14442).
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hshare_jax.errors import SettingError
from hshare_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from jax import Array

Pattern = Literal["pizza", "sandwich", "lasagna"]
Target = Literal["bottom", "middle", "top"]
Init = Literal["mean", "copy"]
PATTERNS: tuple[Pattern, ...] = ("pizza", "sandwich", "lasagna")
TARGETS: tuple[Target, ...] = ("bottom", "middle", "top")
INITS: tuple[Init, ...] = ("mean", "copy")
YOCO_WINDOW = 1024

_NAMED: dict[str, tuple[Pattern, Target]] = {
    **{f"{pattern}-{target}": (pattern, target) for pattern in PATTERNS for target in TARGETS},
    "lckv": ("sandwich", "top"),
}
KNOWN_SPECS = (
    f"({'|'.join(PATTERNS)})-({'|'.join(TARGETS)}):KV_LAYERS, cla:KV_LAYERS, lckv:OWN_LAYERS, yoco, yoco:WINDOW, "
    "or an entry for each layer such as 0_0_2_2"
)
_NOTATION = re.compile(r"\d+s?(_\d+s?)*", re.ASCII)


class SpecError(SettingError):
    """A `spec` of `share_kv` cannot be read, or this model cannot share so. `reason` says why."""

    def __init__(self, spec: str, reason: ValueError) -> None:
        super().__init__("spec", spec, str(reason))
        self.args, self.reason = (spec, reason), reason

    def told(self, say: Callable[[str, object], str]) -> str:
        """The message, in which `say(name, value)` spells each setting, also the settings in the reason."""
        reason = self.reason.told(say) if isinstance(self.reason, SettingError) else str(self.reason)
        return f"{say(self.name, self.value)}: {reason}"


class _NumberToChoose:
    """Stands in a message where the user is to put a number."""

    def __repr__(self) -> str:
        return "N"


class _WindowMissing(SettingError):
    """An entry such as 1s needs a sliding window, and neither the model nor `window` gives one. `where` names it."""

    def __init__(self, where: str) -> None:
        super().__init__("window", _NumberToChoose(), where)
        self.args = (where,)

    def told(self, say: Callable[[str, object], str]) -> str:
        """The message, in which `say(name, value)` spells the window."""
        return f"{self.rule}; give {say(self.name, self.value)}"


def kv_layer_map(pattern: Pattern, target: Target, num_layers: int, num_kv_layers: int) -> tuple[int, ...]:
    """The map of a named pattern: for each layer the layer whose keys and values it uses (section 3.1).

    # 6 layers, 3 KV layers:  pizza-bottom    0 | 1 | 2 2 2 2
    #                         sandwich-top    0 | 4 4 4 4 | 5
    #                         lasagna-middle  0 | 2 2 2 | 5 5

    Args:
        pattern: how the layers are grouped.
            pizza: the first `num_kv_layers` - 1 layers are groups alone; all other layers are one group.
            sandwich: `num_kv_layers` - 1 layers are groups alone, one half the first layers and one half the last (an
            odd layer is among the first); all layers between are one group.
            lasagna: layer 0 is a group alone; the other layers form `num_kv_layers` - 1 groups of equal size, or nearly
            so, the larger groups first.
        target: which layer of a group keeps its keys and values: the lowest, the middle or the highest. Where a group
            has two middle layers, pizza and sandwich take the lower one, lasagna takes the upper one, because the lower
            of a pair is its bottom.
        num_layers: how many layers the model has.
        num_kv_layers: how many layers keep keys and values.

    Raises:
        ValueError: the pattern or target is not known, the model cannot have this number of KV layers, or layer 0 would
            use the keys and values of another layer.
    """
    if pattern not in PATTERNS:
        raise SettingError("pattern", pattern, f"must be one of {', '.join(PATTERNS)}")
    if target not in TARGETS:
        raise SettingError("target", target, f"must be one of {', '.join(TARGETS)}")
    _check_number(num_layers, num_kv_layers)
    layers = tuple(range(num_layers))
    if num_kv_layers == 1:
        groups = [layers]
    elif pattern == "lasagna":
        groups = [layers[:1], *_split(layers[1:], num_kv_layers - 1)]
    else:
        num_first = num_kv_layers - 1 if pattern == "pizza" else num_kv_layers // 2
        end = num_layers - (num_kv_layers - 1 - num_first)
        first, last = [(layer,) for layer in layers[:num_first]], [(layer,) for layer in layers[end:]]
        groups = [*first, layers[num_first:end], *last]
    chosen = [_choose(group, pattern, target) for group in groups]
    if chosen[0] != 0:
        raise SettingError(
            "num_kv_layers", 1, f"with {target} has layer 0 look up at layer {chosen[0]}, and it must use its own keys "
            "and values (quality drops far without); take bottom, or at least 2 KV layers",
        )  # fmt: skip
    return tuple(shared for group, shared in zip(groups, chosen, strict=True) for _ in group)


def _check_number(num_layers: int, num_kv_layers: int) -> None:
    if not 1 <= num_kv_layers <= num_layers:
        rule = f"must lie between 1 and the model's {num_layers} layers"
        raise SettingError("num_kv_layers", num_kv_layers, rule)


def _split(layers: Sequence[int], num_groups: int) -> list[Sequence[int]]:
    """Splits layers into consecutive groups whose sizes differ by at most one, the larger groups first."""
    size, num_larger = divmod(len(layers), num_groups)
    starts = [size * index + min(index, num_larger) for index in range(num_groups + 1)]
    return [layers[start:end] for start, end in itertools.pairwise(starts)]


def _choose(group: Sequence[int], pattern: Pattern, target: Target) -> int:
    middle = group[len(group) // 2] if pattern == "lasagna" else group[(len(group) - 1) // 2]
    return {"bottom": group[0], "middle": middle, "top": group[-1]}[target]


def share_kv(config: ModelConfig, spec: str, *, window: int | None = None) -> ModelConfig:
    """Changes a configuration so that its layers share keys and values.

    Args:
        config: the model's configuration. A model that shares already can only share more, because the weights that it
            lacks cannot be restored.
        spec: how the layers share. One of
            `PATTERN-TARGET:KV_LAYERS`, such as sandwich-middle:11 (see `kv_layer_map`);
            `cla:KV_LAYERS`: groups of equal size, or nearly so, that use the keys and values of their lowest layer
            (Brandon et al. 2024, arXiv 2405.12981). This is lasagna-bottom, except that layer 0 is in the first group;
            `lckv:OWN_LAYERS`: sandwich-top with one KV layer more;
            `yoco` or `yoco:WINDOW`: the lower half of the layers keep their keys and values and attend within a window
            (1024); the upper half attend to everything and share the keys and values of their lowest layer;
            one entry for each layer, in the paper's notation: 0_0_2_2. A layer whose entry ends in s (0_1s_1s) attends
            within the sliding window, every other layer to everything.
        window: the sliding window for yoco and for entries that end in s. None takes 1024 for yoco, and the model's
            window for entries.

    Raises:
        SpecError: the spec cannot be read, or the model cannot share so. The message says why, and what is possible.
    """
    try:
        if window is not None and window < 1:
            raise SettingError("window", window, "must be at least 1")
        layers, windows = _read_spec(config, spec, window)
        shared = dataclasses.replace(config, kv_layer_map=layers, windows=windows)
        if lacking := sorted({*shared.kv_layers} - {*config.kv_layers}):
            raise ValueError(
                f"layer {lacking[0]} would keep its own keys and values, but this model, {write_notation(config)}, has "
                f"no weights for them; choose KV layers among {', '.join(map(str, config.kv_layers))}"
            )
    except ValueError as error:
        raise SpecError(spec, error) from error
    return shared


def _read_spec(config: ModelConfig, spec: str, window: int | None) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Reads a spec as (`kv_layer_map`, the window of each layer)."""
    if _NOTATION.fullmatch(spec):
        return _read_notation(config, spec.split("_"), window)
    L = config.num_layers
    name, colon, number = spec.partition(":")
    if name not in ("yoco", "cla", *_NAMED):
        raise ValueError(f"no way of sharing is called so; known are {KNOWN_SPECS}")
    if name == "yoco" and not colon:
        size = window or YOCO_WINDOW
    elif number.isascii() and number.isdecimal():
        size = int(number)
    else:
        raise ValueError(f"a whole number must follow the name, as in {name}:{max(1, L // 2)}")
    if name == "yoco":
        if size < 1:
            raise ValueError("the window must be at least 1")
        if window not in (None, size):
            raise SettingError("window", window, "contradicts it; leave either out")
        return kv_layer_map("pizza", "bottom", L, L // 2 + 1), (size,) * (L // 2) + (None,) * (L - L // 2)
    _check_no_window(window)
    if name == "cla":
        _check_number(L, size)
        return tuple(group[0] for group in _split(range(L), size) for _ in group), config.windows
    pattern, target = _NAMED[name]
    return kv_layer_map(pattern, target, L, size + 1 if name == "lckv" else size), config.windows


def _read_notation(
    config: ModelConfig, entries: Sequence[str], window: int | None
) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    if len(entries) != config.num_layers:
        raise ValueError(f"it has {len(entries)} entries; it needs one for each of {config.num_layers} layers")
    if not any(entry.endswith("s") for entry in entries):
        _check_no_window(window)
    windows = [
        (window or _window_of(config, layer, entry)) if entry.endswith("s") else None
        for layer, entry in enumerate(entries)
    ]
    return tuple(int(entry.removesuffix("s")) for entry in entries), tuple(windows)


def _window_of(config: ModelConfig, layer: int, entry: str) -> int:
    """The window for an entry that ends in s: the layer's window, or the only window that the model has."""
    if (own := config.windows[layer]) is not None:
        return own
    known = sorted({window for window in config.windows if window is not None})
    if len(known) != 1:
        has = f"the windows {', '.join(map(str, known))}" if known else "no sliding window"
        raise _WindowMissing(f"{entry} of layer {layer} attends within a window, and the model has {has}")
    return known[0]


def _check_no_window(window: int | None) -> None:
    if window is not None:
        reason = "it is for yoco and for entries with s (0_1s_1s); leave it out"
        raise SettingError("window", window, "has no effect", reason)


def write_notation(config: ModelConfig) -> str:
    """The paper's notation of a model: for each layer the layer that it borrows from, with s where it has a window.

    # kv_layer_map (0, 2, 2), windows (None, 16, 16):  0_2s_2s
    """
    return "_".join(
        f"{config.kv_layer(layer)}{'' if window is None else 's'}" for layer, window in enumerate(config.windows)
    )


def papers_prefill_cost(config: ModelConfig) -> float:
    """The cost of prefill relative to the same model without sharing, as the paper counts it (section 3.2).

    Every layer from the first that looks up to the last that is looked up counts `forward_passes` + `backward_passes`,
    every other layer 1. If the first layer that looks up is layer 1, layer 0 counts like it, as in the paper's lasagna:
    9.0, not 8.33. This is a rule of thumb. `layer_passes` counts what this decoder really does.

    # 12 layers, 6 KV layers, 7 + 2 passes:
    # bottom 1.00; pizza- and sandwich-middle 44 / 12 = 3.67, -top 68 / 12 = 5.67; lasagna-middle and -top 9.0

    Raises:
        ValueError: `forward_passes` is None, so the number of passes depends on the prompt.
    """
    if config.kv_layer_map is None:
        return 1.0
    if config.forward_passes is None:
        rule = "has no fixed cost; set a number, or ask layer_passes about a prompt"
        raise SettingError("forward_passes", None, rule)
    looking_up = [layer for layer in range(config.num_layers) if config.looks_up(layer)]
    if not looking_up:
        return 1.0
    first, last = looking_up[0], max(map(config.kv_layer, looking_up))
    num_iterated = last + 1 - (0 if first == 1 else first)
    passes = config.forward_passes + config.backward_passes
    return 1 + (passes - 1) * num_iterated / config.num_layers


def layer_passes(config: ModelConfig, num_tokens: int) -> tuple[int, ...]:
    """How often the decoder evaluates each layer, if it is given `num_tokens` tokens at once.

    In a block that takes several passes the highest layer is evaluated only once, because earlier passes need only its
    keys and values. With `forward_passes` None the counts are upper bounds, because the passes end as soon as nothing
    changes.

    # kv_layer_map (0, 3, 3, 3), 7 + 2 passes:  1 9 9 1 for a long prompt, 1 4 4 1 for 4 tokens, 1 1 1 1 for one
    """
    if num_tokens < 1:
        raise SettingError("num_tokens", num_tokens, "must be at least 1")
    backward = min(config.backward_passes, num_tokens)
    most = num_tokens - backward
    forward = most if config.forward_passes is None else min(config.forward_passes, most)
    passes = [1] * config.num_layers
    for block in config.blocks:
        for layer in block[:-1]:
            passes[layer] = forward + backward
    return tuple(passes)


def share_weights(params: Mapping[str, Any], config: ModelConfig, shared_config: ModelConfig, init: Init) -> dict:
    """Makes parameters of `shared_config` from parameters of `config` (section 3.3). They are useless before training.

    Only key and value projections and the norms of keys change. Parameters that do not change are not copied.

    Args:
        params: the parameter tree of `config`. Weights in few bits become floats.
        config: the configuration of the model that is converted.
        shared_config: the same model with more sharing, from `share_kv`.
        init: where the key and value projections (weights, biases and norms) of a KV layer come from. "mean": the mean
            of the projections of all layers that will use them. "copy": the layer's present projections.

    Raises:
        ValueError: `init` is not known, or the configurations differ in more than their sharing.
    """
    # Here, because the command line reads the names above before it needs jax.
    import jax.numpy as jnp
    import numpy as np

    from hshare_jax.kernels.block_weights import floats_of
    from hshare_jax.models.layers import qkv_rows

    if init not in INITS:
        raise SettingError("init", init, f"must be one of {', '.join(INITS)}")
    _check_same_model(config, shared_config)
    queries, *rest = qkv_rows(config)
    kv = np.concatenate(rest)
    params = floats_of(params)
    result = dict(params)
    for layer in range(config.num_layers):
        name = f"layers_{layer}"
        if layer not in config.kv_layers:
            continue
        weights, own = dict(params[name]), params[name]["qkv"]
        if layer not in shared_config.kv_layers:
            del weights["qkv"]
            weights.pop("k_norm", None)
            weights["q"] = {kind: array[queries] for kind, array in own.items()}
            result[name] = weights
            continue
        served = [user for user in range(config.num_layers) if shared_config.kv_layer(user) == layer]
        used = [params[f"layers_{config.kv_layer(user)}"] for user in served]
        sources = [layer_weights["qkv"] for layer_weights in used]
        if init == "mean" and any(source is not own for source in sources):
            weights["qkv"] = {
                kind: jnp.asarray(array).at[kv].set(_mean([source[kind][kv] for source in sources]))
                for kind, array in own.items()
            }
            if config.qk_norm:
                weights["k_norm"] = {"scale": _mean([layer_weights["k_norm"]["scale"] for layer_weights in used])}
            result[name] = weights
    return result


def _mean(arrays: "Sequence[Array]") -> "Array":
    """The mean of arrays, summed in float32 and returned in their dtype."""
    total = arrays[0].astype("float32")
    for array in arrays[1:]:
        total = total + array.astype("float32")
    return (total / len(arrays)).astype(arrays[0].dtype)


def _check_same_model(config: ModelConfig, shared_config: ModelConfig) -> None:
    free = ("kv_layer_map", "windows", "forward_passes", "backward_passes")
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(shared_config, field.name)
        if field.name not in free and ours != theirs:
            raise ValueError(
                f"shared_config has {field.name}={theirs}, config has {ours}; make it with share_kv(config, ...)"
            )
    if lacking := sorted({*shared_config.kv_layers} - {*config.kv_layers}):
        raise ValueError(
            f"layer {lacking[0]} has keys and values in shared_config, but none in config; "
            "make shared_config with share_kv(config, ...)"
        )
