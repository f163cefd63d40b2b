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

# Until it is told: drivers wait some seconds for each answer that does not come, and do so several times. And until a
# program ends: some robots drive to a pose of rest first.
PATIENCE_S, LONGEST_S = 10.0, 60.0
_SHOWN = 4  # of the calls that lead to it
_is_program = False


def end_program() -> None:
    """From now on what never returns ends this process, with code 1: its sockets close, and most controllers stop then.
    For programs of robots; elsewhere (a notebook) it is told only."""
    global _is_program
    _is_program = True


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says where it hangs if what is done within takes longer than `PATIENCE_S`; after `LONGEST_S` ends a program."""
    done = threading.Event()
    args = (what, threading.get_ident(), done)
    threading.Thread(target=_watch, args=args, name="openpi-hanging", daemon=True).start()
    if _is_program and sys.__stderr__ is not None:  # for drivers that keep all of Python waiting
        faulthandler.dump_traceback_later(LONGEST_S + PATIENCE_S, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        done.set()
        if _is_program:
            faulthandler.cancel_dump_traceback_later()


def _watch(what: str, thread: int, done: threading.Event) -> None:
    if done.wait(PATIENCE_S):
        return
    calls = traceback.extract_stack(sys._current_frames().get(thread))[-_SHOWN:]
    place = " > ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in calls)
    then = f"after {LONGEST_S:g} s the program ends without it" if _is_program else "nothing more is done until it does"
    logger.error(
        "%s has not returned for %g s, %s. See that the robot stands, and look at its line and its driver. It is at %s",
        *(what, PATIENCE_S, then, place),
    )
    if _is_program and not done.wait(LONGEST_S - PATIENCE_S):
        logger.error("%s has not returned for %g s: the program ends", what, LONGEST_S)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(1)
