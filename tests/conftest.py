"""What every test runs under: the CPU unless asked otherwise, strict ranks, and reproducible property tests."""

import os

# Before jax is imported: the same tests on every machine. Where there is a GPU, JAX_PLATFORMS=cuda runs its tests too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# A shape that broadcasts by accident is the commonest silent error in attention code; ranks must be matched in writing.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, and no deadlines: an example's first call compiles, the next ones take microseconds.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `gpu` where JAX runs on something else."""
    is_marked = [item for item in items if item.get_closest_marker("gpu")]
    if is_marked and jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs a GPU: run with JAX_PLATFORMS=cuda on a machine that has one")
        for item in is_marked:
            item.add_marker(skip)
