"""Compares three methods with dense decoding on windows of a text, at the same budget of tokens.

    python examples/evaluate.py

Each window is prefilled once. Then every method decodes the last 32 tokens of the window (teacher forcing). KL is the
divergence from dense decoding, in nats. Agreement is the share of steps on which both find the same token likeliest.
"""

from pathlib import Path

import hshare_jax
from hshare_jax.evaluation import Scorer, cut_windows
from hshare_jax.methods import Quest, StreamingLLM

# Each method reads 128 tokens in a head and step, and everything in layer 0.
methods = {
    "HShare": hshare_jax.HShare(hshare_jax.HShareSettings(num_sinks=8, num_critical=88, num_recent=32, dense_layers=1)),
    "Quest": Quest(num_pages=7, page_size=16, dense_layers=1),
    "StreamingLLM": StreamingLLM(num_sinks=4, num_recent=124, dense_layers=1),
}
model = hshare_jax.load_model("smollm2-135m-instruct")
text = Path(__file__).parent.with_name("scripts").joinpath("demo_prompt.txt").read_text(encoding="utf-8")
windows = cut_windows(model, "tomatoes", text, context=512, count=2)
scorer = Scorer(model, windows, 32, [*methods.values()])
for name, method in methods.items():
    scores = scorer.score(method)
    kl, agreement, reads = (scores[key].mean() for key in ("divergence", "agrees", "reads"))
    print(f"{name:12}  KL {kl:.4f}  agreement {agreement:.0%}  reads {reads:.0f} of 512 tokens")
