"""The decoder inside an NNX program: `flax.nnx.bridge.ToNNX` turns it into an NNX module with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_params

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder, run_decoder, unembed

PLAIN = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
    windows=(None,) * 3,
)  # fmt: skip


@pytest.mark.parametrize("kv_layer_map", [None, (0, 2, 2)], ids=["no sharing", "layer 1 looks up"])
def test_the_decoder_as_an_nnx_module_gives_the_same_logits(kv_layer_map) -> None:
    config = ModelConfig(**{**vars(PLAIN), "kv_layer_map": kv_layer_map})
    params = random_params(config)
    tokens, positions = jnp.arange(7, 17)[None], jnp.arange(10)[None]

    def attend(layer, q, k, v, state):
        state = state if k is None else {**state, config.kv_layer(layer): (k, v)}
        keys, values = state[config.kv_layer(layer)]
        return jax.nn.dot_product_attention(q, keys, values, is_causal=True), state

    def attend_to_nothing(layer, q, k, v, state):
        return q, state

    # One token is enough to make the parameters, and it looks up nothing.
    token = jnp.zeros((1, 1), jnp.int32)
    module = nnx.bridge.ToNNX(Decoder(config), rngs=nnx.Rngs(0)).lazy_init(token, token, attend_to_nothing, {})
    nnx.update(module, params)
    hidden, _ = module(tokens, positions, attend, {})
    found = module(hidden, method=Decoder.unembed)

    hidden, _ = Decoder(config).apply({"params": params}, tokens, positions, attend, {})  # pyright: ignore[reportAssignmentType]
    expected = Decoder(config).apply({"params": params}, hidden, method="unembed")
    np.testing.assert_array_equal(found, expected)

    # run_decoder and unembed, which the package calls, are the same functions with types.
    hidden, _ = run_decoder(params, tokens, positions, attend, {}, config=config)
    np.testing.assert_array_equal(unembed(params, hidden, config=config), expected)
