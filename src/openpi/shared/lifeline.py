"""Runs `openpi ...` for as long as its standard input stays open: whoever started it may be killed, and leaves nothing.

Not PR_SET_PDEATHSIG: that is sent when the thread ends that has started us, of a parent that lives on.
"""

import os
import runpy
import signal
import sys
import threading
import time

_GRACE_S = 10.0


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()
    sys.argv[0] = "openpi"
    runpy.run_module("openpi.cli.main", run_name="__main__", alter_sys=True)
