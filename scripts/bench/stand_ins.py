"""Stand-ins for packages that only reading model files needs, on machines that lack them.

A GPU machine without a network may lack them, and the benches read no model file: their weights are random.
"""

import importlib.machinery
import importlib.util
import sys
import types
from unittest.mock import MagicMock

PACKAGES = {
    "gguf": ("gguf", "gguf.constants", "gguf.quants"),
    "orbax.checkpoint": ("orbax", "orbax.checkpoint"),
}


def stand_in() -> dict[str, str]:
    """Puts a stand-in in the place of each absent package; returns the reason for each."""
    reasons = {}
    for package, modules in PACKAGES.items():
        if not _is_there(package):
            for name in modules:
                sys.modules[name] = _StandIn(name)
            reasons[package] = "it is not installed, and only reading and writing model files needs it"
    return reasons


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is absent
        return False


class _StandIn(types.ModuleType):
    """A module in which every name is a mock."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        mock = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, mock)
        return mock
