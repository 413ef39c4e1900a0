"""A training run that takes seconds. As a program it trains in DIR, and is killed at file operation number KILL_AT.

python tests/support/tiny_training.py DIR [KILL_AT]
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.pretrained import Model
from hshare_jax.training.data import TrainingData, split_windows
from hshare_jax.training.run import TrainingResult, train
from hshare_jax.training.settings import TrainingSettings
from hshare_jax.training.start import new_model

CONFIG = ModelConfig(
    vocab_size=48, width=16, mlp_width=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=32,
    windows=(None,), tie_embeddings=True,
)  # fmt: skip
SETTINGS = TrainingSettings(
    sequence_length=12, batch_size=4, accumulation_steps=2, num_steps=24, learning_rate=3e-3, warmup_steps=3,
    log_every=2, eval_every=8, checkpoint_every=5,
)  # fmt: skip


def tiny_model(config: ModelConfig = CONFIG) -> Model:
    """A model without a tokenizer, the same at every call."""
    return new_model(config, None, name="tiny", seed=3)


def tiny_data() -> TrainingData:
    """Windows of a text that repeats itself with errors, the same at every call."""
    rng = np.random.default_rng(5)
    text = np.tile(rng.integers(0, 48, 17), 40)
    text[rng.integers(0, len(text), 60)] = 7
    return split_windows(text.astype(np.int32), SETTINGS.sequence_length, eval_fraction=0.1)


def tiny_run(directory: Path, settings: TrainingSettings = SETTINGS) -> TrainingResult:
    """Trains the tiny model on the tiny text."""
    return train(tiny_model(), tiny_data(), settings, directory)


def kill_at(operation: int, directory: Path) -> None:
    """Kills this process when it begins operation number `operation` on files below `directory`."""
    left, inside = operation, str(directory)

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and inside in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    if len(sys.argv) > 2:
        kill_at(int(sys.argv[2]), place)
    tiny_run(place)
