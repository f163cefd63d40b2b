"""What commands say: log lines, colored on a terminal and one plain line each in a file; and refusals."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec

from openpi.shared.errors import printable

logger = logging.getLogger(__name__)

STOPPED = 130  # by Ctrl-C, as shells say it
OWN_FIELDS = "Fields of a recipe are set as with `openpi train`: --data.repo-id=PATH and so on."
_P = ParamSpec("_P")


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


def make_parser(program: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Of a command whose description keeps its lines, and whose flags are written out."""
    return argparse.ArgumentParser(
        program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def command(program: str, *others: type[Exception]) -> Callable[[Callable[_P, int | None]], Callable[_P, int]]:
    """Of a command's `main`: what it refuses is said, and becomes the exit code; None is 0.

    Args:
        others: errors that it refuses with, besides those of input, files, networks and missing packages.
    """

    def decorate(main: Callable[_P, int | None]) -> Callable[_P, int]:
        @functools.wraps(main)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
            try:
                return main(*args, **kwargs) or 0
            except (ValueError, LookupError, OSError, ImportError, *others) as error:
                if isinstance(error, BrokenPipeError) and stdout_is_gone():
                    raise
                return refuse(error, program)
            except KeyboardInterrupt:
                return STOPPED

        return run

    return decorate


def refuse(error: BaseException, program: str) -> int:
    """Prints why, without a traceback; returns the exit code."""
    logger.debug("", exc_info=error)
    print(_printable_lines(f"{program}: {reason(error)}"), file=sys.stderr)
    return 1


def reason(error: BaseException) -> str:
    """What an error says; of a bare key and of nothing at all, its type too."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
        return text if " " in text else f"KeyError: {error}"
    if isinstance(error, OSError) and error.strerror and not error.filename:
        return error.strerror
    return str(error) or type(error).__name__


def stdout_is_gone() -> bool:
    """Whether the reader, such as `head`, has seen enough."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
