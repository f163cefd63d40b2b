"""Text files that are there whole or not at all, whatever ends the process that writes them."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 in place of what was there; others that read it meanwhile see the one or the other.

    Raises:
        OSError: the disk is full, or there is no such folder; what was there stays, and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
