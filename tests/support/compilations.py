"""A counter of the programs that XLA compiles."""

import jax
import jax.monitoring


class Compilations:
    """Counts the programs that XLA compiles inside the `with` block."""

    def __init__(self):
        self.count = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __enter__(self):
        jax.monitoring.register_event_duration_secs_listener(self)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self)
