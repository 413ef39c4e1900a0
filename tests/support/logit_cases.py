"""Tiny models whose logits are compared with transformers, one case for each setting of a configuration."""

import numpy as np
from random_weights import random_tensor

VOCAB_SIZE = 32
NUM_TOKENS = 40
TOKENS_SEED = 5
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,  # of some classes it lies beyond this vocabulary
}


def rope(kind: str, **fields: float | bool) -> dict:
    """Rotary parameters with 16 original positions, so that the 40 tokens reach beyond them."""
    scaled = {"factor": 4.0} if kind != "default" else {}
    original = {"original_max_position_embeddings": 16} if kind in ("llama3", "yarn") else {}
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **scaled, **original, **fields}}


# name: (model_type, changes to SIZES)
CASES: dict[str, tuple[str, dict]] = {
    "llama, grouped queries": ("llama", {}),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama, multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head_dim": ("llama", {"head_dim": 16}),
    "llama, norm_eps": ("llama", {"rms_norm_eps": 0.1}),
    "rope default": ("llama", rope("default")),
    "rope linear": ("llama", rope("linear")),
    "rope llama3": ("llama", {**rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0), "head_dim": 16}),
    "rope yarn": ("llama", rope("yarn")),
    "rope yarn, mscale": ("llama", rope("yarn", mscale=0.8, mscale_all_dim=0.3)),
    "rope yarn, attention_factor": ("llama", rope("yarn", attention_factor=1.7)),
    "rope yarn, betas": ("llama", {**rope("yarn", beta_fast=4.0, beta_slow=0.5, truncate=False), "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 9}),
    "mistral, head_dim": ("mistral", {"sliding_window": 9, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "ministral, a window in one layer": (
        "ministral",
        {"sliding_window": 9, "head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": False}),
    "phi3, window": ("phi3", {"sliding_window": 9}),
}


def transformers_model(name: str):
    """The transformers model of a case, with random weights. This function needs torch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = CASES[name]
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for tensor, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(random_tensor(tensor, tuple(parameter.shape))))
    return model.eval()


def transformers_logits(model, tokens: np.ndarray) -> np.ndarray:
    """The logits [T, V] of one row of tokens [T], computed by a transformers model."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens[None])).logits[0].numpy()
