"""Names of a package that are imported when they are first asked for (PEP 562), so that a command answers at once."""

import importlib
import sys
from collections.abc import Callable


def lazy_names(package: str, origins: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """
    `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: Its `__name__`.
        origins: Each public name, and the module where it is, relative to the package.
    """

    def getattr_(name: str):
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{origins[name]}", package), name)

    def dir_() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origins})

    return getattr_, dir_, list(origins)
