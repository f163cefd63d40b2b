"""Some of many, evenly: what is looked at where all would take too long."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], at_most: int) -> list[T]:
    """Some of them in order, evenly spaced, the first and the last among them (of one, the first)."""
    indices = np.linspace(0, len(items) - 1, min(at_most, len(items))).round().astype(int)
    return [items[i] for i in indices]
