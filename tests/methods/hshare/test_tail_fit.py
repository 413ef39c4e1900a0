"""The fit of the tail: what fitted tails add to the attention of later queries equals the definition in float64."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tail_oracle

from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH, LOW
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.tail_fit import fit_tail
from hshare_jax.shapes import EMPTY

F32 = 2e-5  # absolute, on attention of size 1 with scores up to about 10
LARGE = 2e-4  # with scores up to about 100, whose float32 rounding is ten times larger
BF16 = 1e-2  # two units in the last place of a value of size 1 in bfloat16
SETTINGS = HShareSettings(num_sinks=2, num_critical=4, num_recent=3, dense_layers=0)
B, N, K, S, H, L, P, LAYER = 3, 6, 3, 48, 8, 2, 9, 1
# Row 0 has as many probes as there are places, row 1 has fewer, and row 2 has none.
POSITIONS = [[12, 14, 18, 22, 25, 30, 31, 38, 39], [12, 16, 17, 20], []]
CACHED = [40, 21, 9]


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of `fit_tail`, as NumPy arrays in float32, and queries to try the tails on."""

    queries: np.ndarray  # [B, P, N, H]
    listed: np.ndarray  # [P, L, B, J, C]
    source: np.ndarray  # [B, J]
    positions: np.ndarray  # [B, P]
    keys: np.ndarray  # [B, K, S, H]
    values: np.ndarray  # [B, K, S, H]
    later: np.ndarray  # [B, tries, N, H]
    settings: HShareSettings = SETTINGS
    window: int | None = None
    looks_up: bool = False
    rank: int = 0

    @property
    def cached(self):
        """Tokens of each row."""
        return np.array(CACHED, np.int32)

    def sees(self, length):
        """The slots that the layer sees from position length - 1."""
        return oracle.dense_reads(length, self.window) - ({length - 1} if self.looks_up else set())

    def reads(self, b, n, i, length):
        """The slots that a head reads through the lists of probe i, in a row of this length."""
        J = self.source.shape[1]
        layer, j = divmod(int(self.source[b, n // (N // J)]), J)
        listed = self.listed[i, layer, b, j].tolist()
        return oracle.shared_reads(
            listed, self.settings.num_sinks, length - self.settings.num_recent, self.sees(length)
        )


def make(seed=1, positions=POSITIONS, *, num_lists=K, size=1.0, **others):
    """A case of random numbers. Each probe lists random slots between sinks and recent tokens."""
    rng = np.random.default_rng(seed)
    places = np.full((B, P), -1, np.int32)
    for b, of_row in enumerate(positions):
        places[b, : len(of_row)] = of_row
    listed = np.full((P + 2, L, B, num_lists, SETTINGS.num_critical), EMPTY, np.int32)  # P is rounded up to groups
    for i, layer, b, j in np.ndindex(P, L, B, num_lists):
        candidates = np.arange(SETTINGS.num_sinks, int(places[b, i]) + 1 - SETTINGS.num_recent)
        if len(candidates) > 0:
            found = np.sort(rng.permutation(candidates)[: rng.integers(0, SETTINGS.num_critical + 1)])
            listed[i, layer, b, j, : len(found)] = found
    queries, later = (rng.standard_normal((B, num, N, H)) * size for num in (P, 5))
    keys, values = rng.standard_normal((2, B, K, S, H)) + 0.5  # what lies past a row's tokens is left from before
    queries, later, keys, values = (array.astype(np.float32) for array in (queries, later, keys, values))
    queries = np.where((places >= 0)[..., None, None], queries, 0)
    source = rng.integers(0, L * num_lists, (B, num_lists)).astype(np.int32)
    return Case(queries, listed, source, places, keys, values, later, **others)


def fitted(case, dtype=jnp.float32):
    """The tails of the library: keys, values and terms."""
    queries, keys, values = (jnp.asarray(array, dtype) for array in (case.queries, case.keys, case.values))
    listed, source, positions, cached = map(jnp.asarray, (case.listed, case.source, case.positions, case.cached))
    tail = fit_tail(
        queries, listed, source, positions, cached, keys, values,
        None, jnp.zeros((B, K, 0), jnp.int32),  # labels and channels are for pools
        settings=dataclasses.replace(case.settings, tail_rank=case.rank), window=case.window, looks_up=case.looks_up,
    )  # fmt: skip
    assert {tail.keys.dtype, tail.values.dtype} == {jnp.dtype(dtype)}
    return tuple(np.asarray(array, np.float64) for array in (tail.keys, tail.values, tail.terms))


def defined(case):
    """The tails of the definition: keys, values and terms."""
    tails, group = [], N // K
    for b, n in np.ndindex(B, N):
        keys, values = (array[b, n // group, : CACHED[b]].astype(np.float64) for array in (case.keys, case.values))
        probes = [
            tail_oracle.probe(
                case.queries[b, i, n].astype(np.float64), keys, values, case.reads(b, n, i, p + 1), case.sees(p + 1)
            )
            for i, p in enumerate(case.positions[b].tolist())
            if p >= 0
        ]
        mean_key = tail_oracle.mean_middle_key(keys, case.settings.num_sinks, case.settings.num_recent, case.window)
        tails.append(tail_oracle.fit(probes, mean_key, case.rank))
    return tuple(np.stack(arrays).reshape(B, N, *arrays[0].shape) for arrays in zip(*tails, strict=True))


def attend(case, tail, *, at_probes=False):
    """The attention [B, tries, N, H] of the later queries at the end of each row, with these tails.

    There every head reads the last slot that it sees too, because a head that reads nothing has no score. `at_probes`
    gives the attention [B, P, N, H] of the probes themselves.
    """
    queries = case.queries if at_probes else case.later
    out, keys, values = np.zeros(queries.shape), case.keys.astype(np.float64), case.values.astype(np.float64)
    for b, i in np.ndindex(queries.shape[:2]):
        length = int(case.positions[b, i]) + 1 if at_probes else CACHED[b]
        if length == 0:
            continue
        seen = case.sees(length)
        reads = [case.reads(b, n, i, length) | (set() if at_probes else {max(seen)}) for n in range(N)]
        out[b, i] = oracle.attention_with_tail(
            queries[b, i].astype(np.float64), keys[b], values[b], reads, seen, *(array[b] for array in tail)
        )
    return out


def dense(case):
    """The attention [B, P, N, H] of the probes over all slots that they see."""
    everything = dataclasses.replace(case, settings=dataclasses.replace(case.settings, num_recent=S))
    return attend(everything, nothing(case), at_probes=True)


def nothing(case):
    """Tails that add nothing."""
    tails = tail_oracle.no_tail(H, case.rank)
    return tuple(np.broadcast_to(array, (B, N, *array.shape)) for array in tails)


CASES = {
    "rank 0": make(1),
    "rank 2": make(2, rank=2),
    "rank 2, a list for each query head": make(3, num_lists=N, rank=2),
    "window": make(4, window=14, num_lists=N),
    "rank 2, window": make(5, window=20, rank=2),
    "looks up": make(6, looks_up=True),
    "looks up, window": make(7, looks_up=True, window=15, rank=2),
    "one recent token, no sinks, looks up": make(
        8, looks_up=True, settings=dataclasses.replace(SETTINGS, num_sinks=0, num_recent=1), rank=2
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention_with_fitted_tails_equals_the_definition(case):
    expected = attend(case, defined(case))
    np.testing.assert_allclose(attend(case, fitted(case)), expected, atol=F32, rtol=0)
    changed = np.abs(expected - attend(case, nothing(case))).max(axis=(1, 2, 3))
    assert (changed[:2] > 1000 * F32).all()
    assert changed[2] == 0  # the row without probes


@hypothesis.given(data=st.data(), seed=st.integers(0, 2**32 - 1), size=st.sampled_from([0.0, 0.1, 1.0]))
def test_attention_with_tails_of_any_probes_equals_the_definition(data, seed, size):
    # At size 0 all queries are equal. A row may have no probe, one, or more. A feature of few probes may vary by little
    # more than float32's rounding, and then other queries' weights are guesses. So the probes themselves are compared.
    positions = [data.draw(st.sets(st.integers(8, length - 1), max_size=P)) if length > 9 else [] for length in CACHED]
    case = make(seed, [sorted(of_row) for of_row in positions], size=size)
    found, expected = (attend(case, tail, at_probes=True) for tail in (fitted(case), defined(case)))
    np.testing.assert_allclose(found, expected, atol=F32, rtol=0)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_a_tail_of_a_single_probe_makes_its_attention_dense(rank, size):
    case = make(9, [[39], [20], []], rank=rank, size=size)
    np.testing.assert_allclose(attend(case, fitted(case), at_probes=True), dense(case), atol=F32, rtol=0)


def test_no_more_directions_are_found_than_probes_tell():
    # Two probes differ in one direction. What float32 finds beside it is rounding, and is left out.
    case = make(10, [[20, 30], [13, 14], []], size=10.0, rank=2)
    keys, _, terms = fitted(case)
    assert (keys[:, :, 1] == 0).all()
    assert (terms[..., 6] == 0).all()
    assert (np.abs(keys[:2, :, 2]).max(axis=-1) > 0).any()
    np.testing.assert_allclose(attend(case, fitted(case)), attend(case, defined(case)), atol=LARGE, rtol=0)


def test_equal_queries_move_no_value():
    case = make(11, rank=2, size=3.0)
    is_probe = (case.positions >= 0)[..., None, None]
    case = dataclasses.replace(case, queries=np.where(is_probe, case.queries[:, :1], 0))
    keys, _, _ = fitted(case)
    assert (keys[:, :, 1:] == 0).all()
    found, expected = (attend(case, tail, at_probes=True) for tail in (fitted(case), defined(case)))
    np.testing.assert_allclose(found, expected, atol=F32, rtol=0)


def test_heads_that_leave_nothing_unread_have_no_tail():
    case = make(12, rank=2, settings=dataclasses.replace(SETTINGS, num_recent=S))
    keys, values, terms = fitted(case)
    assert (terms[..., LOW : HIGH + 1] == np.float32(MASKED)).all()
    for array in (keys, values, np.delete(terms, (LOW, HIGH), axis=-1)):
        assert (array == 0).all()


def test_rows_without_a_probe_have_no_tail():
    case = make(13, rank=2)
    terms = fitted(case)[2]
    assert (terms[2, :, LOW : HIGH + 1] == np.float32(MASKED)).all()
    assert (terms[:2, :, LOW] > -100).all()


def test_probes_that_read_nothing_do_not_count():
    # Without sinks and with empty lists, a layer that looks up does not see what the only recent token is.
    case = make(14, looks_up=True, settings=dataclasses.replace(SETTINGS, num_sinks=0, num_recent=1))
    listed = case.listed.copy()
    listed[::2] = EMPTY
    case = dataclasses.replace(case, listed=listed)
    assert case.reads(0, 0, 0, 13) == set()
    np.testing.assert_allclose(attend(case, fitted(case)), attend(case, defined(case)), atol=F32, rtol=0)
    without = fitted(dataclasses.replace(case, listed=np.full_like(listed, EMPTY)))
    assert (without[2][..., LOW : HIGH + 1] == np.float32(MASKED)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [300.0, 1e4])  # scores of about 1,000, and of about 30,000
def test_extreme_queries_give_finite_tails(size, dtype):
    case = make(15, size=size, rank=2)
    tail = fitted(case, dtype)
    for array in (*tail, attend(case, tail)):
        assert np.isfinite(array).all()


def test_a_tail_in_bfloat16_is_close_to_the_tail_in_float32():
    # The queries have a large common part, as those of real models have. A rounded key shifts all scores by the same.
    case = make(16, rank=2)
    common = np.random.default_rng(17).standard_normal((N, H)).astype(np.float32) * 6
    queries = np.where((case.positions >= 0)[..., None, None], case.queries + common, 0)
    rounded = [
        np.asarray(jnp.asarray(array, jnp.bfloat16).astype(jnp.float32))
        for array in (queries, case.later + common, case.keys, case.values)
    ]
    case = dataclasses.replace(case, **dict(zip(("queries", "later", "keys", "values"), rounded, strict=True)))
    found = attend(case, fitted(case, jnp.bfloat16))
    np.testing.assert_allclose(found, attend(case, fitted(case)), atol=BF16, rtol=0)
