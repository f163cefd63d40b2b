"""What commands say: log lines, colored on a terminal and one plain line each in a file; and refusals."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence

from openpi.shared.errors import printable

logger = logging.getLogger(__name__)


class Formatter(logging.Formatter):
    """Of lines that move no cursor: names, tasks and paths in them are what others wrote into files."""

    def format(self, record: logging.LogRecord) -> str:
        return _printable_lines(super().format(record))


def _printable_lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def configure_logging(level: int | None = None, *, process: int = 0) -> None:
    """Sets up the root logger; `OPENPI_LOG_LEVEL` overrides the level (default INFO).

    Args:
        process: of a run of several; all but the first log warnings and errors only, under their number.
    """
    import rich
    from rich.logging import RichHandler

    rich.reconfigure(stderr=True)
    default = "WARNING" if process else "INFO"
    level = level or logging.getLevelNamesMapping()[os.environ.get("OPENPI_LOG_LEVEL", default).upper()]
    number = f"[process {process}] " if process else ""
    if rich.get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(Formatter(f"{number}%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(Formatter(f"%(asctime)s %(levelname)-7s {number}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("absl", "httpx", "httpx2", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def check_range(field: str, value: float | None, lowest: float, highest: float = math.inf) -> None:
    """Raises ValueError that names the option of this field, unless its value is in the range, or None."""
    if value is None or lowest <= value <= highest:
        return
    expected = f"{lowest} or more" if highest == math.inf else f"{lowest} to {highest}"
    raise ValueError(f"--{field.replace('_', '-')} is {value}; expected {expected}")


@contextlib.contextmanager
def help_ends_with(argv: Sequence[str], text: str) -> Iterator[None]:
    """Prints a text behind the help that a parser prints as it leaves: what a command is for comes first."""
    try:
        yield
    except SystemExit:
        if any(word in ("-h", "--help") for word in argv):
            print(f"\n{text}")
        raise


def refuse(error: BaseException, program: str) -> int:
    """Prints why, without a traceback; returns the exit code."""
    logger.debug("", exc_info=error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    message = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else message
    print(_printable_lines(f"{program}: {message}"), file=sys.stderr)
    return 1
