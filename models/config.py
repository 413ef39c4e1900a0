"""The configuration of a model: all static values that the decoder needs, read from a Hugging Face config.json.

This module imports no jax, so that the command line can build its options quickly.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hshare_jax.errors import SettingError

if TYPE_CHECKING:
    from jax import Array
    from jaxtyping import Int

ARCHITECTURES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3")
_DEFAULTS = {  # of fields that config.json leaves out, where they differ from those of llama
    "qwen3": {"head_dim": 128},
    "smollm3": {"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    "phi3": {"rms_norm_eps": 1e-5},
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_NUMBERS = {  # the numbers that transformers reads for each type, beside the length before the scaling
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_ORIGINAL = "original_max_position_embeddings"
MOST_LAYERS = 10_000  # of a model; published ones have fewer than 200


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How rotary position embedding spaces its angles. Fields that the `kind` does not use have no effect."""

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_positions: int = 0
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    # GGUF files store llama3 scaling as one divisor per frequency, instead of the parameters above.
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise ValueError(f"rope type {self.kind!r} is not known; known types: {', '.join(ROPE_TYPES)}")
        for name in ("theta", "factor", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise SettingError(f"rope {name}", getattr(self, name), "must be positive")
        if not self.low_freq_factor < self.high_freq_factor:
            others = {"high_freq_factor": self.high_freq_factor}
            raise SettingError(
                "low_freq_factor", self.low_freq_factor, "must be below {high_freq_factor}", others=others
            )
        if self.kind in ("llama3", "yarn") and self.divisors is None and self.original_max_positions < 1:
            raise ValueError(f"rope type {self.kind!r} needs original_max_position_embeddings of at least 1")

    def max_positions(self, stated: int) -> int:
        """How many positions a model has whose configuration states `stated`.

        linear and yarn lengthen a model to `factor` times its original positions. Many such configurations go on to
        state the original positions, as Qwen's instructions for long texts ask. Configurations with llama3 state the
        longer length.
        """
        is_lengthened = self.kind in ("linear", "yarn")
        return max(stated, int(self.factor * self.original_max_positions)) if is_lengthened else stated


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of a LLaMA-family decoder, static and hashable.

    Layers may share keys and values (cross-layer KV sharing, arXiv 2410.14442). Layer l attends to the keys and values
    of layer `kv_layer_map[l]`. A layer that borrows keys and values has no K/V weights and no cache.

    A layer looks up if it borrows from a layer above it. Such a layer attends only to earlier positions (the first
    token to nothing). A prompt or a training text then takes several passes over the layers in between (section 3.2).

    Attributes:
        windows: the sliding window of each layer; None for a layer without one.
        qk_norm: whether queries and keys have an RMS norm over each head, before they are rotated.
        no_rope_layers: the layers whose queries and keys are not rotated.
        kv_layer_map: for each layer the layer whose keys and values it uses. None: no sharing.
        forward_passes: passes without gradient. None repeats until nothing changes, which is exact.
        backward_passes: passes with gradient, after those without.
        num_parts: of how many equal parts of a model this is one (`part`).
    """

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    windows: tuple[int | None, ...]
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    architecture: str = "llama"
    qk_norm: bool = False
    no_rope_layers: tuple[int, ...] = ()
    kv_layer_map: tuple[int, ...] | None = None
    forward_passes: int | None = 7
    backward_passes: int = 2
    num_parts: int = 1

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions",
        )  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise SettingError(name, getattr(self, name), "must be at least 1")
        if self.num_heads % self.num_kv_heads:
            others = {"num_kv_heads": self.num_kv_heads}
            raise SettingError("num_heads", self.num_heads, "must be a multiple of {num_kv_heads}", others=others)
        if self.head_dim % 2:
            raise SettingError("head_dim", self.head_dim, "must be even", "rotary embedding turns pairs of channels")
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries; it needs one for each of {self.num_layers} layers"
            )
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"windows={self.windows}: a sliding window must be at least 1, or None")
        if self.rope.divisors is not None and len(self.rope.divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope has {len(self.rope.divisors)} divisors; head_dim={self.head_dim} needs {self.head_dim // 2}"
            )
        if any(not 0 <= layer < self.num_layers for layer in self.no_rope_layers):
            rule = f"must name layers in [0, {self.num_layers})"
            raise SettingError("no_rope_layers", self.no_rope_layers, rule)
        if self.kv_layer_map == tuple(range(self.num_layers)):
            object.__setattr__(self, "kv_layer_map", None)
        self._check_kv_sharing()

    def _check_kv_sharing(self) -> None:
        if self.forward_passes is not None and self.forward_passes < 0:
            rule = "must be at least 0; {forward_passes} repeats until nothing changes"
            raise SettingError("forward_passes", self.forward_passes, rule, others={"forward_passes": None})
        if self.backward_passes < 1:
            raise SettingError(
                "backward_passes", self.backward_passes, "must be at least 1", "the last pass has a gradient"
            )
        if self.kv_layer_map is None:
            return
        if len(self.kv_layer_map) != self.num_layers:
            raise ValueError(
                f"kv_layer_map has {len(self.kv_layer_map)} entries; it needs one for each of {self.num_layers} layers"
            )
        for layer, shared in enumerate(self.kv_layer_map):
            name = f"kv_layer_map[{layer}]"
            if not 0 <= shared < self.num_layers:
                raise SettingError(name, shared, f"is no layer; it must lie in [0, {self.num_layers})")
            if layer == 0 and shared != 0:
                reason = "layer 0 must use its own keys and values, because quality drops far without them"
                raise SettingError(name, shared, "must be 0", reason)
            if self.kv_layer_map[shared] != shared:
                raise SettingError(
                    name, shared, f"points to a layer without keys and values of its own, kv_layer_map[{shared}]="
                    f"{self.kv_layer_map[shared]}; point to a layer that has its own number there",
                )  # fmt: skip
            if shared > layer and self.windows[layer] == 1:
                reason = f"layer {layer} looks up, so it does not see its own position"
                raise SettingError(f"windows[{layer}]", 1, "leaves nothing", reason)

    @property
    def positions_told(self) -> str:
        """How many positions the model has, for messages, and which fields of its configuration say so."""
        scaling = " and the factor of rope_scaling" if self.rope.kind in ("linear", "yarn") else ""
        return f"{self.max_positions} positions (max_position_embeddings{scaling})"

    @property
    def is_part(self) -> bool:
        """Whether other devices compute further parts, so that some sums run over the mesh axis "model"."""
        return self.num_parts > 1

    @property
    def divides_vocabulary(self) -> bool:
        """Whether a part has an equal share of the vocabulary; else it has all of it."""
        return self.is_part and self.vocab_size % self.num_parts == 0

    def for_parts(self, num_parts: int) -> "ModelConfig":
        """The same model with kv heads that `num_parts` devices can divide among themselves.

        Where there are more devices than kv heads, each kv head is repeated, for an equal part of the query heads that
        it serves.

            # 8 query heads, 2 kv heads:  2 parts leave it as it is; for 4 parts there are 4 kv heads, 0 0 1 1

        Raises:
            SettingError: these devices cannot divide the heads or the mlp. The message names the numbers that can.
        """
        if num_parts in (possible := self.possible_parts):
            return dataclasses.replace(self, num_kv_heads=max(self.num_kv_heads, num_parts))
        raise SettingError(
            "model", num_parts,
            f"devices cannot divide {self.num_kv_heads} kv heads, {self.num_heads} query heads and an mlp of "
            f"{self.mlp_width} evenly; possible are {', '.join(map(str, possible))}",
        )  # fmt: skip

    @property
    def possible_parts(self) -> tuple[int, ...]:
        """The numbers of devices that can divide the heads and the mlp evenly, ascending."""
        N, K, F = self.num_heads, self.num_kv_heads, self.mlp_width
        return tuple(m for m in range(1, N + 1) if N % m == 0 and F % m == 0 and (K % m == 0 or m % K == 0))

    def part(self, num_parts: int) -> "ModelConfig":
        """What one of `num_parts` devices computes of a model that `for_parts` fits: its heads, its part of the mlp.

        Tensor parallelism as in Megatron-LM (arXiv 1909.08053, section 3): a device has whole heads with their caches,
        and after the attention and after the mlp of a layer the devices add up what they computed.
        """
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // num_parts,
            num_kv_heads=self.num_kv_heads // num_parts,
            mlp_width=self.mlp_width // num_parts,
            num_parts=num_parts,
        )

    def kv_layer(self, layer: int) -> int:
        """The layer whose keys and values this layer attends to."""
        return layer if self.kv_layer_map is None else self.kv_layer_map[layer]

    def is_rotated(self, layer: int) -> bool:
        """Whether this layer rotates its queries, as the keys that it attends to are rotated."""
        return self.kv_layer(layer) not in self.no_rope_layers

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that have keys and values, from the bottom up. All other layers borrow."""
        return tuple(layer for layer in range(self.num_layers) if self.kv_layer(layer) == layer)

    def kv_index(self, layer: int) -> int:
        """The index, among the cache's arrays, of the keys and values that this layer attends to."""
        return self.kv_layers.index(self.kv_layer(layer))

    def looks_up(self, layer: int) -> bool:
        """Whether this layer borrows from a layer above it, whose newest keys and values are not known yet."""
        return self.kv_layer(layer) > layer

    def sees(self, layer: int, ends: 'Int[Array, "*rows"]') -> 'tuple[Int[Array, "*rows"], int | None]':
        """Where the visible positions of a layer end, and its window: (ends, window).

        Args:
            layer: the layer.
            ends: where they end for an ordinary layer. A layer that looks up sees one position less.
        """
        window = self.windows[layer]
        if not self.looks_up(layer):
            return ends, window
        return ends - 1, None if window is None else window - 1

    @property
    def blocks(self) -> tuple[range, ...]:
        """All layers in groups, from the bottom up. A group of several layers is evaluated in passes.

        A layer that looks up forms a group with all layers up to the highest one that the group waits for. Every other
        layer is a group alone.

        # kv_layer_map (0, 3, 2, 3, 4):  0 | 1 2 3 | 4
        """
        blocks, layer = [], 0
        while layer < self.num_layers:
            last, end = layer, max(layer, self.kv_layer(layer))
            while last < end:
                last += 1
                end = max(end, self.kv_layer(last))
            blocks.append(range(layer, end + 1))
            layer = end + 1
        return tuple(blocks)

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights hold. Tied embeddings count once."""
        query_width = self.num_heads * self.head_dim
        layer = self.width * (2 * query_width + 3 * self.mlp_width + 2)
        layer += self.qkv_bias * query_width + self.out_bias * self.width
        layer += self.mlp_bias * (2 * self.mlp_width + self.width) + self.qk_norm * self.head_dim
        embeddings = self.vocab_size * self.width * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * layer + self.num_kv_parameters + self.width

    @property
    def num_kv_parameters(self) -> int:
        """How many numbers the weights that compute keys and values hold."""
        kv_width = 2 * self.num_kv_heads * self.head_dim
        return len(self.kv_layers) * (kv_width * (self.width + self.qkv_bias) + self.qk_norm * self.head_dim)

    def cache_bytes_per_token(self, bytes_per_number: int, bytes_of_scale: int = 0) -> int:
        """Bytes that one token takes in the cache: keys and values of all layers.

        Args:
            bytes_per_number: of each number.
            bytes_of_scale: further bytes of each key and value; 4 in a cache of 8 bits.
        """
        return 2 * len(self.kv_layers) * self.num_kv_heads * (self.head_dim * bytes_per_number + bytes_of_scale)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face configuration.

    Args:
        hf: config.json as a mapping, or `LlamaConfig(...).to_dict()`. Rotary scaling may be spelt as in transformers 5
            (`rope_parameters`) or as before (`rope_theta` and `rope_scaling`).

    Raises:
        ValueError: the architecture, activation or rotary type is not one that this decoder computes, or a size is
            missing. The message names the field and the known values.
    """
    architecture = hf.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"model_type={architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={hf['hidden_act']!r} is not supported; this decoder computes silu")
    hf = {**_DEFAULTS.get(architecture, {}), **hf}
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in required if not isinstance(hf.get(name), int)]:
        raise ValueError(f"config.json lacks the whole number(s) {', '.join(missing)}")
    num_heads, num_layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    positions = hf.get("max_position_embeddings") or 2048
    rope = _rope(hf, positions)
    head_dim = hf.get("head_dim")
    if head_dim is None:
        if num_heads < 1 or hf["hidden_size"] % num_heads:
            raise ValueError(
                f"hidden_size={hf['hidden_size']} is not a multiple of num_attention_heads={num_heads}; set head_dim"
            )
        head_dim = hf["hidden_size"] // num_heads
    if architecture == "phi3" and rope.kind != "default":
        raise ValueError(f"rope type {rope.kind!r} is not supported for phi3; this decoder computes its type default")
    # As in transformers, other architectures do not read these fields, which some configurations hold nevertheless.
    attention_bias = architecture in ("llama", "qwen3", "smollm3") and bool(hf.get("attention_bias"))
    mlp_bias = architecture in ("llama", "smollm3") and bool(hf.get("mlp_bias"))
    no_rope_layers = _no_rope_layers(hf, num_layers) if architecture == "smollm3" else ()
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        mlp_width=hf["intermediate_size"],
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        max_positions=rope.max_positions(positions),
        windows=_windows(hf, num_layers, no_rope_layers),
        rope=rope,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        qkv_bias=attention_bias or architecture == "qwen2",
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        tie_embeddings=bool(hf.get("tie_word_embeddings")),
        architecture=architecture,
        qk_norm=architecture == "qwen3",
        no_rope_layers=no_rope_layers,
    )


def check_num_layers(name: str, number: int) -> None:
    """Raises ValueError for more layers than any model has. A damaged file may state billions; each takes memory."""
    if number > MOST_LAYERS:
        raise ValueError(f"{name}={number} must be at most {MOST_LAYERS}")


def _no_rope_layers(hf: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """The layers of SmolLM3 without rotary embedding: those with a 0 in `no_rope_layers`, or each fourth one."""
    flags, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if flags is None:
        return tuple(range(interval - 1, num_layers, interval))
    if not isinstance(flags, list) or len(flags) < num_layers:
        raise ValueError(f"no_rope_layers={flags!r} must hold 0 or 1 for each of {num_layers} layers")
    return tuple(layer for layer in range(num_layers) if not flags[layer])


def _windows(hf: Mapping[str, Any], num_layers: int, no_rope_layers: tuple[int, ...]) -> tuple[int | None, ...]:
    architecture, window, kinds = hf["model_type"], hf.get("sliding_window"), hf.get("layer_types")
    is_optional = architecture in ("qwen2", "qwen3", "smollm3")
    if window is None or architecture == "llama" or (is_optional and not hf.get("use_sliding_window")):
        return (None,) * num_layers
    if architecture in ("mistral", "phi3"):
        return (window,) * num_layers
    if kinds is None:
        first = hf.get("max_window_layers", 28) if architecture in ("qwen2", "qwen3") else 0
        layers = no_rope_layers if architecture == "smollm3" else range(first, num_layers)
        return tuple(window if layer in layers else None for layer in range(num_layers))
    if unknown := sorted({*kinds} - {"full_attention", "sliding_attention"}):
        raise ValueError(f"layer_types holds {unknown[0]!r}; supported: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(hf: Mapping[str, Any], positions: int) -> RopeConfig:
    """Reads every field that transformers reads for the type of rotary embedding."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError(f"rope_scaling={scaling!r} must be a mapping of fields, or null")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if nested := [name for name, value in scaling.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"rope_parameters has fields for {nested[0]!r} alone; all layers must share one rotary embedding"
        )
    if scaling.get("mrope_section") is not None:
        raise ValueError(f"mrope_section={scaling['mrope_section']!r} is not supported; this decoder reads text alone")
    partial = scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={partial!r} is not supported; this decoder turns all of a head's channels"
        )
    fields: dict[str, Any] = {name: scaling.get(name) for name in _ROPE_NUMBERS.get(kind, ())}
    fields = {name: _number(name, value) for name, value in fields.items() if value is not None}
    # As in transformers, the length beside rope_scaling comes before the length in it. linear needs one for the model's
    # positions alone.
    original = (hf.get(_ORIGINAL) if kind in ("llama3", "yarn") else None) or scaling.get(_ORIGINAL) or positions
    if not isinstance(original, int):
        raise ValueError(f"{_ORIGINAL}={original!r} must be a whole number")
    if kind == "yarn":
        fields = {name: value for name, value in fields.items() if value or not name.startswith("beta_")}  # 0: default
        fields.setdefault("factor", positions / original)
        fields["truncate"] = bool(scaling.get("truncate", True))
    if kind in _ROPE_NUMBERS and "factor" not in fields:
        raise ValueError(f"rope_scaling of type {kind!r} lacks factor")
    theta = scaling.get("rope_theta") or hf.get("rope_theta") or 10_000.0
    return RopeConfig(kind=kind, theta=_number("rope_theta", theta), original_max_positions=original, **fields)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    return float(value)
