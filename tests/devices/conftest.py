"""Tests on eight devices, which a CPU counts as if JAX_NUM_CPU_DEVICES=8. Otherwise the files here are not collected.

JAX_NUM_CPU_DEVICES=8 python -m pytest tests/devices
"""

import os

import jaxtyping
import pytest

collect_ignore_glob = [] if os.environ.get("JAX_NUM_CPU_DEVICES") == "8" else ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")
def without_type_checks():
    """Leaves the types to the other tests, which call the same functions. Tracing takes a third less time so."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
