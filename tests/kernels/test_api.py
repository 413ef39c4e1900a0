"""The operations and the table of their implementations: names, refusals, and what a program traces and imports."""

import dataclasses
import functools
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tiny_decoder import HSHARE, MODEL, params

import hshare_jax
from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.errors import SettingError
from hshare_jax.kernels import api
from hshare_jax.kernels.implementations import IMPLEMENTATIONS, Implementation
from hshare_jax.shapes import EMPTY

B, N, K, S, H, C = 2, 4, 2, 32, 8, 5
OPERATIONS = {
    "attention": ("dense_decode", "sparse_decode"),
    "selection": ("select_by_labels", "select_by_keys"),
}


def dense_case():
    rng = np.random.default_rng(1)
    q, keys, values = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((B, N, H), (B, K, S, H), (B, K, S, H))
    )
    return q, keys, values, jnp.asarray([3, S])


def parameters(function):
    return dict(inspect.signature(inspect.unwrap(function)).parameters)


# --- the table


def test_the_names_are_auto_and_those_of_the_table():
    assert list(api.IMPLS) == ["auto", *IMPLEMENTATIONS]


def test_on_each_platform_at_most_one_implementation_is_automatic():
    platforms = [platform for row in IMPLEMENTATIONS.values() if row.is_automatic for platform in row.platforms]
    assert len(platforms) == len(set(platforms))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", OPERATIONS)
def test_each_implementation_takes_the_arguments_of_the_api_and_its_own_options(name, kind):
    row = IMPLEMENTATIONS[name]
    for operation in OPERATIONS[kind]:
        expected = {k: v for k, v in parameters(getattr(api, operation)).items() if k != "impl"}
        found = parameters(getattr(getattr(row, kind), operation))
        assert list(found)[: len(expected)] == list(expected)
        for parameter, described in expected.items():
            assert (found[parameter].kind, found[parameter].default) == (described.kind, described.default)
        more = {k: v for k, v in found.items() if k not in expected}
        assert set(row.options) <= set(more)
        assert all(v.kind is v.KEYWORD_ONLY and v.default is not v.empty for v in more.values())


def test_no_module_above_the_kernels_imports_an_implementation():
    prefixes = "|".join(sorted({row.prefix for row in IMPLEMENTATIONS.values()}))
    folder = Path(hshare_jax.__file__).parent
    above = [path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] != "kernels"]
    assert len(above) > 20
    name = rf"({prefixes})_(attention|selection|appending|projection|prefill|library)\b"
    imports = re.compile(rf"import.*\b{name}|kernels\.{name}")
    assert not [path for path in above if imports.search(path.read_text(encoding="utf-8"))]


def test_a_further_implementation_is_two_modules_and_a_row(monkeypatch):
    def dense_decode(q, keys, values, lengths, *, window, scale):
        return jnp.full_like(q, scale)

    module = types.ModuleType("hshare_jax.kernels.constant_attention")
    monkeypatch.setattr(module, "dense_decode", dense_decode, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = Implementation("constant", platforms=("cpu",), is_automatic=True, options={"scale": 3})
    monkeypatch.setitem(IMPLEMENTATIONS, "constant", row)
    assert (api.dense_decode(*dense_case()) == 3).all()
    assert (api.dense_decode(*dense_case(), impl="reference") != 3).any()
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 1, "cuda"))):
        text = jax.jit(api.dense_decode).trace(*dense_case()).lower(lowering_platforms=("cuda",)).as_text()
    assert "decode_attention" in text


# --- refusals


def test_an_unknown_implementation_is_refused_with_the_names_that_there_are():
    with pytest.raises(SettingError, match="impl='magic' must be one of 'auto', 'pallas', 'native', 'reference', 'int"):
        api.check_impl("magic")
    with pytest.raises(SettingError, match="impl='magic' must be one of"):
        api.dense_decode(*dense_case(), impl="magic")


def test_pallas_is_refused_on_a_cpu_with_a_way_out():
    with pytest.raises(SettingError) as refusal:
        api.check_impl("pallas")
    assert str(refusal.value) == (
        "impl='pallas' runs on NVIDIA GPUs, and this program is for cpu: "
        "leave it 'auto', or use 'interpret' to try the kernels, slowly"
    )


def test_an_implementation_that_cannot_run_is_refused_while_tracing():
    state = init_state(MODEL, 1, 8)
    with pytest.raises(ValueError, match="impl='pallas' runs on NVIDIA GPUs, and this program is for cpu"):
        decode_step(params(), jnp.zeros((1,), jnp.int32), state, config=MODEL, impl="pallas")
    with pytest.raises(ValueError, match="impl='magic' must be one of 'auto', 'pallas'"):
        decode_step(params(), jnp.zeros((1,), jnp.int32), state, config=MODEL, impl="magic")


# --- what is traced and imported


@pytest.mark.usefixtures("unchecked")
def test_on_a_cpu_auto_adds_nothing_to_what_it_takes():
    state, tokens = init_state(MODEL, 1, 8, method=HSHARE), jnp.zeros((1,), jnp.int32)
    taken = api.describe("auto").split()[0]
    auto, plain = (
        decode_step.lower(params(), tokens, state, config=MODEL, impl=impl).as_text() for impl in ("auto", taken)
    )
    # A branch around each layer's attention, as platform_dependent leaves it, costs half of the speed.
    assert auto.count("stablehlo.case") == plain.count("stablehlo.case")
    assert auto.count(" = ") == plain.count(" = ")


TRACE_EVERYTHING = """
import functools, sys
import jax, jax.numpy as jnp
from hshare_jax.kernels import api
from hshare_jax.kernels.labels import make_labels
q, cache, lengths = jnp.ones((1, 2, 8)), jnp.ones((1, 2, 32, 8)), jnp.asarray([9])
lists, source, due = jnp.zeros((1, 1, 2, 3), jnp.int32), jnp.asarray([[[0, 1]]]), jnp.asarray([True])
competing = (source, due, lengths - 8, lengths, None)
labels = jax.eval_shape(lambda: make_labels(cache, jnp.zeros((1, 2, 8), jnp.int32), 4))
for impl in ("auto", "reference"):
    api.check_impl(impl)
    trace = lambda operation, *arrays, **more: jax.eval_shape(functools.partial(operation, impl=impl, **more), *arrays)
    trace(api.dense_decode, q, cache, cache, lengths)
    decode = functools.partial(api.sparse_decode, layer=0, lengths=lengths, recent_start=lengths - 4)
    trace(decode, q, cache, cache, lists, source, num_sinks=1, max_recent=4)
    trace(lambda labels, impl: api.select_by_labels(lists, 0, q, labels, *competing, impl=impl), labels)
    trace(lambda q, impl: api.select_by_keys(lists, 0, q, cache, *competing, impl=impl), q)
print(sorted(name for name in sys.modules if "experimental.pallas" in name or "kernels.pallas" in name))
"""


def test_on_a_cpu_auto_and_reference_import_no_pallas():
    root = Path(hshare_jax.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", TRACE_EVERYTHING], cwd=root, capture_output=True, text=True, check=False
    )
    assert found.stdout == "[]\n", found.stderr


# --- checks of what is read


@dataclasses.dataclass(frozen=True)
class Outside:
    """A value that points outside, and the message about it."""

    name: str
    value: int
    message: str


@pytest.mark.parametrize(
    "outside",
    [
        Outside("lists", S, rf"lists must hold slots in \[0, {S}\)"),
        Outside("source", 4, r"source must lie in \[0, 4\)"),
        Outside("lengths", -1, "lengths must be at least 0"),
    ],
    ids=lambda outside: outside.name,
)
@jax.enable_checks(True)
def test_checkify_reports_what_points_outside(outside):
    q, keys, values, lengths = dense_case()
    lists, source = jnp.full((2, B, K, C), EMPTY), jnp.zeros((B, 2, K), jnp.int32)
    arrays = {"q": q, "keys": keys, "values": values, "lists": lists, "source": source, "lengths": lengths}
    decode = functools.partial(
        api.sparse_decode, layer=1, recent_start=jnp.zeros((B,), jnp.int32), num_sinks=2, max_recent=S
    )
    checked = checkify.checkify(jax.jit(lambda arrays: decode(**arrays)))
    checked(arrays)[0].throw()
    array = np.array(arrays[outside.name])
    array.flat[1] = outside.value
    with pytest.raises(checkify.JaxRuntimeError, match=outside.message):
        checked(arrays | {outside.name: jnp.asarray(array)})[0].throw()
