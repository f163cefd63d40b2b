"""Warnings about one sample: each with the answer that it is about, each subject once in the log."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("collected", default=None)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings that are given within the block, each time they apply; the log says each subject once."""
    warnings: list[str] = []
    token = _collected.set(warnings)
    try:
        yield warnings
    finally:
        _collected.reset(token)


class Warnings:
    """Hands warnings to `collected_warnings`, and logs each subject (the text before the first colon) once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, warnings: Iterable[str]) -> None:
        collected = _collected.get()
        for warning in warnings:
            if collected is not None:
                collected.append(warning)
            subject = warning.split(":")[0]
            if subject not in self._said:
                self._said.add(subject)
                logger.warning("%s", warning)
