"""The models that training starts from: ready sizes, random weights, and layers that come to share."""

import dataclasses

import numpy as np
import pytest
from tiny_training import CONFIG, tiny_model

from hshare_jax.errors import SettingError
from hshare_jax.models.kv_sharing import share_kv
from hshare_jax.models.layers import qkv_rows
from hshare_jax.training.presets import preset
from hshare_jax.training.start import new_model, share_layers


def test_a_ready_size_takes_the_tokenizers_vocabulary():
    config = preset("110m", vocab_size=49_152, max_positions=512)
    assert (config.num_layers, config.width, config.mlp_width, config.vocab_size) == (12, 768, 2048, 49_152)
    assert config.max_positions == 512
    with pytest.raises(SettingError, match="preset='90m' must be one of 110m, "):
        preset("90m", vocab_size=8)


def test_a_model_that_is_to_share_loses_the_weights_not_used():
    model = tiny_model(dataclasses.replace(CONFIG, num_layers=2, windows=(None,) * 2))
    shared = share_layers(model, share_kv(model.config, "0_0"), init="copy")
    assert shared.config.kv_layer_map == (0, 0)
    np.testing.assert_array_equal(
        shared.params["layers_1"]["q"]["weight"], model.params["layers_1"]["qkv"]["weight"][qkv_rows(model.config)[0]]
    )
    assert shared.identity != model.identity


def test_the_same_seed_gives_the_same_weights():
    assert new_model(CONFIG, None, seed=3).identity == tiny_model().identity != new_model(CONFIG, None, seed=4).identity
