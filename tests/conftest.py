"""What every test runs under: the CPU unless asked otherwise, strict ranks, and reproducible property tests."""

import os

# Before jax is imported: the same tests on every machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Thousands of small programs are compiled and run for microseconds each: no optimisation by LLVM is less time. With
# XLA_FLAGS= (empty) they are compiled as users' programs are, in twice the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax
import jaxtyping
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


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Drops what a file's tests compiled: each program is some memory mappings, and Linux allows a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the command line's compile cache out of the other tests of this process."""
    # By name: a module that is imported before the hook of jaxtyping goes unchecked.
    monkeypatch.setattr("hshare_jax.cli.options.keep_compiled_programs", lambda directory: None)


@pytest.fixture(scope="session")
def cached_model() -> None:
    """Fetches and converts the built-in model, so that no test sees that first start."""
    from hshare_jax.models import pretrained  # not before the hook of jaxtyping

    pretrained.open_model("smollm2-135m-instruct")


@pytest.fixture
def unchecked():
    """Switches type checks off: for wrong values, and for what jax puts into states that it only describes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
