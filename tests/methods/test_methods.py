"""The methods beside HShare equal float64 oracles step by step, and equal dense decoding when they read everything."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import method_oracle
import numpy as np
import pytest
from tiny_decoder import LENGTHS, MODEL, SHARED_KV, oracle_row, params, prefill_rows, random_rows

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods import H2O, Quest, SnapKV, StreamingLLM, double_sparsity, exact_topk
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.listed import ListState, _list_prompt
from hshare_jax.prefill import prefill

F32 = 1e-4  # absolute, on float32 logits of about 5 after four layers, against float64
SAME = 1e-5  # between two float32 programs of the same model
STEPS = 8
WINDOWED = dataclasses.replace(MODEL, windows=(None, 20, 9, None))
METHODS = {
    "streaming_llm": (StreamingLLM(num_sinks=2, num_recent=6), method_oracle.Streaming(2, 6)),
    "h2o": (H2O(num_heavy=5, num_recent=4), method_oracle.HeavyHitters(0, 5, 4)),
    "h2o, sinks, kv heads": (
        H2O(num_sinks=2, num_heavy=4, num_recent=3, dense_layers=1, lists_per="kv_head"),
        method_oracle.HeavyHitters(2, 4, 3),
    ),
    "quest": (Quest(num_pages=2, page_size=4), method_oracle.Pages(0, 2, 4, 1)),
    "quest, sinks and recent, kv heads": (
        Quest(num_sinks=3, dense_layers=0, num_pages=2, page_size=4, num_recent=6, lists_per="kv_head"),
        method_oracle.Pages(3, 2, 4, 6),
    ),
    "snapkv": (SnapKV(num_critical=6, num_observed=4), method_oracle.Snapshot(0, 6, 4, 5, True)),
    "snapkv, fixed budget, kv heads": (
        SnapKV(num_sinks=1, num_critical=5, num_observed=3, kernel_size=3, keeps_generated=False, lists_per="kv_head"),
        method_oracle.Snapshot(1, 5, 3, 3, False),
    ),
}  # fmt: skip
COVERING = {
    "streaming_llm": StreamingLLM(num_recent=120),
    "h2o": H2O(num_heavy=60, num_recent=60),
    "quest": Quest(num_pages=32, page_size=4),
    "snapkv": SnapKV(num_critical=120, num_observed=8),
    "exact top-k": exact_topk(HShareSettings(num_critical=120, min_length=0)),
    "double sparsity": double_sparsity(HShareSettings(num_critical=120, min_length=0)),
}


def decode(rows, state, steps, lengths=LENGTHS, config=MODEL):
    """Decodes the next tokens of the rows: (logits [steps, B, V], the state after each step)."""
    logits, states = [], []
    for step in range(steps):
        tokens = jnp.asarray([row[n + step] for row, n in zip(rows, lengths, strict=True)], jnp.int32)
        out, state = decode_step(params(config), tokens, state, config=config)
        logits.append(out)
        states.append(jax.tree.map(lambda array: jnp.array(array, copy=True), state))
    return np.stack(logits), states


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((config, name) for config in (MODEL, WINDOWED) for name in METHODS),
        *((SHARED_KV, name) for name in ("h2o", "quest, sinks and recent, kv heads", "snapkv, fixed budget, kv heads")),
    ],
    ids=lambda given: given if isinstance(given, str) else {MODEL: "full", WINDOWED: "windows"}.get(given, "shared KV"),
)
def test_decoding_equals_the_oracle_in_every_row(config, name):
    method, plain = METHODS[name]
    rows = random_rows(11, more=STEPS)
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    _, state = prefill_rows(prompts, method=method, config=config)
    logits, states = decode(rows, state, STEPS, config=config)
    num_lists = config.num_kv_heads if method.lists_per == "kv_head" else config.num_heads
    for b, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        exact = oracle_row(config)
        for token in prompt:
            exact.dense_step(token)
        plain.start(exact, num_lists)
        for step in range(STEPS):
            reads = {}

            def reads_of(layer, length, reads=reads, exact=exact):
                dense = [exact.sees(layer, length)] * config.num_heads
                reads[layer] = dense if layer < method.dense_layers else plain.reads(exact, layer, length)
                return reads[layer]

            expected = exact.step(row[len(prompt) + step], reads_of)
            np.testing.assert_allclose(logits[step, b], expected, atol=F32, rtol=0)
            now = states[step]
            counts = [len(slots) for of_layer in reads.values() for slots in of_layer]
            np.testing.assert_allclose(count_reads(now, config)[b], np.mean(counts), rtol=1e-6)
            for layer, of_layer in reads.items():
                marks = np.asarray(now.method_state.mark_reads(layer, now.cache, config))[b]
                found = [set(np.flatnonzero(marks[n * len(marks) // config.num_heads])) for n in range(len(of_layer))]
                assert found == of_layer


@pytest.mark.parametrize(
    ("config", "kv_cache_dtype"), [(MODEL, "auto"), (SHARED_KV, "auto"), (SHARED_KV, "int8")],
    ids=["own KV", "shared KV", "shared KV, 8 bits"],
)  # fmt: skip
@pytest.mark.parametrize("method", COVERING.values(), ids=COVERING)
def test_a_budget_that_covers_the_text_is_dense(method, config, kv_cache_dtype):
    rows, how = random_rows(12, more=4), {"config": config, "kv_cache_dtype": kv_cache_dtype}
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    logits, states = decode(rows, prefill_rows(prompts, method=method, **how)[1], 4, config=config)
    expected, dense = decode(rows, prefill_rows(prompts, method=None, **how)[1], 4, config=config)
    np.testing.assert_allclose(logits, expected, atol=SAME, rtol=0)
    np.testing.assert_allclose(count_reads(states[-1], config), count_reads(dense[-1], config))


@pytest.mark.parametrize(("name", "config"), [*((name, MODEL) for name in METHODS), ("h2o", SHARED_KV)])
def test_idle_rows_change_nothing(name, config):
    method, _ = METHODS[name]
    rows = random_rows(13, more=4)
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    expected, _ = decode(rows, prefill_rows(prompts, method=method, config=config)[1], 4, config=config)
    state = prefill_rows(prompts, method=method, config=config)[1]
    idle = jnp.arange(len(rows)) % 2 == 0
    for step in range(4):
        for is_active in (idle, ~idle):  # the even rows, then the odd rows
            tokens = jnp.asarray([row[n + step] for row, n in zip(rows, LENGTHS, strict=True)], jnp.int32)
            logits, state = decode_step(params(config), tokens, state, config=config, is_active=is_active)
            np.testing.assert_allclose(
                np.asarray(logits)[is_active], expected[step][np.asarray(is_active)], atol=SAME, rtol=0
            )


@pytest.mark.parametrize("name", METHODS)
def test_a_second_prefill_goes_on_where_the_first_ended(name):
    # The lists may differ from a single prefill, because each prefill knows less. The cache still holds every token.
    method, _ = METHODS[name]
    (row,) = random_rows(14, lengths=(30,), more=2)
    _, state = prefill_rows([row[:20]], method=method)
    tokens, lengths = jnp.asarray(row[None, 20:30]), jnp.asarray([10], jnp.int32)
    _, state = prefill(params(), tokens, lengths, state, config=MODEL, method=method)
    assert state.cache.lengths.tolist() == [30]
    logits, state = decode_step(params(), jnp.asarray(row[30:31]), state, config=MODEL)
    assert np.isfinite(logits).all()
    reads = state.method_state.mark_reads(MODEL.num_layers - 1, state.cache, MODEL)
    assert reads[:, :, 30].all(), "the current token is read"


def test_the_attention_that_slots_receive_does_not_depend_on_chunks():
    (row,) = random_rows(15, lengths=(100,))
    method = H2O(num_heavy=8, num_recent=4)
    _, whole = prefill_rows([row], method=method, capacity=256)
    _, state = prefill_rows([row[:64]], method=method, capacity=256)
    tokens, lengths = jnp.asarray(row[None, 64:]), jnp.asarray([36], jnp.int32)
    _, parts = prefill(params(), tokens, lengths, state, config=MODEL, method=method)
    assert isinstance(whole.method_state, ListState)
    assert isinstance(parts.method_state, ListState)
    for one, other in zip(whole.method_state.memory, parts.method_state.memory, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    # The weights of every query sum to one.
    np.testing.assert_allclose(np.asarray(whole.method_state.memory).sum(axis=-1), 100, rtol=1e-4)


@pytest.mark.parametrize("method", [Quest(num_pages=3), H2O(num_heavy=7), SnapKV(num_critical=7)])
def test_one_compiled_program_chooses_the_lists_of_every_layer(method):
    of_a_layer: Any = _list_prompt
    jax.clear_caches()  # another file may have compiled the same program
    before = of_a_layer._cache_size()
    prefill_rows(random_rows(20), method=method)
    assert of_a_layer._cache_size() == before + 1, "what each layer writes would be held at once"


def test_an_answer_that_outgrows_snapkvs_room_still_reads_the_current_token():
    method = SnapKV(num_critical=4, num_observed=2, max_new_tokens=3)
    (row,) = random_rows(16, lengths=(20,), more=6)
    _, states = decode([row], prefill_rows([row[:20]], method=method)[1], 6, lengths=[20])
    for step, state in enumerate(states):
        marks = np.asarray(state.method_state.mark_reads(0, state.cache, MODEL))
        assert marks[:, :, 20 + step].all()


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_traced_once_and_the_state_is_donated(name):
    method, _ = METHODS[name]
    state: DecodeState = init_state(MODEL, 2, 256, method=method)
    jax.clear_caches()  # another file may have compiled the same program
    before = decode_step._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    for token in range(3):
        held = state
        _, state = decode_step(params(), jnp.full((2,), token), state, config=MODEL)
        assert held.cache.keys[0].is_deleted()
    assert decode_step._cache_size() == before + 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: StreamingLLM(num_sinks=-1), "num_sinks=-1 must be at least 0"),
        (lambda: StreamingLLM(num_recent=0), "num_recent=0 must be at least 1"),
        (lambda: H2O(num_heavy=0), "num_heavy=0 must be at least 1"),
        (lambda: Quest(page_size=0), "page_size=0 must be at least 1"),
        (
            lambda: SnapKV(num_critical=2.5),  # pyright: ignore[reportArgumentType]
            "num_critical=2.5 must be at least 1, a whole number",
        ),
        (lambda: SnapKV(max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (lambda: SnapKV(kernel_size=4), "kernel_size=4 must be odd"),
        (
            lambda: Quest(lists_per="layer"),  # pyright: ignore[reportArgumentType]
            "lists_per='layer' must be one of",
        ),
    ],
)
def test_invalid_settings_are_refused(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        settings()
