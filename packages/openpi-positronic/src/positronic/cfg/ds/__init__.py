"""Recordings by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import configuronic as cfn


@dataclass(frozen=True)
class Recordings:
    """Where recordings are.

    Attributes:
        place: path or URL.
        options: by URL scheme, of the file system.
    """

    place: str
    options: dict[str, Any] = field(default_factory=dict)


@cfn.config()
def local(path: str) -> Recordings:
    """A folder, or a URL that this machine has access to."""
    return Recordings(str(path))
