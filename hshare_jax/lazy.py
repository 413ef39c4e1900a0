"""Lazy packages: importing a package is quick, because each name is imported when it is first used (PEP 562)."""

import importlib
import sys
import types
from collections.abc import Mapping, Sequence


def make_lazy(package: str, homes: Mapping[str, Sequence[str]]) -> None:
    """Gives a package the names that its modules define, without importing these modules.

    A function may have the name of its module: `hshare_jax.prefill` is the function. Python puts each imported module
    into the package. The package gets a class that keeps such a module from hiding the function.

    Args:
        package: its `__name__`.
        homes: the names, by the module of the package that holds them.
    """
    home_of = {name: f"{package}.{home}" for home, names in homes.items() for name in names}

    class LazyPackage(types.ModuleType):
        def __getattr__(self, name: str) -> object:
            if name not in home_of:
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            return getattr(importlib.import_module(home_of[name]), name)

        def __setattr__(self, name: str, value: object) -> None:
            if not (name in home_of and isinstance(value, types.ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*super().__dir__(), *home_of})

    sys.modules[package].__class__ = LazyPackage
