"""How far a conversion is: a bar on a terminal, else a log line now and then."""

from __future__ import annotations

import logging
import time
from typing import Any

from openpi.shared.slow import Pace

logger = logging.getLogger(__name__)


class Progress:
    """Counts what is done; `with` it around the work."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._started, self._pace = time.monotonic(), Pace(what)
        self._bar: Any = None

    def __enter__(self) -> Progress:
        import rich
        import rich.progress as bars

        if rich.get_console().is_terminal:
            columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
            self._bar = bars.Progress(*columns, console=rich.get_console(), transient=True)
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if failed is None:
            logger.info("%d %s in %.0f s", self._done, self._what, time.monotonic() - self._started)

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        else:
            self._pace.show(self._done, self._total)
