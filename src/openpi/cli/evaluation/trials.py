"""`openpi trials FILE.csv --a SERVER --b SERVER`: two policies on a robot, in an order that nobody in the room knows.

    openpi trials results.csv --a 127.0.0.1:8000 --b 127.0.0.1:8001 --pairs 20 --task "put the cup on the plate"

Exit codes: 0 = all trials are done; 1 = refused or failed; 2 = bad command line; 130 = stopped, to be gone on with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from openpi.cli.console import STOPPED, check_range, command, configure_logging, make_parser

if TYPE_CHECKING:
    from openpi.cli.evaluation._question import Question
    from openpi.evaluation.switchboard import Address, Switchboard
    from openpi.evaluation.trials import Form, Outcome, Trial

_NOTHING_CONNECTED = "nothing connected in this trial: was the robot's program started, and with this port?"
Ask = Callable[[str], str]
_T = TypeVar("_T")


@command("openpi trials", RuntimeError)
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    configure_logging()
    try:
        run_on_page(args) if args.page else run(args, input)
    except (KeyboardInterrupt, EOFError):
        print(f"\nstopped; what is done is in {args.file}. The same command goes on from there", file=sys.stderr)
        return STOPPED
    return 0


def _parser() -> argparse.ArgumentParser:
    from openpi.evaluation.trials import PRESETS

    parser = make_parser("openpi trials", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE.csv", help="of results; one that is there is gone on with")
    parser.add_argument("--a", required=True, metavar="SERVER|CHECKPOINT", help="HOST:PORT that runs, or what to serve")
    parser.add_argument("--b", required=True, metavar="SERVER|CHECKPOINT", help="the other")
    parser.add_argument("--pairs", type=int, default=10, help="trials of each (default 10)")
    parser.add_argument("--task", action="append", metavar="TEXT", help="a prompt; several are gone through in turn")
    parser.add_argument("--form", choices=list(PRESETS), default="success", help="what is asked after each trial")
    parser.add_argument("--listen", default="127.0.0.1", metavar="HOST", help="address that the robot connects to")
    parser.add_argument("--port", type=int, default=8100, help="port that the robot connects to (default 8100)")
    parser.add_argument("--page", action="store_true", help="ask on a page, such as that of a telephone, not here")
    parser.add_argument("--page-host", default="127.0.0.1", metavar="HOST", help="its address; others need a key")
    parser.add_argument("--page-port", type=int, default=8101, metavar="PORT", help="its port (default 8101)")
    parser.add_argument("--api-key", metavar="KEY", help="of the page: any name, and it as password (OPENPI_API_KEY)")
    return parser


def run_on_page(args: argparse.Namespace) -> None:
    """As `run`, with a page that asks.

    Raises:
        ValueError: other machines could reach it without a key.
    """
    from openpi.cli import _pages
    from openpi.cli.evaluation._trials_page import TrialsPage
    from openpi_client.connection import api_key_of

    check_range("page_port", args.page_port, 0, 65535)
    page = TrialsPage(args.file)
    key = api_key_of(args.api_key)
    with _pages.served(_pages.open_server(page, args.page_host, args.page_port, api_key=key)) as address:
        print(f"open {address} in a browser", flush=True)
        summary = run(args, page)
        with contextlib.suppress(KeyboardInterrupt):  # all is written
            page.finish(summary)


def run(args: argparse.Namespace, ask: Ask) -> list[str]:
    """
    Args:
        ask: shows a question (a `Question`), returns the answer.
    Returns:
        what came of it, in lines.
    Raises:
        ValueError: the file is of other trials; a flag does not fit.
        OSError: a server, or the port, is not to be had.
        CommandFailedError: a server of ours ended.
    """
    from openpi.evaluation import trials as _trials
    from openpi.evaluation.switchboard import Switchboard

    check_range("pairs", args.pairs, 1)
    check_range("port", args.port, 0, 65535)
    if args.a == args.b:
        raise ValueError("--a and --b are the same; name two policies")
    done = _trials.read(args.file) if args.file.exists() else []
    if done and done[0].policy:
        raise ValueError(f"{args.file} is finished, and its policies are known; name another file")
    seed = done[0].seed if done else secrets.randbits(31)
    form, names = _trials.PRESETS[args.form], (args.a, args.b)
    plan = _trials.plan(args.pairs, args.task or ["the task"], seed)
    digest = _trials.digest_of(names, args.form)
    _trials.check_goes_on(done, plan, digest, args.file)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    with _servers(names, args.file) as servers, Switchboard(args.listen, args.port) as switchboard:
        print(f"connect the robot's program to {args.listen}:{switchboard.port}. Ctrl-C stops; nothing is lost")
        for trial in plan[len(done) :]:
            switchboard.connect(servers[trial.policy])
            outcome = _played(trial, len(plan), form, switchboard, ask)
            done = [*done, dataclasses.replace(outcome, seed=seed, plan=digest)]
            _trials.write(args.file, done)
    _trials.write(args.file, _trials.named(done, plan, names))
    summary = _trials.summary(done, plan, names, form.measure)
    print("\n".join(["", *summary, f"results: {args.file}"]))
    return summary


def _played(trial: Trial, of: int, form: Form, switchboard: Switchboard, ask: Ask) -> Outcome:
    from openpi.cli.evaluation._question import Question
    from openpi.evaluation.trials import BETTER, Outcome, parse_outcome

    about = f"trial {trial.number} of {of}, pair {trial.pair}, {('first', 'second')[trial.turn - 1]}: {trial.task}"
    scene = "arrange the scene" if trial.turn == 1 else "arrange the scene as before"
    print(f"\n{about}")
    shown = f"{scene.capitalize()}, then press start, and start the robot."
    ask(Question(f"{scene}, then press Enter and start the robot ", shown=shown, about=about, choices={"start": ""}))
    began = time.monotonic()
    has_score = form.measure == "score"
    asked = Question(
        "did it succeed? y, n" + (", or a score of 0 to 100" if has_score else "") + ": ",
        shown="Did it succeed?" + (" Or a score of 0 to 100." if has_score else ""),
        about=about,
        choices={"yes": "y", "no": "n"},
        takes_text=has_score,
    )
    success = _answered(ask, asked, lambda text: parse_outcome(text, form.measure))
    duration = round(time.monotonic() - began, 1)
    note = "" if switchboard.num_connections else _NOTHING_CONNECTED
    if note:
        print(note, file=sys.stderr)
    better = ""
    if form.asks_better and trial.turn == 2:
        kinds = {each: each for each in BETTER}
        text = f"which was better? {', '.join(BETTER)}: "
        asked = Question(text, shown="Which was better?", about=about, note=note, choices=kinds)
        better = _answered(ask, asked, kinds.get)

    def typed(what: str) -> str:
        asked = Question(f"{what} (Enter = none): ", shown=what.capitalize(), about=about, note=note, takes_text=True)
        return ask(asked).strip()

    video = typed("name of the film") if form.asks_video else ""
    notes = typed("notes")
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    return Outcome(trial.number, trial.pair, trial.turn, trial.task, success, duration, notes, video, better, when)


def _answered(ask: Ask, asked: Question, parse: Callable[[str], _T | None]) -> _T:
    """Asks until the answer is one."""
    while (found := parse(ask(asked).strip().lower())) is None:
        asked = asked.again("that is none of the answers")
        print(asked.note, file=sys.stderr)
    return found


@contextlib.contextmanager
def _servers(names: Sequence[str], file: Path) -> Iterator[list[Address]]:
    """Where the policies answer; checkpoints are served by processes of ours, both at a time."""
    from openpi.evaluation.asker import own_server, running_server
    from openpi.shared.children import Command
    from openpi_client.connection import api_key_of

    with contextlib.ExitStack() as stack:
        # Two servers on one device: JAX would take most of its memory for the first.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        found: list[Address] = []
        for i, name in enumerate(names):
            if (address := _address(name)) is not None:
                with running_server(*address, api_key_of()):
                    found.append(address)
                continue
            folder = file.with_suffix("") / "ab"[i]
            stack.enter_context(own_server(Command(("serve", name)), folder))
            found.append(("127.0.0.1", int((folder / "server.port").read_text())))
        yield found


def _address(name: str) -> Address | None:
    """Of `HOST:PORT`, with or without `ws://`; None of anything else, which is a checkpoint."""
    host, _, port = name.removeprefix("ws://").rstrip("/").rpartition(":")
    return (host, int(port)) if host and "/" not in host and port.isdigit() else None
