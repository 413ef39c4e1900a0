"""Cross-layer KV sharing: which layer's keys and values serve which, by name or written out, and from which weights.

Wu, Wu, Tu: A Systematic Study of Cross-Layer KV Sharing for Efficient LLM Inference (NAACL 2025, arXiv 2410.14442).
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from hshare_jax.models.config import ModelConfig

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


def kv_layer_map(pattern: Pattern, target: Target, num_layers: int, num_kv_layers: int) -> tuple[int, ...]:
    """Returns for each layer the layer whose keys and values serve it (section 3.1).

    # 6 layers, 3 KV layers:  pizza-bottom    0 | 1 | 2 2 2 2
    #                         sandwich-top    0 | 4 4 4 4 | 5
    #                         lasagna-middle  0 | 2 2 2 | 5 5

    Args:
        pattern: which layers share. pizza: the first `num_kv_layers` - 1 keep their own, all others share. sandwich: of
            those that keep their own, half are the first layers and half the last; the odd one is among the first.
            lasagna: layer 0 keeps its own, the others form `num_kv_layers` - 1 groups as equal as possible, larger ones
            first.
        target: whose they share: those of the lowest layer of a group, of its middle one, or of its highest. Between
            two middle ones pizza and sandwich take the lower, lasagna the upper: the lower of a pair is its bottom.
        num_layers: of the model.
        num_kv_layers: how many layers keep keys and values of their own.

    Raises:
        ValueError: an unknown pattern or target, a number of KV layers that the model cannot have, or one with which
            layer 0 would share those of another layer.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} must be one of {', '.join(PATTERNS)}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
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
        raise ValueError(
            f"num_kv_layers=1 with {target} has layer 0 look up at layer {chosen[0]}, and it must use its own keys and "
            "values (quality drops far without); take bottom, or at least 2 KV layers"
        )
    return tuple(shared for group, shared in zip(groups, chosen, strict=True) for _ in group)


def _check_number(num_layers: int, num_kv_layers: int) -> None:
    if not 1 <= num_kv_layers <= num_layers:
        raise ValueError(f"num_kv_layers={num_kv_layers} must lie between 1 and the model's {num_layers} layers")


def _split(layers: Sequence[int], num_groups: int) -> list[Sequence[int]]:
    """Returns consecutive groups whose sizes differ by one at most, the larger ones first."""
    size, num_larger = divmod(len(layers), num_groups)
    starts = [size * index + min(index, num_larger) for index in range(num_groups + 1)]
    return [layers[start:end] for start, end in itertools.pairwise(starts)]


def _choose(group: Sequence[int], pattern: Pattern, target: Target) -> int:
    middle = group[len(group) // 2] if pattern == "lasagna" else group[(len(group) - 1) // 2]
    return {"bottom": group[0], "middle": middle, "top": group[-1]}[target]


def share_kv(config: ModelConfig, spec: str, *, window: int | None = None) -> ModelConfig:
    """Returns the configuration whose layers share keys and values as `spec` says.

    Args:
        config: the model. One that shares already can only share more: weights that it lacks cannot be had back.
        spec: one of
            `PATTERN-TARGET:KV_LAYERS`, such as sandwich-middle:11 (see `kv_layer_map`);
            `cla:KV_LAYERS`, groups as equal as possible, layer 0 in the first, that share those of their lowest layer
            (Brandon et al. 2024, arXiv 2405.12981): lasagna-bottom, but that layer 0 is not alone;
            `lckv:OWN_LAYERS`, which is sandwich-top with one KV layer more;
            `yoco` or `yoco:WINDOW`: the lower half of the layers keep their own and attend within a window (1024), the
            upper half attend in full and share those of their lowest layer;
            one entry a layer, as the paper writes it: 0_0_2_2. A layer whose entry ends in s (0_1s_1s) attends within
            the sliding window, every other one in full.
        window: the sliding window for yoco and for entries with s; None takes 1024 for yoco, and the model's own for
            entries.

    Raises:
        ValueError: a spec that cannot be read or that this model cannot have. The message says why and what can be had.
    """
    try:
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1")
        layers, windows = _read_spec(config, spec, window)
        shared = dataclasses.replace(config, kv_layer_map=layers, windows=windows)
        if lacking := sorted({*shared.kv_layers} - {*config.kv_layers}):
            raise ValueError(
                f"layer {lacking[0]} would keep its own keys and values, but this model, {write_notation(config)}, has "
                f"no weights for them; choose KV layers among {', '.join(map(str, config.kv_layers))}"
            )
    except ValueError as error:
        raise ValueError(f"spec={spec!r}: {error}") from error
    return shared


def _read_spec(config: ModelConfig, spec: str, window: int | None) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Returns (the layer that serves each layer, the window of each layer)."""
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
            raise ValueError(f"window={window} contradicts it; leave either out")
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
    if (own := config.windows[layer]) is not None:
        return own
    known = sorted({window for window in config.windows if window is not None})
    if len(known) != 1:
        has = f"the windows {', '.join(map(str, known))}" if known else "no sliding window"
        raise ValueError(f"{entry} of layer {layer} attends within a window, and the model has {has}; give window=N")
    return known[0]


def _check_no_window(window: int | None) -> None:
    if window is not None:
        raise ValueError(
            f"window={window} has no effect: it is for yoco and for entries with s (0_1s_1s); leave it out"
        )


def write_notation(config: ModelConfig) -> str:
    """Returns the paper's notation of a model: for each layer the one that serves it, with s where a window limits it.

    # kv_layer_map (0, 2, 2), windows (None, 16, 16):  0_2s_2s
    """
    return "_".join(
        f"{config.kv_layer(layer)}{'' if window is None else 's'}" for layer, window in enumerate(config.windows)
    )


def papers_prefill_cost(config: ModelConfig) -> float:
    """Returns what prefill costs relative to the model without sharing, as the paper counts (section 3.2).

    Every layer from the first that looks up to the last that is looked up counts `forward_passes` + `backward_passes`,
    every other one 1. Layer 0 counts with them where they begin at layer 1, as in the paper's lasagna: 9.0, not 8.33.
    This is a rule of thumb; `layer_passes` is what this decoder does.

    # 12 layers, 6 KV layers, 7 + 2 passes:
    # bottom 1.00; pizza- and sandwich-middle 44 / 12 = 3.67, -top 68 / 12 = 5.67; lasagna-middle and -top 9.0

    Raises:
        ValueError: `forward_passes` is None: the passes then depend on the prompt.
    """
    if config.kv_layer_map is None:
        return 1.0
    if config.forward_passes is None:
        raise ValueError("forward_passes=None has no fixed cost; set a number, or ask layer_passes about a prompt")
    looking_up = [layer for layer in range(config.num_layers) if config.looks_up(layer)]
    if not looking_up:
        return 1.0
    first, last = looking_up[0], max(map(config.kv_layer, looking_up))
    num_iterated = last + 1 - (0 if first == 1 else first)
    passes = config.forward_passes + config.backward_passes
    return 1 + (passes - 1) * num_iterated / config.num_layers


def layer_passes(config: ModelConfig, num_tokens: int) -> tuple[int, ...]:
    """Returns how often the decoder evaluates each layer for `num_tokens` tokens that it is given at once.

    The highest layer of a block that is iterated is evaluated once; of it, the passes before compute only keys and
    values. With `forward_passes` None this is the most: the passes end where nothing changes any more.

    # kv_layer_map (0, 3, 3, 3), 7 + 2 passes:  1 9 9 1 for a long prompt, 1 4 4 1 for 4 tokens, 1 1 1 1 for one
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    backward = min(config.backward_passes, num_tokens)
    most = num_tokens - backward
    forward = most if config.forward_passes is None else min(config.forward_passes, most)
    passes = [1] * config.num_layers
    for block in config.blocks:
        for layer in block[:-1]:
            passes[layer] = forward + backward
    return tuple(passes)


def share_weights(params: Mapping[str, Any], config: ModelConfig, shared_config: ModelConfig, init: Init) -> dict:
    """Returns the parameters of `shared_config` made from those of `config` (section 3.3); untrained, they are no use.

    Queries and all that is no projection to keys and values stay; what does not change is not copied.

    Args:
        params: the parameter tree of `config`.
        config: the model that is converted.
        shared_config: the same model with more sharing, from `share_kv`.
        init: "mean" gives a KV layer the mean, over the layers that it serves, of the key and value projections
            (weights and biases) that served them before; "copy" leaves it its own.

    Raises:
        ValueError: an unknown `init`, or configurations that differ in more than what is shared.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} must be one of {', '.join(INITS)}")
    _check_same_model(config, shared_config)
    first = config.num_heads * config.head_dim  # the rows of queries come before those of keys and values
    result = dict(params)
    for layer in range(config.num_layers):
        name = f"layers_{layer}"
        if layer not in config.kv_layers:
            continue
        weights, own = dict(params[name]), params[name]["qkv"]
        if layer not in shared_config.kv_layers:
            del weights["qkv"]
            weights["q"] = {kind: array[:first] for kind, array in own.items()}
            result[name] = weights
            continue
        served = [user for user in range(config.num_layers) if shared_config.kv_layer(user) == layer]
        sources = [params[f"layers_{config.kv_layer(user)}"]["qkv"] for user in served]
        if init == "mean" and any(source is not own for source in sources):
            weights["qkv"] = {
                kind: jnp.concatenate([array[:first], _mean([source[kind][first:] for source in sources])])
                for kind, array in own.items()
            }
            result[name] = weights
    return result


def _mean(arrays: Sequence[Array]) -> Array:
    """Returns the mean, summed in float32, in the arrays' own dtype."""
    total = arrays[0].astype(jnp.float32)
    for array in arrays[1:]:
        total = total + array.astype(jnp.float32)
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
            f"layer {lacking[0]} of shared_config has keys and values of its own, that of config has none; "
            "make it with share_kv(config, ...)"
        )
