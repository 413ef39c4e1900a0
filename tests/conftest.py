"""Settings of every test run: the CPU unless asked otherwise, strict ranks, and reproducible property tests."""

import os
from pathlib import Path

# Set before jax is imported. On the CPU the tests are the same on every machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest
from quick_compile import compile_quickly

compile_quickly()  # with XLA_FLAGS= (empty) programs are compiled as users' programs are

# Accidental broadcasting is the commonest silent error in attention code, so ranks must be matched in writing.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every run has the same examples. There are no deadlines, because the first call of an example compiles.
hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


MAPPINGS = Path("/proc/self/maps")  # a line for each memory mapping of this process, on Linux


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Drops the compiled programs after a test file, if there are many; else the next file may use them too.

    Each needs memory mappings, of which Linux allows 65,530.
    """
    yield
    if MAPPINGS.exists() and len(MAPPINGS.read_bytes().splitlines()) > 25_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the compile cache of the command line out of the other tests of this process."""
    # Named in a string, because a module that is imported before the hook of jaxtyping is not checked.
    monkeypatch.setattr("hshare_jax.cli.options.keep_compiled_programs", lambda directory: None)


@pytest.fixture(scope="session")
def cached_model() -> None:
    """Fetches and converts the built-in model before the tests that use it."""
    from hshare_jax.models import pretrained  # imported after the hook of jaxtyping

    pretrained.open_model("smollm2-135m-instruct")


@pytest.fixture
def unchecked():
    """Switches type checks off, for wrong values and for states that hold descriptions of arrays (ShapeDtypeStruct)."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
