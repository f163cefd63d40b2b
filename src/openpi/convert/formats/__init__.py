"""Formats of recordings, a file each; `FORMATS` has them by the word of the command line."""

from __future__ import annotations

import importlib
from typing import Any

# word -> module, class, what it is. Modules are imported when they are asked for: some need a library of their own.
FORMATS: dict[str, tuple[str, str, str]] = {
    "aloha": ("aloha", "AlohaHdf5", "ALOHA's episode_*.hdf5: JPEG or raw pictures, mobile or not, any set of cameras"),
}


def format_class(word: str) -> Any:
    """The dataclass of a format: its fields are its options.

    Raises:
        KeyError: no such format.
    """
    module, name, _ = FORMATS[word]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
