"""Calibration: channels and plans equal the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params
from tiny_decoder import oracle_rows, vary

from hshare_jax.calibration import calibrate, find_plans
from hshare_jax.decode_state import init_state
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.hshare.share_plan import to_share_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.models.pretrained import Model, ModelFiles
from hshare_jax.prefill import prefill, read_prompt

MODEL = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, max_positions=1024,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
PARAMS = random_params(MODEL)
MODEL_OF_IDS = Model(MODEL, PARAMS, None, (), "tiny", "0" * 16)
FILES = ModelFiles(MODEL, None, (), "tiny", "float32", lambda dtype, quantize, mesh: iter(()))
L, K, N, H = MODEL.num_layers, MODEL.num_kv_heads, MODEL.num_heads, MODEL.head_dim
# The budget is 12, and half of the lists of the last two layers copy.
HSHARE = HShare(
    HShareSettings(num_sinks=2, num_critical=6, num_recent=4, label_channels=3, dense_layers=1, min_length=0),
    PlanSearch(num_probes=5),
).with_sharing_ratio("1/2-1-1/2")
PUBLISHED = vary(HSHARE, plan_kind="published", lists_per="query_head")
BLOCK = 40
TEXT = np.random.default_rng(11).integers(0, MODEL.vocab_size, 2 * BLOCK + 7).tolist()


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(MODEL_OF_IDS, [TEXT], method=HSHARE, block_length=BLOCK)


def queries_and_keys(ids: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each layer the rotated (queries [T, N, H], keys [T, K, H]) of one block, from one plain forward pass."""
    found = []

    def attend(layer, q, k, v, state):
        found.append((np.asarray(q[0]), np.asarray(k[0])))
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(1, -1, K, N // K, H), k) * H**-0.5
        is_past = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None, None, None]
        weights = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf), axis=-1)
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape), state

    places = jnp.arange(len(ids), dtype=jnp.int32)[None]
    Decoder(MODEL).apply({"params": PARAMS}, jnp.asarray([ids], jnp.int32), places, attend, None)
    return found


def test_channels_are_ranked_by_the_mean_product_over_all_pairs_of_all_blocks(calibrated):
    total, num_pairs = np.zeros((L, K, H)), 0
    for start in range(0, len(TEXT), BLOCK):
        block = TEXT[start : start + BLOCK]
        num_pairs += len(block) ** 2
        for layer, (q, k) in enumerate(queries_and_keys(block)):
            for n in range(N):
                total[layer, n // (N // K)] += np.abs(q[:, None, n] * k[None, :, n // (N // K)]).sum(axis=(0, 1))
    mean = total / num_pairs
    np.testing.assert_array_equal(np.sort(calibrated.channels, axis=-1), np.tile(np.arange(H), (L, K, 1)))
    ranked = np.take_along_axis(mean, calibrated.channels, axis=-1)
    # Sums in float32 may swap two channels that are this close.
    assert (np.diff(ranked, axis=-1) <= 1e-5 * ranked[..., 1:]).all()
    assert calibrated.num_tokens == len(TEXT)


@pytest.mark.parametrize("tail", [None, "fitted"])
def test_where_nothing_is_shared_the_plan_lets_every_list_choose(tail):
    single = vary(HSHARE.with_sharing_ratio("1-1-1"), tail=tail)
    found = calibrate(MODEL_OF_IDS, [TEXT], method=single, block_length=BLOCK)
    assert found.plan.is_computed.all()


def test_only_the_pass_that_finds_the_plan_keeps_probes(monkeypatch):
    kept = []

    def read(*args, **how):
        kept.append(args[4].shape[1])
        return read_prompt(*args, **how)

    monkeypatch.setattr("hshare_jax.calibration.read_prompt", read)
    calibrate(MODEL_OF_IDS, [TEXT[:BLOCK]], method=HSHARE, block_length=BLOCK)
    assert kept == [0, HSHARE.search.num_probes]


@pytest.mark.parametrize("method", [HSHARE, PUBLISHED], ids=["units", "published"])
def test_the_plan_of_one_block_equals_the_plan_of_its_prefill(method):
    found = calibrate(MODEL_OF_IDS, [TEXT[:BLOCK]], method=method, block_length=BLOCK)
    known = dataclasses.replace(method, channels=found.channels)
    state = init_state(MODEL, 1, BLOCK, method=known)
    tokens, lengths = jnp.asarray([TEXT[:BLOCK]], jnp.int32), jnp.asarray([BLOCK], jnp.int32)
    _, state = prefill(PARAMS, tokens, lengths, state, config=MODEL, method=known)
    assert isinstance(state.method_state, SharedLists)
    assert found.plan == to_share_plan(np.asarray(state.method_state.source[0]))
    assert any(unit != place for place, unit in enumerate(sum(found.plan.source, ())))
    assert find_plans(MODEL_OF_IDS, [TEXT[:BLOCK]], method=known) == [found.plan]


@pytest.mark.parametrize(
    "method",
    [HSHARE, PUBLISHED, vary(HSHARE, plan_kind="anchors")],
    ids=["units", "published", "anchors"],
)
def test_the_plan_of_several_blocks_is_found_from_the_mean_over_all_probes(method):
    # Labels keep all channels, so the order of channels does not matter. The last block has fewer probes.
    method = vary(method, label_channels=H, num_probes="all")
    blocks = [TEXT[:BLOCK], TEXT[BLOCK : 2 * BLOCK], TEXT[20:46]]
    rows = oracle_rows([np.asarray(block) for block in blocks], method, MODEL, tail=False)
    counts = [len(block) - method.settings.first_probe for block in blocks]
    assert len(set(counts)) == 2

    def mean(*of_blocks):
        return np.average(of_blocks, axis=0, weights=counts)

    similarity = jax.tree.map(mean, *(row.similarity for row in rows))
    expected = [[layer * len(lists) + j for layer, j in lists] for lists in rows[0].find_plan(similarity)]
    texts = [blocks[0] + blocks[1], blocks[2]]
    found = calibrate(MODEL_OF_IDS, texts, method=method, block_length=BLOCK)
    assert [list(layer) for layer in found.plan.source] == expected
    flat = [unit for layer in expected for unit in layer]
    assert flat != list(range(len(flat)))
    if method.search.plan_kind == "units":  # the other kinds have few plans to choose from
        assert any(row.find_plan(row.similarity) != rows[0].find_plan(similarity) for row in rows)


def test_a_last_block_without_probes_does_not_change_the_plan(calibrated):
    # The last block has 7 tokens, and the first probe needs 18.
    whole = calibrate(MODEL_OF_IDS, [TEXT, TEXT[:BLOCK]], method=HSHARE, block_length=BLOCK, max_blocks=3)
    assert whole.plan == calibrated.plan
    np.testing.assert_array_equal(whole.channels, calibrated.channels)


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([TEXT[:17]], {}, "the longest block has 17 tokens; a plan needs 18, with which there are twice as many"),
        (
            [TEXT],
            {"block_length": 17},
            "block_length=17 must lie between 18, so that a plan can be found, and the model's",
        ),
        ([TEXT], {"block_length": 1025}, "block_length=1025 must lie between 18, .* model's 1024 positions"),
        ([TEXT], {"max_blocks": 0}, "max_blocks=0 must be at least 1, or None for all"),
        ([], {}, "must be a sequence of at least one prompt"),
        (["words"], {}, "is text, but the model has no tokenizer"),
    ],
)
def test_mistakes_are_refused_before_anything_is_computed(monkeypatch, texts, settings, message):
    monkeypatch.setattr("hshare_jax.calibration.read_prompt", None)
    with pytest.raises(ValueError, match=message):
        calibrate(MODEL_OF_IDS, texts, method=HSHARE, **settings)
