"""The compile clock counts compile time once and only inside the `with` block. It counts no running time."""

import time

import jax
import jax.numpy as jnp

from hshare_jax.compile_clock import CompileClock, compile_clock


def test_compiling_is_counted_and_running_is_not():
    function = jax.jit(lambda x: jnp.tanh(x @ x).sum())
    x = jnp.ones((8, 8))
    with compile_clock() as clock:
        assert clock.seconds == 0
        began = time.perf_counter()
        function(x).block_until_ready()
        first = clock.seconds
        assert 0 < first <= time.perf_counter() - began
        function(x).block_until_ready()
        assert clock.seconds == first


def test_a_clock_stops_with_its_block():
    with compile_clock() as clock:
        pass
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
    assert clock.seconds == 0


def test_nested_reports_count_once(monkeypatch):
    now = iter([1.0, 2.0, 2.5, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = CompileClock()
    clock._record("/jax/core/compile/inner", 0.5)  # 0.5 to 1
    clock._record("/jax/core/compile/inner", 0.5)  # 1.5 to 2
    clock._record("/jax/core/compile/outer", 2.25)  # 0.25 to 2.5, around both
    assert clock.seconds == 2.25
    clock._record("/jax/core/compile/other", 1.0)
    assert clock.seconds == 3.25
    clock._record("/jax/something/else", 5.0)
    assert clock.seconds == 3.25
