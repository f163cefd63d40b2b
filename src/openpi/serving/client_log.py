"""Log lines about clients: a client that fails a thousand times a second fills no disk."""

import dataclasses
import logging
import threading
import time
import traceback
from collections.abc import Callable

from openpi.serving.access import network_of
from openpi.serving.errors import error_text, shortened

logger = logging.getLogger(__name__)

_LINES_PER_MINUTE = 20
_LINES_OF_ALL_PER_MINUTE = 200
_MINUTE_S = 60.0
_MAX_NETWORKS = 1000
_MOST_LINES = 300  # of a traceback, whose last ones may be a client's
_UNPRINTABLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


@dataclasses.dataclass
class _Window:
    """A minute of one client's lines.

    Attributes:
        errors: whose tracebacks are among them.
    """

    start_s: float
    num_lines: int = 0
    num_left_out: int = 0
    errors: set[str] = dataclasses.field(default_factory=set)


class ClientLog:
    """Writes so many lines a minute about one client, and counts the rest. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._all = _Window(clock())
        self._windows: dict[str, _Window] = {}

    def write(self, level: int, address: str, text: str, *, error: BaseException | None = None) -> None:
        """One line; what clients sent is in it, so nothing in it ends the line or moves a terminal's cursor.

        Args:
            address: of the client, with its port.
            error: its traceback is added, once a minute, in lines that are indented: an error may quote what a client
                sent, and that is no line of the log.
        """
        told, is_said, is_known = self._admit(network_of(address), error)
        for network, count in told:
            logger.warning("%d further lines about %s were left out", count, network)
        if is_said:
            below = [f"again: {error_text(error)}"] if error is not None and is_known else _traceback(error)
            logger.log(level, "%s", "\n    ".join(map(_printable, (shortened(text), *below))))

    def _admit(self, network: str, error: BaseException | None) -> tuple[list[tuple[str, int]], bool, bool]:
        """What was left out in minutes that are over, whether there is room for a line, and whether the error was told
        in this one."""
        now_s = self._clock()
        told: list[tuple[str, int]] = []
        with self._lock:
            if now_s - self._all.start_s >= _MINUTE_S:
                told = [(name, each.num_left_out) for name, each in self._windows.items() if each.num_left_out]
                told = told[:_LINES_PER_MINUTE]
                self._all, self._windows = _Window(now_s), {}
            known = network if network in self._windows or len(self._windows) < _MAX_NETWORKS else "others"
            window = self._windows.setdefault(known, _Window(now_s))
            is_said = window.num_lines < _LINES_PER_MINUTE and self._all.num_lines < _LINES_OF_ALL_PER_MINUTE
            for each in (window, self._all):
                each.num_lines += is_said
                each.num_left_out += not is_said
            found = f"{type(error).__name__}: {shortened(str(error))}"
            is_known = found in window.errors
            if is_said:
                window.errors.add(found)
        return told, is_said, is_known


def _traceback(error: BaseException | None) -> list[str]:
    lines = [] if error is None else "".join(traceback.format_exception(error)).splitlines()
    return [shortened(line) for line in lines[:_MOST_LINES]]


def _printable(line: str) -> str:
    return line.translate(_UNPRINTABLE)
