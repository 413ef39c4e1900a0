"""Decodes in a jitted scan of your own: `prefill` once, then `decode_step` for every token.

    python examples/decode_step.py

The first row is longer than twice HShare's budget, so HShare reads only a part of it. It reads all of the second row.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

import hshare_jax


@functools.partial(jax.jit, static_argnames=("config", "num_steps"), donate_argnames=("state",))
def decode_greedily(params, logits, state, *, config, num_steps):
    """The most probable tokens [num_steps, B], and the state after them."""

    def step(carry, _):
        tokens = carry[0].argmax(axis=-1).astype(jnp.int32)
        return hshare_jax.decode_step(params, tokens, carry[1], config=config), tokens

    (_, state), tokens = jax.lax.scan(step, (logits, state), length=num_steps)
    return tokens, state


model, method = hshare_jax.load_model("smollm2-135m-instruct"), hshare_jax.HShare()
text = Path(__file__).parent.with_name("scripts").joinpath("demo_prompt.txt").read_text(encoding="utf-8")
ids = model.tokenizer(text)["input_ids"]
tokens, lengths = jnp.array([ids, ids]), jnp.array([len(ids), len(ids) // 8])  # a row ends at its length
state = hshare_jax.init_state(model.config, batch_size=2, capacity=len(ids) + 16, method=method)
logits, state = hshare_jax.prefill(model.params, tokens, lengths, state, config=model.config, method=method)
new, state = decode_greedily(model.params, logits, state, config=model.config, num_steps=16)
reads = state.method_state.count_reads(state.cache, model.config)
for row, length in enumerate(state.cache.lengths.tolist()):
    print(f"row {row} read {reads[row]:.0f} of {length} tokens in the last step:", model.tokenizer.decode(new[:, row]))
