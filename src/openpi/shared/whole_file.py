"""Files that are there whole or not at all, whatever ends the process that writes them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of what is there; others that read it meanwhile see the one or the other.

    Where the block or the disk fails, what was there stays, and nothing is left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `replacing`, with a text in UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
