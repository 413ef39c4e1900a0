"""The time that JAX spends tracing and compiling, so that speeds can be reported without it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax.monitoring


class CompileClock:
    """Adds up the time that JAX reports for tracing, lowering and compiling. Nested reports count once."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def _record(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile"):
            now = time.perf_counter()
            # A function jitted inside another one reports first. The outer report covers its time too.
            self._spans = [span for span in self._spans if span[0] < now - duration_secs]
            self._spans.append((now - duration_secs, now))

    @property
    def seconds(self) -> float:
        """The time spent so far."""
        return sum((end - start for start, end in self._spans), 0.0)


@contextmanager
def compile_clock() -> Iterator[CompileClock]:
    """Runs a clock inside the with block, and yields it."""
    clock = CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock._record)
    try:
        yield clock
    finally:
        jax.monitoring.unregister_event_duration_listener(clock._record)
