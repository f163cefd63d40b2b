"""`openpi demo`: the whole way in a simulator, and the step of it that has no other command.

Exit codes: 0 = done; 2 = bad command line; 1 = refused or failed; 128 + signal number = stopped, nothing left running.
"""

import signal
import sys
from types import FrameType

from openpi.cli.console import command, help_ends_with
from openpi.shared.children import STOP_SIGNALS

SUMMARY = "record, train, serve and evaluate a small pi0.5 in a simulator, with a report"

_HELP_ON_ACTIONS = """
an action, with options of its own (--help lists them):
  openpi demo record --output DATASET    record demonstrations as a LeRobot dataset
"""


class _Stopped(BaseException):
    """A signal asked us to leave; raised in the main thread so that contexts clean up."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


@command("openpi demo", RuntimeError)
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return _record(argv[1:]) if argv and argv[0] == "record" else _demo(argv)


def _demo(argv: list[str]) -> int:
    import tyro

    from openpi_demo.pipeline import DemoOptions, run_demo

    with help_ends_with(argv, _HELP_ON_ACTIONS.strip()):
        options = tyro.cli(DemoOptions, args=argv, prog="openpi demo")
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    try:
        run_demo(options)
    except _Stopped as stopped:
        print("\nopenpi demo: stopped; nothing keeps running.", file=sys.stderr)
        return 128 + stopped.signum
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _record(argv: list[str]) -> int:
    import tyro

    from openpi_demo.recording import RecordOptions, record_dataset

    options = tyro.cli(RecordOptions, args=argv, prog="openpi demo record")
    path = record_dataset(options, lambda count, prompt: print(f"[{count}/{options.episodes}] {prompt}"))
    print(f"dataset: {path}")
    return 0


def _stop(signum: int, frame: FrameType | None) -> None:
    del frame
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # cleaning up takes a moment; once more must not cut it short
    raise _Stopped(signum)
