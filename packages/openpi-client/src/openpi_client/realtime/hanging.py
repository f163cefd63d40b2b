"""Calls of a robot's driver that may never return: some wait for ever on a line that is dead."""

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Iterator

logger = logging.getLogger(__name__)

# Drivers wait some seconds for each answer that does not come, and do so several times.
PATIENCE_S = 20.0
_SHOWN = 4  # of the calls that lead to it
_is_program = False


def end_program() -> None:
    """From now on what never returns ends this process, with code 1: its sockets close, and most controllers stop then.
    For programs of robots; elsewhere (a notebook) it is told only."""
    global _is_program
    _is_program = True


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says where it hangs if what is done within takes longer than `PATIENCE_S`, and ends a program."""
    timer = threading.Timer(PATIENCE_S, _tell, (what, threading.get_ident()))
    timer.daemon = True
    timer.start()
    if _is_program and sys.__stderr__ is not None:  # for drivers that keep all of Python waiting
        faulthandler.dump_traceback_later(2 * PATIENCE_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        if _is_program:
            faulthandler.cancel_dump_traceback_later()


def _tell(what: str, thread: int) -> None:
    frame = sys._current_frames().get(thread)
    calls = traceback.extract_stack(frame)[-_SHOWN:]
    place = " > ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in calls)
    then = "the program ends without it" if _is_program else "nothing more is done until it returns"
    logger.error(
        "%s has not returned for %g s; %s. See that the robot stands, and look at its line and its driver. It is at %s",
        *(what, PATIENCE_S, then, place),
    )
    if _is_program:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)
