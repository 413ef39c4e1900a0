"""The state of decoding: the arrays that it holds, the arguments that are refused, and the tokens that a step reads."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_decoder import MODEL, TAILED, vary

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH, LOW
from hshare_jax.methods.base import identity_plan
from hshare_jax.methods.hshare.channels import check_channels
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import EMPTY

F32 = 1e-5  # relative, on means of whole numbers
L, K, H = MODEL.num_layers, MODEL.num_kv_heads, MODEL.head_dim
PLAN = SharePlan(((0, 1, 2), (3, 4, 5), (3, 7, 8), (3, 7, 7)))
COPIES_DENSE = SharePlan(((0, 1, 2), (0, 4, 5), (6, 7, 8), (9, 10, 11)))
CHANNELS = np.stack([np.random.default_rng(1).permutation(H)[:5] for _ in range(L * K)]).reshape(L, K, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"capacity": 0}, "capacity=0 must lie between 1 and the model's max_positions=1024"),
        ({"capacity": 1025}, "capacity=1025 must lie between 1 and the model's max_positions=1024"),
        ({"dtype": jnp.int32}, "dtype='int32' must be one of 'float32', 'bfloat16', 'float16'"),
        (
            {"method": dataclasses.replace(TAILED, plan=SharePlan(((0, 1), (2, 3))))},
            "the plan is for 2 layers of 2 lists; this model with lists_per='kv_head' has 4 layers of 3",
        ),
        (
            {"method": dataclasses.replace(TAILED, plan=COPIES_DENSE)},
            "the plan copies from the first 1 layers, which are dense and have no lists",
        ),
        ({"method": vary(TAILED, label_channels=9)}, "label_channels=9 must be at most"),
        (
            {"method": dataclasses.replace(TAILED, channels=CHANNELS[1:])},
            r"channels has shape \[3, 3, 5\]; this model needs \[4, 3\] heads",
        ),
    ],
)
def test_invalid_arguments_of_a_state_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        init_state(MODEL, **({"batch_size": 1, "capacity": 8} | arguments))


def test_channels_under_exact_scoring_are_refused():
    with pytest.raises(ValueError, match="channels were given, but scoring='exact' reads keys and has no labels"):
        dataclasses.replace(vary(TAILED, scoring="exact"), channels=CHANNELS)


@pytest.mark.parametrize("shape", [(L, K), (L, K, 2), (L, K + 1, 5), (L - 1, K, 5), (1, L, K, 5)])
def test_channels_of_another_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"this model needs \[4, 3\] heads with at least label_channels=3 channels each"
    ):
        check_channels(np.tile(np.arange(shape[-1]), (*shape[:-1], 1)), MODEL, 3)


@pytest.mark.parametrize("channels", [(0, 1, 1), (-1, 0, 1), (0, 1, H)])
def test_channels_that_a_head_does_not_have_are_refused(channels):
    given = CHANNELS.copy()
    given[2, 1, :3] = channels
    with pytest.raises(ValueError, match=r"channels must be different numbers in \[0, head_dim=8\) for every head"):
        check_channels(given, MODEL, 3)


@pytest.mark.parametrize("num_channels", [1, 3, 5])
def test_the_first_given_channels_are_used_in_ascending_order(num_channels):
    # A calibration ranks all channels. The setting `label_channels` takes the first.
    found = check_channels(jnp.asarray(CHANNELS), MODEL, num_channels)
    np.testing.assert_array_equal(found, np.sort(CHANNELS[:, :, :num_channels], axis=-1))


def shared_of(method=TAILED, batch_size=2, **settings):
    shared = init_state(MODEL, batch_size, 300, method=method, **settings).method_state
    assert isinstance(shared, SharedLists)
    return shared


def test_a_given_plan_and_given_channels_are_used_in_every_row():
    shared = shared_of(dataclasses.replace(TAILED, plan=PLAN, channels=CHANNELS))
    assert shared.plan == PLAN
    assert shared.source.tolist() == [list(map(list, PLAN.source))] * 2
    np.testing.assert_array_equal(shared.channels, np.tile(np.sort(CHANNELS[:, :, :3], axis=-1), (2, 1, 1, 1)))


def test_an_empty_state_shares_nothing_and_lists_nothing():
    shared = shared_of()
    assert shared.plan is None
    np.testing.assert_array_equal(shared.source, identity_plan(2, L, K))
    assert shared.token_indices.shape == (L, 2, K, TAILED.settings.num_critical)
    assert (np.asarray(shared.token_indices) == EMPTY).all()
    assert shared.tails[0] is None  # layer 0 is dense
    for tail in shared.tails[1:]:
        assert tail is not None
        np.testing.assert_array_equal(tail.terms[..., [LOW, HIGH]], np.float32(MASKED))


@pytest.mark.parametrize("rank", [0, 2])
def test_tails_have_as_many_virtual_tokens_as_the_setting_says(rank):
    for tail in shared_of(vary(TAILED, tail_rank=rank), dtype=jnp.bfloat16).tails[1:]:
        assert tail is not None
        assert tail.keys.shape == tail.values.shape == (2, MODEL.num_heads, 1 + rank, H)
        assert tail.keys.dtype == tail.values.dtype == jnp.bfloat16
        assert (tail.terms.shape, tail.terms.dtype) == ((2, MODEL.num_heads, 6 + rank), jnp.float32)


def test_without_the_setting_no_layer_has_a_tail():
    assert shared_of(vary(TAILED, tail=None)).tails == (None,) * L


@pytest.mark.parametrize(
    ("bits", "codes", "dtype"), [(4, 2, "uint8"), (8, 3, "uint8"), (None, 3, "bfloat16")], ids=["4", "8", "None"]
)
def test_labels_take_as_many_bits_as_the_setting_says(bits, codes, dtype):
    method = vary(TAILED, label_bits=bits, dense_layers=2)
    labels = shared_of(method, dtype=jnp.bfloat16).labels
    assert labels[:2] == (None, None)  # dense layers have no labels
    for of_layer in labels[2:]:
        assert of_layer is not None
        assert (of_layer.codes.shape, of_layer.codes.dtype) == ((2, K, codes, 512), jnp.dtype(dtype))
        if bits is None:
            assert of_layer.scales is None
        else:
            assert of_layer.scales is not None
            assert (of_layer.scales.shape, of_layer.scales.dtype) == ((2, K, 2, 512), jnp.bfloat16)


def test_exact_scoring_keeps_no_labels():
    assert shared_of(vary(TAILED, scoring="exact")).labels == (None,) * L


WINDOWED = dataclasses.replace(MODEL, windows=(None, 20, 9, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dense_layers": 0},
        {"dense_layers": 2, "min_length": 30, "lists_per": "query_head"},
        {"min_length": 1000},
        {"budget_ratio": Fraction(1, 4)},
        {"tail": None},
        {"tail_rank": 2, "lists_per": "query_head"},
    ],
)
@pytest.mark.parametrize("config", [MODEL, WINDOWED], ids=["no windows", "windows"])
def test_reads_equal_the_definition(config, changes):
    # Lists are empty, partly filled or full. Recent ranges overlap the sinks, or have grown as long as they may be. The
    # heads of a list share its tokens, but each has a tail of its own.
    method: HShare = vary(TAILED, **changes)
    settings = method.settings
    rng = np.random.default_rng(2)
    lengths, starts = [1, 5, 8, 14, 60, 200], [0, 1, 3, 10, 54, 196]
    B, J, C = len(lengths), settings.num_lists(MODEL), settings.num_critical
    rank = settings.tail_rank
    tail_size = 0 if settings.tail is None else 1 + rank + (6 + rank) / (2 * H)  # in tokens of 2 * H numbers
    lists = np.full((L, B, J, C), EMPTY, np.int32)
    source = np.tile(np.arange(L * J).reshape(1, L, J), (B, 1, 1))
    for b, first in enumerate(starts):
        for layer, j in np.ndindex(L, J):
            tokens = np.sort(rng.permutation(np.arange(2, max(first, 2)))[: rng.integers(0, C + 1)])
            lists[layer, b, j, : len(tokens)] = tokens
            if layer >= 2:
                source[b, layer, j] = rng.integers(J, layer * J)
    state = init_state(config, B, 256, method=method)
    assert isinstance(state.method_state, SharedLists)
    # Tails whose terms are zeros weigh something, so they count.
    tails = tuple(
        None if tail is None else dataclasses.replace(tail, terms=jnp.zeros_like(tail.terms))
        for tail in state.method_state.tails
    )
    state = DecodeState(
        dataclasses.replace(state.cache, lengths=jnp.asarray(lengths)),
        dataclasses.replace(
            state.method_state, token_indices=jnp.asarray(lists), source=jnp.asarray(source, jnp.int32),
            recent_start=jnp.asarray(starts), tails=tails,
        ),
    )  # fmt: skip
    found = jax.jit(count_reads, static_argnums=1)(state, config)
    for b, length in enumerate(lengths):
        counts = []
        for layer in range(L):
            seen = oracle.dense_reads(length, config.windows[layer])
            if layer < settings.num_dense or length < settings.dense_below:
                counts.append(len(seen))
                continue
            through_plan = [lists[int(unit) // J, b, int(unit) % J].tolist() for unit in source[b, layer]]
            of_lists = [
                len(oracle.shared_reads(listed, settings.num_sinks, starts[b], seen)) for listed in through_plan
            ]
            reads = np.mean(of_lists)
            counts.append(reads + tail_size * MODEL.num_heads / J if reads < len(seen) else reads)
        np.testing.assert_allclose(found[b], np.mean(counts), rtol=F32)


@pytest.mark.parametrize("config", [MODEL, WINDOWED], ids=["no windows", "windows"])
def test_dense_decoding_reads_all_that_its_windows_hold(config):
    state = init_state(config, 3, 256)
    lengths = [1, 10, 100]
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, lengths=jnp.asarray(lengths)))
    expected = [np.mean([len(oracle.dense_reads(n, window)) for window in config.windows]) for n in lengths]
    np.testing.assert_allclose(count_reads(state, config), expected, rtol=F32)
