"""Cross-layer KV sharing: decoding token by token defines the model, and all parallel computations equal it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from random_weights import random_params
from tiny_decoder import MODEL, oracle_row, params, random_rows

from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder, parameter_shapes
from hshare_jax.models.kv_sharing import layer_passes, papers_prefill_cost
from hshare_jax.models.layers import qkv_rows
from hshare_jax.prefill import prefill
from hshare_jax.training.attention import causal_attend

F32 = 1e-4  # absolute, on float32 logits of about 5, against float64
DEEP = 5e-4  # the same after 70 tokens: looking up makes a model as deep as the text is long, so errors add up
SAME = 1e-5  # between two float32 programs of the same model, relative to the greatest logit
T = 14
# The maps of the nine names for six layers, three of them KV layers (tests/models/test_kv_sharing.py).
NINE = {
    "pizza-bottom": (0, 1, 2, 2, 2, 2),
    "pizza-middle": (0, 1, 3, 3, 3, 3),
    "pizza-top": (0, 1, 5, 5, 5, 5),
    "sandwich-bottom": (0, 1, 1, 1, 1, 5),
    "sandwich-middle": (0, 2, 2, 2, 2, 5),
    "sandwich-top": (0, 4, 4, 4, 4, 5),
    "lasagna-bottom": (0, 1, 1, 1, 4, 4),
    "lasagna-middle": (0, 2, 2, 2, 5, 5),
    "lasagna-top": (0, 3, 3, 3, 5, 5),
}
every_configuration = pytest.mark.parametrize("kv_map", NINE.values(), ids=NINE)
# The configurations whose layers look up, one with each target and each pattern.
three_configurations = pytest.mark.parametrize(
    "kv_map", [NINE["pizza-top"], NINE["sandwich-middle"], NINE["lasagna-top"]]
)
OVERLAPPING = (0, 4, 5, 3, 4, 5)  # two groups that wait for one another, with an ordinary layer between
LOOKS_DOWN_WITHIN = (0, 3, 5, 3, 3, 5)  # layer 4 reads the keys and values that layer 3 writes in the same pass


def shared_model(kv_map, passes=(None, 1), **changes) -> ModelConfig:
    """A config with one layer per map entry, every third with a window. `passes` are (without, with) gradient."""
    windows = tuple(5 if layer % 3 == 2 else None for layer in range(len(kv_map)))
    return dataclasses.replace(
        MODEL, num_layers=len(kv_map), kv_layer_map=kv_map, windows=changes.pop("windows", windows),
        forward_passes=passes[0], backward_passes=passes[1], **changes,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config",))
def parallel(params: dict, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """The logits [B, T, V] of whole sequences, as training computes them."""
    places = jnp.tile(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], (tokens.shape[0], 1))
    decoder, variables = Decoder(config), {"params": params}
    hidden, _ = decoder.apply(variables, tokens, places, causal_attend(config), {})  # pyright: ignore[reportAssignmentType]
    return decoder.apply(variables, hidden, method="unembed")  # pyright: ignore[reportReturnType]


def sequential(config, tokens):
    """The logits [B, T, V] by decoding from an empty cache."""
    state, logits = init_state(config, tokens.shape[0], 256), []
    for t in range(tokens.shape[1]):
        out, state = decode_step(params(config), tokens[:, t], state, config=config)
        logits.append(np.asarray(out))
    return np.stack(logits, axis=1)


def assert_same(found, expected):
    """Fails unless two float32 programs gave the same logits."""
    np.testing.assert_allclose(found, expected, atol=SAME * np.abs(np.asarray(expected)).max(), rtol=0)


def random_tokens(seed: int, rows: int = 4, length: int = T) -> jax.Array:
    return jnp.asarray(np.stack(random_rows(seed, [length] * rows)))


def random_maps() -> st.SearchStrategy[tuple[int, ...]]:
    """Maps of six layers. The KV layers are layer 0 and any others. Each remaining layer reads any KV layer."""

    def of_layers(kv_layers):
        return st.tuples(
            *[st.just(layer) if layer in kv_layers else st.sampled_from(sorted(kv_layers)) for layer in range(6)]
        )

    return st.sets(st.integers(1, 5), max_size=4).map(lambda some: some | {0}).flatmap(of_layers)


@every_configuration
def test_decoding_token_by_token_equals_the_oracle_and_the_exact_parallel_forward(kv_map):
    config, tokens = shared_model(kv_map), random_tokens(1)
    found = sequential(config, tokens)
    row = oracle_row(config)
    expected = np.stack([row.dense_step(int(token)) for token in tokens[0]])
    np.testing.assert_allclose(found[0], expected, atol=F32, rtol=0)
    assert_same(parallel(params(config), tokens, config=config), found)
    # Prompts of different lengths and the steps after them are equal too.
    ends = jnp.asarray([1, 5, T - 1, 8], jnp.int32)
    logits, state = prefill(params(config), tokens, ends, init_state(config, 4, 256), config=config)
    assert_same(logits, found[jnp.arange(4), ends - 1])
    logits, _ = decode_step(params(config), tokens[jnp.arange(4), ends], state, config=config)
    assert_same(logits, found[jnp.arange(4), ends])


@settings(max_examples=8)
@given(kv_map=random_maps())
def test_any_valid_map_decodes_as_its_exact_parallel_forward(kv_map):
    config, tokens = shared_model(kv_map), random_tokens(2)
    expected = parallel(params(config), tokens, config=config)
    assert_same(sequential(config, tokens), expected)


@pytest.mark.parametrize("kv_map", [NINE["sandwich-middle"], LOOKS_DOWN_WITHIN])
def test_prompts_of_different_lengths_in_chunks_equal_the_oracle(kv_map):
    config, lengths = shared_model(kv_map), (1, 3, 70)  # the long one in two chunks, and the second starts anew
    rows = random_rows(3, lengths, more=2)
    tokens = np.zeros((3, 70), np.int32)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        tokens[b, :n] = row[:n]
    state = init_state(config, 3, 256)
    ends = jnp.asarray(lengths, jnp.int32)
    logits, state = prefill(params(config), jnp.asarray(tokens[:, :66]), jnp.minimum(ends, 66), state, config=config)
    # A second prefill reads the last tokens of the long row, and one more token of each other row.
    turn = jnp.asarray([[row[min(n, 66) + t] if min(n, 66) + t < len(row) else 0 for t in range(4)]
                        for row, n in zip(rows, lengths, strict=True)], jnp.int32)  # fmt: skip
    logits, state = prefill(params(config), turn, jnp.asarray([1, 1, 4], jnp.int32), state, config=config)
    for b, row in enumerate(rows):
        exact = oracle_row(config)
        read = [exact.dense_step(int(token)) for token in row[: int(state.cache.lengths[b])]]
        np.testing.assert_allclose(logits[b], read[-1], atol=DEEP, rtol=0)


@pytest.mark.parametrize(
    "kv_map",
    [(0, 3, 3, 3), OVERLAPPING, LOOKS_DOWN_WITHIN],
    ids=["one group", "groups that overlap", "looks down within"],
)
def test_after_p_passes_p_tokens_are_exact_and_the_rest_come_closer(kv_map):
    windows = (None,) * len(kv_map)
    exact_config, tokens = shared_model(kv_map, windows=windows), random_tokens(4)
    exact = np.asarray(parallel(params(exact_config), tokens, config=exact_config))
    errors = []
    for passes in (1, 3, 9):
        config = shared_model(kv_map, (passes - 1, 1), windows=windows)
        error = np.abs(np.asarray(parallel(params(config), tokens, config=config)) - exact).max(axis=(0, 2))
        assert error[:passes].max() <= SAME
        errors.append(error.max())
    print("greatest error after 1, 3, 9 passes:", *(f"{error:.1e}" for error in errors))
    assert errors[0] > errors[1] > errors[2]


@three_configurations
def test_seven_passes_and_two_come_far_closer_than_one(kv_map):
    windows, tokens = (None,) * 6, random_tokens(10, length=40)

    def logits_after(passes):
        config = shared_model(kv_map, passes, windows=windows)
        return np.asarray(parallel(params(config), tokens, config=config))

    exact = logits_after((None, 1))
    one, nine = (np.abs(logits_after(passes) - exact) for passes in ((0, 1), (7, 2)))
    print(f"mean error after 1 pass {one.mean():.1e}, after 7 + 2 {nine.mean():.1e}")
    assert nine[:, :9].max() <= SAME * np.abs(exact).max()
    assert nine.mean() <= one.mean() / 5


def assert_no_leak(config):
    """Fails unless changing a token changes the logits from its place on, and no earlier logits, keys or values."""
    rows, places = jnp.tile(random_tokens(5, rows=1), (4, 1)), (1, 5, T - 1)
    for b, t in enumerate(places, start=1):
        rows = rows.at[b, t].set((rows[b, t] + 1) % MODEL.vocab_size)
    logits = np.asarray(parallel(params(config), rows, config=config))
    for b, t in enumerate(places, start=1):
        np.testing.assert_array_equal(logits[b, :t], logits[0, :t])
        assert np.abs(logits[b, t:] - logits[0, t:]).max() > 1e-3
    whole = jnp.full((4,), T, jnp.int32)
    _, state = prefill(params(config), rows, whole, init_state(config, 4, 256), config=config)
    for keys in (*state.cache.keys, *state.cache.values):  # [B, K, S, H]
        for b, t in enumerate(places, start=1):
            np.testing.assert_array_equal(keys[b, :, :t], keys[0, :, :t])
    return rows, places, logits


@every_configuration
def test_no_token_changes_earlier_logits_or_cache(kv_map):
    assert_no_leak(shared_model(kv_map))


@three_configurations
def test_no_token_changes_earlier_logits_or_cache_in_seven_passes_and_two(kv_map):
    assert_no_leak(shared_model(kv_map, (7, 2)))


@pytest.mark.parametrize("passes", [(2, 1), (0, 2)], ids=["3 passes", "2 with gradient"])
@pytest.mark.parametrize("kv_map", [NINE["sandwich-middle"], OVERLAPPING])
def test_no_token_changes_earlier_logits_before_the_passes_converge(kv_map, passes):
    rows, places, logits = assert_no_leak(config := shared_model(kv_map, passes))
    # Padding behind the end of a prompt is not read.
    ends, state = jnp.asarray([8, *places], jnp.int32), init_state(config, 4, 256)
    cached, _ = prefill(params(config), rows, ends, state, config=config)
    np.testing.assert_array_equal(
        cached,
        prefill(
            params(config),
            jnp.where(jnp.arange(T)[None, :] < ends[:, None], rows, 0),
            ends,
            init_state(config, 4, 256),
            config=config,
        )[0],
    )
    for b, end in enumerate((8, *places)):
        assert_same(cached[b], logits[b, end - 1])


def test_the_identity_map_is_the_ordinary_model():
    identity = dataclasses.replace(MODEL, kv_layer_map=tuple(range(MODEL.num_layers)), forward_passes=7)
    assert identity == MODEL
    assert hash(identity) == hash(MODEL)


@pytest.mark.parametrize("kv_map", [(0, 1, 1, 1), (0, 0, 2, 2)])
def test_a_bottom_map_equals_an_ordinary_model_whose_keys_and_values_are_tied_by_hand(kv_map):
    config, tokens = shared_model(kv_map, windows=(None,) * 4), random_tokens(6)
    ordinary, tied = random_params(MODEL), params(config)
    for layer in set(range(4)) - set(kv_map):  # nothing reads the keys and values of these layers
        weight = ordinary[f"layers_{layer}"]["qkv"]["weight"]
        queries = tied[f"layers_{layer}"]["q"]["weight"]
        ordinary[f"layers_{layer}"]["qkv"]["weight"] = weight.at[qkv_rows(MODEL)[0]].set(queries)

    def attend(layer, q, k, v, state):
        state = {**state, layer: (k, v)}
        keys, values = state[kv_map[layer]]
        return jax.nn.dot_product_attention(q, keys, values, is_causal=True), state

    places = jnp.tile(jnp.arange(T)[None, :], (4, 1))
    decoder = Decoder(MODEL)
    hidden, _ = decoder.apply({"params": ordinary}, tokens, places, attend, {})
    expected = decoder.apply({"params": ordinary}, hidden, method="unembed")
    assert_same(parallel(tied, tokens, config=config), expected)


def mean_loss(params, tokens, config):
    logits = parallel(params, tokens[:, :-1], config=config)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("kv_map", [(0, 3, 3, 3), (0, 2, 2, 2)], ids=["top", "middle"])
def test_gradients_of_the_iterated_forward_are_its_finite_differences(kv_map):
    config = shared_model(kv_map, (0, 3), windows=(None,) * 4)  # every pass has a gradient
    tokens, weights, step = random_tokens(7, length=6), random_params(config), 3e-3
    loss = jax.jit(functools.partial(mean_loss, tokens=tokens, config=config))
    gradient = jax.grad(loss)(weights)
    for name, part in gradient.items():  # along the gradient of a layer, which is the steepest direction
        size = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(part)))

        def at(steps, name=name, part=part, size=size):
            moved = jax.tree.map(lambda a, g: a + steps * step * g / size, weights[name], part)
            return float(loss(weights | {name: moved}))

        slope = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)  # the error is of fourth order in the step
        np.testing.assert_allclose(slope, size, rtol=5e-4, err_msg=name)


@pytest.mark.parametrize(("backward", "has_gradient"), [(1, False), (2, True)])
def test_one_pass_with_gradient_gives_none_through_looked_up_keys(backward, has_gradient):
    # The attention of layer 2 is switched off, so its keys and values only matter to layer 1, which looks up.
    config, tokens = shared_model((0, 2, 2), (2, backward), windows=(None,) * 3), random_tokens(9, length=8)
    weights = random_params(config)
    weights["layers_2"]["out"]["weight"] = jnp.zeros_like(weights["layers_2"]["out"]["weight"])
    gradient = jax.grad(mean_loss)(weights, tokens, config)["layers_2"]["qkv"]["weight"]
    keys_values = np.asarray(gradient)[np.concatenate(qkv_rows(MODEL)[1:])]
    assert bool(np.abs(keys_values).max() > 0) == has_gradient


@pytest.mark.usefixtures("unchecked")
def test_memory_holds_the_passes_with_gradient_and_no_others():
    def temporaries(passes):
        config = shared_model((0, 2, 2), passes, windows=(None,) * 3)
        step = jax.jit(jax.grad(functools.partial(mean_loss, config=config)))
        memory = (
            step.lower(parameter_shapes(config), jax.ShapeDtypeStruct((2, 129), jnp.int32)).compile().memory_analysis()
        )
        assert memory is not None
        return memory.temp_size_in_bytes

    few = temporaries((3, 2))
    assert temporaries((60, 2)) == few
    assert temporaries((3, 9)) > 1.5 * few


def count_dots(jaxpr, shape) -> int:
    """Counts how often a traced program multiplies by a weight of this shape, in every round of a loop."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            count += any(variable.aval.shape == shape for variable in equation.invars)
        for inner in jaxprs_in_params(equation.params):
            count += count_dots(inner, shape) * equation.params.get("length", 1)
    return count


# Maps of 12 layers, 6 of them KV layers; the cost by the paper's formula (section 3.2); and our cost.
COSTS = {
    "pizza-bottom": ((0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5), 1, 1),
    "pizza-middle": ((0, 1, 2, 3, 4, 8, 8, 8, 8, 8, 8, 8), 44 / 12, 3),
    "pizza-top": ((0, 1, 2, 3, 4, 11, 11, 11, 11, 11, 11, 11), 68 / 12, 5),
    "sandwich-bottom": ((0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 10, 11), 1, 1),
    "sandwich-middle": ((0, 1, 2, 6, 6, 6, 6, 6, 6, 6, 10, 11), 44 / 12, 3),
    "sandwich-top": ((0, 1, 2, 9, 9, 9, 9, 9, 9, 9, 10, 11), 68 / 12, 5),
    "lasagna-bottom": ((0, 1, 1, 1, 4, 4, 6, 6, 8, 8, 10, 10), 1, 1),
    "lasagna-middle": ((0, 2, 2, 2, 5, 5, 7, 7, 9, 9, 11, 11), 9, 52 / 12),
    "lasagna-top": ((0, 3, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11), 9, 5),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("kv_map", "papers", "ours"), COSTS.values(), ids=COSTS)
def test_a_prefill_evaluates_as_many_layers_as_the_paper_counts_or_fewer(kv_map, papers, ours):
    # With this mlp_width, no other weight has the shape of the mlp's weight.
    config = shared_model(kv_map, (7, 2), windows=(None,) * 12, mlp_width=40)
    assert len(config.kv_layers) == 6
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    jaxpr = jax.make_jaxpr(functools.partial(parallel, config=config))(parameter_shapes(config), tokens)
    evaluations = count_dots(jaxpr.jaxpr, (2 * 40, MODEL.width)) / 12
    assert evaluations == ours <= papers
    assert sum(layer_passes(config, 64)) / 12 == ours
    assert papers_prefill_cost(config) == pytest.approx(papers)


@every_configuration
def test_layers_that_borrow_keys_and_values_save_their_cache_and_weights(kv_map):
    config = shared_model(kv_map)
    ordinary = dataclasses.replace(config, kv_layer_map=None)

    def cache_bytes(model):
        return sum(array.nbytes for array in jax.tree.leaves(init_state(model, 2, 256).cache.keys))

    assert cache_bytes(config) * 6 == cache_bytes(ordinary) * 3
    assert config.cache_bytes_per_token(4) * 6 == ordinary.cache_bytes_per_token(4) * 3
    sizes = [sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params(model))) for model in (config, ordinary)]
    keys_values = 2 * MODEL.num_kv_heads * MODEL.head_dim * MODEL.width
    assert sizes[1] - sizes[0] == 3 * keys_values
    assert sizes == [config.num_parameters, ordinary.num_parameters]
