"""Ready sizes of models for training from random weights."""

import dataclasses

from hshare_jax.errors import SettingError
from hshare_jax.models.config import ModelConfig

PRESETS = {
    # The smallest model of arXiv 2410.14442, and its name there. The sizes are from the authors' llama_small.json.
    "110m": ModelConfig(
        vocab_size=32_000, width=768, mlp_width=2048, num_layers=12, num_heads=12, num_kv_heads=6, head_dim=64,
        max_positions=1024, windows=(None,) * 12,
    ),
    # For experiments on two CPU cores: one run takes minutes, a study of twenty runs an hour or two.
    "micro": ModelConfig(
        vocab_size=4096, width=128, mlp_width=352, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=32,
        max_positions=512, windows=(None,) * 8, tie_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=32_000, width=256, mlp_width=704, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32,
        max_positions=1024, windows=(None,) * 8, tie_embeddings=True,
    ),
}  # fmt: skip


def preset(name: str, *, vocab_size: int, max_positions: int = 1024) -> ModelConfig:
    """The configuration of one of the `PRESETS`, with the vocabulary size of a tokenizer.

    Raises:
        SettingError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise SettingError("preset", name, f"must be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], vocab_size=vocab_size, max_positions=max_positions)
