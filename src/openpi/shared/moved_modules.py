"""Documented module names that are in packages now: the old name is the very same module.

A package says so by the entry point `openpi.modules`: old name -> new name. What lies below moves with it. Python asks
here only for modules of `openpi` that it has not found.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

from openpi.shared import plugins

ENTRY_POINTS = "openpi.modules"


def new_name(name: str) -> str | None:
    """What a module, or resource of a package, that moved is called now; None = it did not."""
    for above in _itself_and_above(name):
        if (new := plugins.value(ENTRY_POINTS, above)) is not None:
            return new + name.removeprefix(above)
    return None


def hint(name: str) -> str:
    """How to install what has a module of ours that is not here, to end a message with; empty if none has it."""
    if new_name(name) is not None:
        return ""
    return next(filter(None, (plugins.hint(ENTRY_POINTS, above) for above in _itself_and_above(name))), "")


def _itself_and_above(name: str) -> list[str]:
    """From `a.b.c`: `a.b.c`, `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 1, -1)]


def install() -> None:
    """Makes `import` find them."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("openpi."):
            return None
        new = new_name(fullname)
        if new is not None:
            return importlib.machinery.ModuleSpec(fullname, _Alias(new))
        if where := hint(fullname):
            raise ModuleNotFoundError(f"No module named '{fullname}'{where}", name=fullname)
        return None


class _Alias(importlib.abc.Loader):
    def __init__(self, new: str) -> None:
        self._new = new

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._new)
        self._own_spec = module.__spec__  # Python puts the alias's in its place
        return _package_like(module, spec.name) if hasattr(module, "__path__") else module

    def exec_module(self, module: ModuleType) -> None:
        if not hasattr(module, "__path__"):
            module.__spec__ = self._own_spec


def _package_like(package: ModuleType, name: str) -> ModuleType:
    """With its names, and no folder: in it Python would find the modules below, and load them a second time."""
    alias = ModuleType(name, package.__doc__)
    alias.__path__ = []
    alias.__getattr__ = lambda attribute: getattr(package, attribute)  # type: ignore[method-assign]
    return alias
