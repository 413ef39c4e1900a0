"""Generation gives the same tokens in every batch and stream, ends rows where it should, and refuses mistakes early."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from program_text import compile_for_users, count_copies
from tiny_decoder import HSHARE, MODEL, params, vary
from tiny_tokenizer import LETTERS, byte_tokenizer
from transformers import AddedToken

from hshare_jax.calibration import find_plans
from hshare_jax.decode_loop import NO_TOKEN, LoopState, decode_tokens
from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.teacher_forcing import token_agreement
from hshare_jax.generate import generate, stream
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill
from hshare_jax.prompts import choose_capacity
from hshare_jax.sampling import SamplingParams

SHALLOW = dataclasses.replace(MODEL, num_layers=2, windows=(None,) * 2)
TOKENIZER = byte_tokenizer(LETTERS)
MODEL_OF_TEXT = Model(SHALLOW, params(SHALLOW), TOKENIZER, (), "tiny", "0" * 16)
MODEL_OF_IDS = dataclasses.replace(MODEL_OF_TEXT, tokenizer=None)
# Texts of about 5, 20 and 60 tokens. One is shorter than sinks and recent tokens, two exceed the budget of 12.
PROMPTS = ["there", "in the end, an inn.", "the rain in spain stays mainly in the plain, or so it is said."]
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95)
NEW = 20


@pytest.fixture(scope="module")
def greedy():
    return generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW)


def test_the_tokenizer_fits_the_model():
    assert len(TOKENIZER) <= SHALLOW.vocab_size


def test_generated_tokens_equal_a_loop_of_steps(greedy):
    for prompt, found in zip(PROMPTS, greedy.tokens, strict=True):
        ids = jnp.asarray([TOKENIZER(prompt)["input_ids"]], jnp.int32)
        state = init_state(SHALLOW, 1, 256, method=HSHARE)
        logits, state = prefill(params(SHALLOW), ids, jnp.asarray([ids.size]), state, config=SHALLOW, method=HSHARE)
        tokens = [int(logits[0].argmax())]
        while len(tokens) < NEW:
            logits, state = decode_step(params(SHALLOW), jnp.asarray(tokens[-1:]), state, config=SHALLOW)
            tokens.append(int(logits[0].argmax()))
        assert found == tokens


def test_texts_are_the_tokens_decoded(greedy):
    assert greedy.texts == [TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in greedy.tokens]
    assert greedy.finish_reasons == ["length"] * 3


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("hshare", [None, HSHARE], ids=["dense", "shared"])
def test_a_batch_of_different_lengths_equals_each_prompt_alone(hshare, sampling):
    settings: dict[str, Any] = {"method": hshare, "sampling": sampling, "max_new_tokens": NEW}
    together = generate(MODEL_OF_TEXT, PROMPTS, seeds=[3, 1, 4], **settings)
    for b, seed in enumerate([3, 1, 4]):
        alone = generate(MODEL_OF_TEXT, PROMPTS[b : b + 1], seeds=[seed], **settings)
        assert alone.tokens == together.tokens[b : b + 1]


def test_pieces_of_a_stream_join_to_the_generation(greedy):
    cases: list[dict[str, Any]] = [
        {},
        {"stop": [greedy.texts[2][1:3]]},
        {"sampling": SAMPLED, "seeds": [5, 5, 5]},
    ]
    for settings in cases:
        *pieces, last = stream(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW, **settings)
        result = last.result
        assert result is not None
        assert [piece.result for piece in pieces] == [None] * len(pieces)
        expected = generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW, **settings)
        assert len(pieces) > 1
        assert all(any(piece.texts) for piece in pieces)
        rows = zip(*(piece.texts for piece in (*pieces, last)), strict=True)
        assert ["".join(texts) for texts in rows] == result.texts == expected.texts
        assert result.tokens == expected.tokens
        assert result.finish_reasons == expected.finish_reasons


def test_seeds_tell_rows_apart_and_make_them_repeat():
    settings: dict[str, Any] = {"method": None, "sampling": SAMPLED, "max_new_tokens": NEW}
    one = generate(MODEL_OF_TEXT, [PROMPTS[0]] * 3, seeds=[1, 2, 1], **settings).tokens
    assert one[0] == one[2] != one[1]
    assert generate(MODEL_OF_TEXT, [PROMPTS[0]] * 3, **settings).tokens[1:] == [
        *generate(MODEL_OF_TEXT, [PROMPTS[0]] * 3, seeds=[9, 1, 2], **settings).tokens[1:]
    ]


def test_a_stop_string_ends_its_row_and_is_left_out(greedy):
    stop = greedy.texts[1][4:7]  # three characters, across tokens
    found = generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW, stop=[stop, "never there"])
    for text, whole, reason in zip(found.texts, greedy.texts, found.finish_reasons, strict=True):
        assert text == (whole[: whole.find(stop)] if stop in whole else whole)
        assert reason == ("stop" if stop in whole else "length")
    assert found.finish_reasons[1] == "stop"
    assert "length" in found.finish_reasons
    for tokens, whole in zip(found.tokens, greedy.tokens, strict=True):
        assert tokens == whole[: len(tokens)]


def test_a_stop_string_in_the_first_token_ends_its_row_before_any_step(monkeypatch, greedy):
    module = importlib.import_module("hshare_jax.generate")
    monkeypatch.setattr(module, "decode_tokens", None)
    first = str(TOKENIZER.decode(greedy.tokens[1][:1]))
    found = generate(MODEL_OF_TEXT, PROMPTS[1:2], method=HSHARE, seeds=[1], max_new_tokens=NEW, stop=[first])
    assert (found.texts, found.finish_reasons, found.tokens) == ([""], ["stop"], [greedy.tokens[1][:1]])
    assert (found.usage.reads, found.usage.selections, found.usage.mean_length) == ([0], 0, 0)


def test_a_stop_string_that_is_a_special_token_ends_its_row(greedy):
    tokens = greedy.tokens[1]
    place = next(i for i in range(3, NEW) if tokens[i] not in tokens[:i])
    tokenizer = byte_tokenizer(LETTERS)
    name = str(tokenizer.convert_ids_to_tokens(tokens[place]))
    tokenizer.add_tokens([AddedToken(name, special=True)], special_tokens=True)
    prompt = [TOKENIZER(PROMPTS[1])["input_ids"]]
    model = dataclasses.replace(MODEL_OF_TEXT, tokenizer=tokenizer)
    found = generate(model, prompt, method=HSHARE, seeds=[1], max_new_tokens=NEW, stop=[name])
    assert (found.tokens, found.finish_reasons) == ([tokens[: place + 1]], ["stop"])
    assert found.texts == [TOKENIZER.decode(tokens[:place])]


def test_an_end_token_ends_its_row(greedy):
    # The end token is the first id of the second row that is new at step 3 or later, so that some steps go before it.
    tokens = greedy.tokens[1]
    place = next(i for i in range(3, NEW) if tokens[i] not in tokens[:i])
    model = dataclasses.replace(MODEL_OF_TEXT, eos_token_ids=(tokens[place], 47))
    found = generate(model, PROMPTS, method=HSHARE, max_new_tokens=NEW)
    assert found.tokens[1] == tokens[: place + 1]
    assert found.finish_reasons[1] == "stop"
    for row, whole, reason in zip(found.tokens, greedy.tokens, found.finish_reasons, strict=True):
        ends = [i for i, token in enumerate(whole) if token in model.eos_token_ids]
        assert row == whole[: ends[0] + 1 if ends else NEW]
        assert reason == ("stop" if ends else "length")


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5])
def test_the_number_of_new_tokens_is_exact(greedy, max_new_tokens):
    # Blocks have three steps. The surplus steps of the last block are dropped.
    found = generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=max_new_tokens)
    assert found.tokens == [tokens[:max_new_tokens] for tokens in greedy.tokens]
    assert found.timing.decoded_tokens == 3 * (max_new_tokens - 1)
    assert found.timing.prompt_tokens == sum(len(TOKENIZER(prompt)["input_ids"]) for prompt in PROMPTS)


BUDGET = HSHARE.settings
# The sparse layer has three lists, and the second copies the first.
COPYING = SharePlan(((0, 1, 2), (3, 3, 5)))


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, top_k=4)])
def test_weights_that_are_no_numbers_end_a_generation_with_an_error(sampling):
    scale = {"scale": jnp.full_like(MODEL_OF_IDS.params["final_norm"]["scale"], jnp.nan)}
    broken = dataclasses.replace(MODEL_OF_IDS, params={**MODEL_OF_IDS.params, "final_norm": scale})
    with pytest.raises(FloatingPointError, match="tiny are no finite numbers after 0 new tokens of row 0, "):
        generate(broken, [[1, 2, 3]], max_new_tokens=4, sampling=sampling)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_row_that_meets_a_damaged_weight_later_is_named(value):
    prompts = [[1, 2, 3], [4, 5]]
    tokens = generate(MODEL_OF_IDS, prompts, max_new_tokens=3, method=None).tokens
    assert tokens[1][0] not in (*prompts[0], *prompts[1], *tokens[0])
    embedding = MODEL_OF_IDS.params["embedding"].at[tokens[1][0], 0].set(value)
    broken = dataclasses.replace(MODEL_OF_IDS, params={**MODEL_OF_IDS.params, "embedding": embedding})
    with pytest.raises(FloatingPointError, match="after 1 new tokens of row 1"):
        generate(broken, prompts, max_new_tokens=3, method=None)


def reads_of_step(length: int, at_refresh: int) -> float:
    """The tokens read, as the mean over a dense layer and a layer that chose its lists at `at_refresh` tokens."""
    start = max(at_refresh - 4, 0)
    return (length + min(start, 2) + min(max(start - 2, 0), 6) + length - start) / 2


@pytest.mark.parametrize("new", [1, 2, NEW])
def test_usage_counts_reads_and_choices(new):
    found = generate(MODEL_OF_TEXT, PROMPTS, method=HShare(BUDGET, plan=COPYING), max_new_tokens=new).usage
    by_row, lengths = [], []
    for prompt in PROMPTS:
        size = len(TOKENIZER(prompt)["input_ids"])
        lengths += [size + step for step in range(1, new)]
        by_row.append([reads_of_step(size + step, size + step - (step - 1) % 3) for step in range(1, new)])
    reads = sum(by_row, [])  # noqa: RUF017 (three rows)
    refreshes = 3 * len(range(1, new, 3))
    assert found.refreshes == refreshes
    assert found.selections == 2 * refreshes
    assert found.possible_selections == 3 * len(lengths)
    assert found.mean_length == pytest.approx(sum(lengths) / max(len(lengths), 1))
    # The counts are float32 sums of some 50 numbers.
    assert found.reads == pytest.approx([sum(row) / max(len(row), 1) for row in by_row], rel=1e-6)
    assert found.mean_reads == pytest.approx(sum(reads) / max(len(reads), 1), rel=1e-6)


def test_dense_decoding_reads_all_and_chooses_nothing():
    found = generate(MODEL_OF_TEXT, PROMPTS, method=None, max_new_tokens=NEW).usage
    assert found.mean_reads == pytest.approx(found.mean_length, rel=1e-6)
    assert (found.refreshes, found.selections) == (0, 0)


def test_a_row_that_ends_early_counts_only_its_own_steps(greedy):
    end = greedy.tokens[1][4]
    model = dataclasses.replace(MODEL_OF_TEXT, eos_token_ids=(end,))
    found = generate(model, PROMPTS, method=None, max_new_tokens=NEW)
    steps = [(len(TOKENIZER(p)["input_ids"]), len(t) - 1) for p, t in zip(PROMPTS, found.tokens, strict=True)]
    lengths = [size + step for size, num_steps in steps for step in range(1, num_steps + 1)]
    assert len(lengths) < 3 * (NEW - 1)
    assert found.usage.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert found.usage.mean_reads == pytest.approx(sum(lengths) / len(lengths), rel=1e-6)


def test_a_plan_given_beforehand_decodes_as_the_same_plan_found():
    (plan,) = find_plans(MODEL_OF_TEXT, PROMPTS[2:], method=HSHARE)
    found = generate(MODEL_OF_TEXT, PROMPTS[2:], method=HSHARE, max_new_tokens=NEW)
    given = generate(MODEL_OF_TEXT, PROMPTS[2:], method=dataclasses.replace(HSHARE, plan=plan), max_new_tokens=NEW)
    assert given.tokens == found.tokens
    assert given.usage == found.usage


def test_channels_given_beforehand_are_used():
    L, K, H = SHALLOW.num_layers, SHALLOW.num_kv_heads, SHALLOW.head_dim
    whole = vary(HSHARE, label_channels=H, label_bits=None, num_critical=8)
    exact = vary(whole, scoring="exact")
    expected = generate(MODEL_OF_TEXT, PROMPTS[2:], method=exact, max_new_tokens=NEW)
    channels = np.tile(np.arange(H)[::-1], (L, K, 1))
    known = dataclasses.replace(whole, channels=channels)
    given = generate(MODEL_OF_TEXT, PROMPTS[2:], method=known, max_new_tokens=NEW)
    assert given.tokens == expected.tokens
    with pytest.raises(ValueError, match=r"channels has shape \[2, 3, 2\]"):
        generate(MODEL_OF_TEXT, PROMPTS[2:], method=dataclasses.replace(HSHARE, channels=channels[:, :, :2]))


def test_a_large_repetition_penalty_repeats_nothing():
    sampling = SamplingParams(repetition_penalty=1e6)
    prompt = [5, 6, 7, 8]
    found = generate(MODEL_OF_IDS, [prompt, prompt[:2]], method=None, sampling=sampling, max_new_tokens=NEW)
    for given, tokens in zip([prompt, prompt[:2]], found.tokens, strict=True):
        assert len({*given, *tokens}) == len(given) + NEW
    assert found.texts == []


def test_a_larger_cache_changes_no_token(greedy):
    found = generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW, capacity=600)
    assert found.tokens == greedy.tokens


def test_the_second_call_compiles_nothing(greedy):
    timing = generate(MODEL_OF_TEXT, PROMPTS, method=HSHARE, max_new_tokens=NEW).timing
    assert timing.compile_seconds == 0
    assert timing.prefill_seconds > 0
    assert timing.decode_seconds > 0
    assert timing.decode_rate == 3 * (NEW - 1) / timing.decode_seconds
    assert timing.prefill_rate == timing.prompt_tokens / timing.prefill_seconds


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, r"prompts=\[\] must be a sequence of at least one prompt; put a single one in a list"),
        ("there", {}, "prompts='there' must be a sequence of at least one prompt"),
        (b"there", {}, "prompts=b'there' must be a sequence of at least one prompt"),
        (
            [b"there"],
            {},
            r"prompts\[0\] must be a str or a sequence of token ids, whole numbers: bytes are no token ids",
        ),
        (
            [[1], [1.0, 2.5]],
            {},
            r"prompts\[1\] must be a str or a sequence of token ids, whole numbers: 'float' object",
        ),
        (np.array([1, 2]), {}, r"prompts\[0\] must be a str or a sequence of token ids"),
        ([np.array([1.0])], {}, r"prompts\[0\] must be a str or a sequence of token ids"),
        ([[1], []], {}, r"prompts\[1\] is empty; it must hold at least one token"),
        ([[1, 48]], {}, r"prompts\[0\] holds token id 48; ids must lie in \[0, vocab_size=48\)"),
        ([[1, -2]], {}, r"prompts\[0\] holds token id -2"),
        (["there"], {}, r"prompts\[0\] is text, but the model has no tokenizer; give token ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (
            [[1], [1] * 1000],
            {"max_new_tokens": 25},
            r"max_new_tokens=25 is too much after the 1000 tokens of prompts\[1\]: .* model's 1024 positions "
            r"\(max_position_embeddings\); shorten",
        ),
        ([[1] * 30], {"capacity": 40, "max_new_tokens": 11}, r"capacity=40 must be at least 41: prompts\[0\] and max"),
        ([[1], [2]], {"seeds": [1]}, "seeds has 1 entries; it needs one for each of the 2 prompts"),
        (7, {}, "prompts=7 must be a sequence of at least one prompt"),
        ([[1]], {"seeds": [1.5]}, r"seeds=\[1.5\] must be whole numbers"),
        ([[1]], {"capacity": "x"}, "capacity='x' must be at least 1, a whole number"),
        ([[1]], {"stop": [1]}, r"stop=\[1\] must be a sequence of strings"),
        ([[1]], {"stop": ["a"]}, "stop strings need a model with a tokenizer; this one has none, so use its end tok"),
    ],
)
def test_mistakes_are_refused_before_anything_is_computed(monkeypatch, unchecked, prompts, settings, message):
    module = importlib.import_module("hshare_jax.generate")  # the package's attribute of this name is the function
    monkeypatch.setattr(module, "prefill_prompts", None)
    monkeypatch.setattr(module, "state_for", None)
    with pytest.raises(ValueError, match=message):
        generate(MODEL_OF_IDS, prompts, **settings)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop holds an empty string, which would end every row at once; leave it out"):
        generate(MODEL_OF_TEXT, PROMPTS, stop=["a", ""])


def test_text_that_is_not_unicode_is_refused(monkeypatch):
    module = importlib.import_module("hshare_jax.generate")
    monkeypatch.setattr(module, "state_for", None)
    with pytest.raises(
        ValueError, match=r"prompts\[1\] is not UTF-8 text \(character 3 is U\+DCE9, half a character\)"
    ):
        stream(MODEL_OF_TEXT, ["there", "caf\udce9"])
    with pytest.raises(ValueError, match=r"stop\[0\] is not UTF-8 text"):
        generate(MODEL_OF_TEXT, PROMPTS, stop=["\udce9"])


def test_streaming_needs_a_tokenizer_and_says_so_at_once():
    with pytest.raises(ValueError, match="stream needs a model with a tokenizer; this one has none, so use generate"):
        stream(MODEL_OF_IDS, [[1]])


def test_a_stream_refuses_a_plan_and_channels_at_once():
    with pytest.raises(ValueError, match="the plan is for 1 layers of 3 lists"):
        stream(MODEL_OF_TEXT, ["there"], method=dataclasses.replace(HSHARE, plan=SharePlan(((0, 1, 2),))))
    known = dataclasses.replace(HSHARE, channels=np.zeros((1, 1, 1), np.int32))
    with pytest.raises(ValueError, match="channels has shape"):
        stream(MODEL_OF_TEXT, ["there"], method=known)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 500, 1000, 1023, 1024])
def test_a_chosen_capacity_holds_the_row_and_is_a_coarse_step(size):
    capacity = choose_capacity(SHALLOW, [[0], [0] * (size - 1)] if size > 1 else [[]], 1, None)
    assert size <= capacity <= min(max(size + 255, size * 5 // 4), SHALLOW.max_positions)
    assert capacity % 256 == 0


@pytest.mark.parametrize("hshare", [None, vary(HSHARE, num_critical=120)], ids=["dense", "covering"])
def test_methods_that_read_all_tokens_agree_with_dense_in_full(hshare):
    dense = generate(MODEL_OF_TEXT, PROMPTS, method=None, max_new_tokens=NEW)
    ragged = [dense.tokens[0], dense.tokens[1][:2], dense.tokens[2][:7]]
    assert token_agreement(MODEL_OF_TEXT, PROMPTS, ragged, method=hshare) == [1.0] * 3


def test_agreement_is_the_fraction_of_steps_that_choose_the_continuations_token():
    dense = generate(MODEL_OF_TEXT, PROMPTS[:1], method=None, max_new_tokens=NEW).tokens[0]
    # The last token is compared but never read, so changing it costs one of 19 steps.
    changed = [*dense[:-1], (dense[-1] + 1) % SHALLOW.vocab_size]
    assert token_agreement(MODEL_OF_TEXT, PROMPTS[:1], [changed], method=None) == [pytest.approx(18 / 19)]


@pytest.mark.parametrize("continuations", [[[1, 2]], [[1, 2], [3]], [[1, 2], [3, 4], [5, 6]]])
def test_agreement_needs_two_tokens_for_each_prompt(continuations):
    with pytest.raises(ValueError, match="continuations must hold at least 2 tokens for each of the 2 prompts"):
        token_agreement(MODEL_OF_IDS, [[1], [2]], continuations, method=None)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("hshare", [None, HSHARE], ids=["dense", "shared"])
def test_the_compiled_loop_updates_its_buffers_in_place(hshare, batch):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        state = init_state(SHALLOW, batch, 256, method=hshare)
        loop = LoopState(
            state=state,
            token=jnp.zeros((batch,), jnp.int32),
            output=jnp.full((batch, 64), NO_TOKEN, jnp.int32),
            count=jnp.zeros((batch,), jnp.int32),
            is_active=jnp.ones((batch,), bool),
            seen=None,
            random_keys=jax.random.split(jax.random.key(0), batch),
            reads=jnp.zeros((batch,), jnp.float32),
        )
        one = jnp.int32(1)
        lowered = decode_tokens.lower(
            params(SHALLOW), loop, one, one[None], one, config=SHALLOW, sampling=SamplingParams(), impl="auto"
        )
        compiled = compile_for_users(lowered)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    # The scales of labels, [B, K, 2, S], are left out, because dense scores, [B, K, G, S], have the same shape here.
    shared = []
    if isinstance(state.method_state, SharedLists):
        labels = [label.codes for label in state.method_state.labels if label is not None]
        shared = [state.method_state.token_indices, *labels]
    buffers = [*jax.tree.leaves((state.cache.keys, state.cache.values)), *shared]
    text = compiled.as_text()
    assert text is not None
    assert count_copies(text, buffers) == 0
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= sum(array.nbytes for array in buffers)


def test_a_prompt_of_another_length_compiles_nothing():
    compiled = []

    def count(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    generate(MODEL_OF_IDS, [[1] * 17, [2] * 5], method=HSHARE, max_new_tokens=3)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        generate(MODEL_OF_IDS, [[1] * 23, [2] * 9], method=HSHARE, max_new_tokens=4)
        assert not compiled, "a process that lives long would compile without end"
        generate(MODEL_OF_IDS, [[1] * 23] * 5, method=HSHARE, max_new_tokens=4)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
