"""What takes long says how far it is; what does not, says nothing."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_PER_LINE = 30


class Pace:
    """Logs a line now and then.

    Args:
        what: is counted: `episodes read`.
    """

    def __init__(self, what: str):
        self._what = what
        self._started = self._reported = time.monotonic()

    def show(self, done: float, total: float) -> None:
        now = time.monotonic()
        if now - self._reported > _SECONDS_PER_LINE:
            self._reported = now
            left_s = (now - self._started) / max(1, done) * (total - done)
            logger.info("%d of %d %s, %.0f s left", done, total, self._what, left_s)


def told(items: Iterable[T], what: str, total: float, size: Callable[[T], float] = lambda _: 1) -> Iterator[T]:
    """The items, with a log line now and then of how many there were, or of the sum of their sizes; see `Pace`."""
    pace, done = Pace(what), 0.0
    for item in items:
        yield item
        done += size(item)
        pace.show(done, total)
