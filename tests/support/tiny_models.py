"""Tiny random models of transformers, and the checkpoints that the tests read. They need torch."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import transformers

torch = pytest.importorskip("torch", reason="the extra 'torch' is not installed")

CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
}
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
}


def tiny_model(architecture: str = "llama", **changes) -> transformers.PreTrainedModel:
    """A model in which every parameter is random, norms and biases too, so that a test notices a missing one."""
    torch.manual_seed(7)
    make_config, make_model = CLASSES[architecture]
    model = make_model(make_config(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def state_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The tensors of a model under their names in a checkpoint. A tied output layer is left out."""
    tied = model.config.tie_word_embeddings
    return {
        name: tensor.to(torch.float32).numpy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def fused(state: dict[str, np.ndarray], num_layers: int = 2, num_groups: int = 2, group_size: int = 2) -> dict:
    """The decoder's parameter tree made from the tensors of `state_of`, written out by hand.

    For each of `num_groups` kv heads there are the rows of its `group_size` query heads, of its key and of its value;
    for each channel of the mlp there are the rows of its gate and of its up.
    """

    def pick(*names: str) -> dict[str, np.ndarray]:
        kinds = [kind for kind in ("weight", "bias") if f"{names[0]}.{kind}" in state]
        return {kind: np.concatenate([state[f"{name}.{kind}"] for name in names]) for kind in kinds}

    def by_groups(stacked: np.ndarray) -> np.ndarray:
        size = len(stacked) // (num_groups * (group_size + 2))
        rows = []
        for group in range(num_groups):
            rows += range(group * group_size * size, (group + 1) * group_size * size)
            for part in (group_size * num_groups, (group_size + 1) * num_groups):
                rows += range((part + group) * size, (part + group + 1) * size)
        return stacked[rows]

    def in_pairs(stacked: np.ndarray) -> np.ndarray:
        half = len(stacked) // 2
        return np.stack([stacked[:half], stacked[half:]], axis=1).reshape(stacked.shape)

    def mapped(rule: Callable[[np.ndarray], np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {kind: rule(array) for kind, array in arrays.items()}

    tree: dict = {
        "embedding": state["model.embed_tokens.weight"],
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    if "lm_head.weight" in state:
        tree["unembedding"] = state["lm_head.weight"]
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        is_stacked = f"{at}.self_attn.qkv_proj.weight" in state
        tree[f"layers_{layer}"] = {
            "attention_norm": {"scale": state[f"{at}.input_layernorm.weight"]},
            "mlp_norm": {"scale": state[f"{at}.post_attention_layernorm.weight"]},
            "qkv": mapped(
                by_groups, pick(*(f"{at}.self_attn.{name}_proj" for name in (["qkv"] if is_stacked else "qkv")))
            ),
            "out": pick(f"{at}.self_attn.o_proj"),
            "mlp": {
                "gate_up": mapped(
                    in_pairs, pick(*(f"{at}.mlp.{n}_proj" for n in (["gate_up"] if is_stacked else ["gate", "up"])))
                ),
                "down": pick(f"{at}.mlp.down_proj"),
            },
        }
        for name in ("q_norm", "k_norm"):
            if f"{at}.self_attn.{name}.weight" in state:
                tree[f"layers_{layer}"][name] = {"scale": state[f"{at}.self_attn.{name}.weight"]}
    return tree


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    tokenizer: dict | None = None,
    metadata: dict | None = None,
    rope_divisors: list[float] | None = None,
    tensors_in_part: int = 0,
) -> Path:
    """Writes a model as llama.cpp's converter does.

    Mistral is written as llama. In llama and smollm3 the rows of q and k are permuted. Vectors are float32. With
    `tensors_in_part` there are several files, which `path` is the beginning of.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_in_part)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (metadata or {}).items():
        key = f"{architecture}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_float32(key, value)
    for key, value in (tokenizer or {}).items():
        key = f"tokenizer.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_divisors, np.float32))
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in state_of(model).items():
        stem, _, suffix = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        stem = GGUF_NAMES[stem]
        if architecture in ("llama", "smollm3") and stem in heads:
            tensor = permuted(tensor, heads[stem])
        stored = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
        packed = gguf.quants.quantize(tensor, stored)
        writer.add_tensor(f"{prefix}{stem}.{suffix}", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permuted(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows in llama.cpp's order, in which channels i and i + H / 2 of a head are neighbours."""
    head_dim = tensor.shape[0] // num_heads
    order = [
        head * head_dim + half * head_dim // 2 + channel
        for head in range(num_heads)
        for channel in range(head_dim // 2)
        for half in range(2)
    ]
    return tensor[order]
