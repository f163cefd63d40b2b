"""What every worker process of a pool does first: it leaves Ctrl-C to its parent, and does not outlive it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def start() -> None:
    """For the `initializer` of a pool whose processes are spawned.

    A parent that is killed ends no pool: without this, its workers stay for ever, with their memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent, which then ends us
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    # Not PR_SET_PDEATHSIG: that is sent when the thread ends that has started us, of a parent that lives on.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
