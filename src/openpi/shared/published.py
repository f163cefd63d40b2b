"""Published names beside our own modules, imported when a program asks for them: they need what the modules do not."""

from __future__ import annotations

import importlib
from collections.abc import Collection


def attribute(module: str, name: str, home: str, names: Collection[str]) -> object:
    """For a module's `__getattr__`: what `name` is, if it is one of `names`, from the module `home`.

    Raises:
        AttributeError: it is none of them.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
