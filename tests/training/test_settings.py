"""TrainingSettings: values that cannot be used are refused, with a message that names the setting."""

import dataclasses

import pytest
from tiny_training import SETTINGS

from hshare_jax.errors import SettingError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        (
            {"batch_size": 6, "accumulation_steps": 4},
            "batch_size=6 must be a multiple of accumulation_steps=4: micro-batches are equally large",
        ),
        ({"warmup_steps": 24}, r"warmup_steps=24 must lie in \[0, num_steps=24\)"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be positive and finite"),
        ({"min_learning_rate_ratio": 1.5}, r"min_learning_rate_ratio=1.5 must lie in \[0, 1\]"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be finite and at least 0, which switches it off"),
        ({"beta2": 1.0}, r"beta2=1.0 must lie in \[0, 1\)"),
        (
            {"compute_dtype": "float16"},
            "compute_dtype='float16' must be one of float32, bfloat16: float16 would need its losses scaled",
        ),
        ({"seed": -1}, r"seed=-1 must lie in \[0, 2\*\*63\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, unchecked):
    with pytest.raises(SettingError, match=message):
        dataclasses.replace(SETTINGS, **changes)
