"""`openpi replay PLACE --port N`: sends what a server recorded to a server again, and compares the answers.

    openpi serve CHECKPOINT --record records/
    openpi replay records/ --port 8001

PLACE is a session of `openpi serve --record` (a folder, or a .mcap file), a folder of several, or that of
`scripts/serve_policy.py --record`. A policy draws its noise anew, so answers differ unless the model is deterministic;
`--tolerance` makes a difference an error. Exit codes: 0 = done; 1 = refused, failed, or different; 2 = bad command
line.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from websockets.exceptions import InvalidStatus

from openpi.cli.console import command, configure_logging, make_parser
from openpi.shared.errors import printable
from openpi_client import connection
from openpi_client.positronic_client import PositronicClient
from openpi_client.websocket_client_policy import WebsocketClientPolicy

if TYPE_CHECKING:
    from openpi.serving.recorded import Exchange, Origin

logger = logging.getLogger(__name__)

_LONGEST_ERROR = 2000
_NOISE = "pi0 and pi0.5 draw new noise for each answer, unless the request has `seed` or `noise`"


@command("openpi replay", TypeError, OverflowError, RuntimeError, InvalidStatus)
def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    configure_logging()
    return 0 if replay(args) else 1


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi replay", __doc__)
    parser.add_argument("place", type=Path, help="a recorded session (folder or .mcap file), or a folder of sessions")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, help="default: 8000, or 443 of wss://...")
    parser.add_argument("--model", help="of the server; default: the recorded one, or else the server's own")
    parser.add_argument("--api-key", help="of the server; default: OPENPI_API_KEY")
    parser.add_argument("--tolerance", type=float, help="largest difference between actions that is not an error")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="wait so long for the server")
    return parser


def replay(args: argparse.Namespace) -> bool:
    """Replays all sessions; returns whether all answers are within the tolerance, if there is one.

    Raises:
        FileNotFoundError: nothing recorded there.
        ValueError: a damaged record.
        RuntimeError: the server has no such model, or cannot load it.
        ConnectionError, TimeoutError: no server.
        ImportError: a form of recording needs an extra that is not installed; it is named.
    """
    from openpi.serving.recording import find_sessions, origin_of, read_session

    largest, times_ms, num_refused = 0.0, [], 0
    for session in find_sessions(args.place):
        with open_client(origin_of(session), args, str(session)) as ask:
            for exchange in read_session(session):
                _check(exchange, session)
                start_s = time.perf_counter()
                answer = _answer_or_error(ask, exchange.inputs)
                times_ms.append(1000 * (time.perf_counter() - start_s))
                difference = largest_difference(exchange.outputs, answer)
                largest = max(largest, difference)
                num_refused += "error" in answer and "error" not in exchange.outputs
                told = _comparison(exchange.outputs, answer, difference)
                print(f"{session} step {exchange.step}: {times_ms[-1]:.1f} ms, {told}")
    if not times_ms:
        raise ValueError(f"{args.place} holds no complete request; the server was killed before its first answer")
    p50, p90 = np.percentile(times_ms, [50, 90])
    print(f"{len(times_ms)} requests, p50 {p50:.1f} ms, p90 {p90:.1f} ms; largest difference {largest:.4g}")
    if num_refused:
        print(f"openpi replay: {num_refused} requests that were answered then are refused now", file=sys.stderr)
        return False
    if args.tolerance is None:
        if largest:
            print(_NOISE)
        return True
    if largest <= args.tolerance:
        return True
    print(f"openpi replay: actions differ by {largest:.4g}, more than {args.tolerance:g}. {_NOISE}", file=sys.stderr)
    return False


def _check(exchange: Exchange, session: Path) -> None:
    """Raises ValueError for what no server records: files are handed on, and may say anything."""
    asked = exchange.inputs if isinstance(exchange.inputs, list) else [exchange.inputs]
    if not all(isinstance(each, dict) for each in (*asked, exchange.outputs)):
        raise ValueError(f"{session} step {exchange.step} is no exchange: it has no maps of observation and answer")


@contextlib.contextmanager
def open_client(
    origin: Origin, args: argparse.Namespace, session: str
) -> Iterator[Callable[[Any], Mapping[str, object]]]:
    """A function that asks the server in the protocol of a recorded session: inputs -> answer. It asks the model that
    the session talked to, if the server has it.
    """
    model = args.model or origin.model
    try:
        client = _connected(origin.protocol, model, args)
        print(f"{session}: asks {f'model {model}' if model else 'the model that the server chooses'}")
    except RuntimeError as error:
        if args.model or model is None:
            raise
        logger.warning(
            "%s talked to model '%s', which the server does not offer (%s); its default is asked, so answers may "
            "differ. --model names another",
            session,
            model,
            str(error).splitlines()[-1],
        )
        client = _connected(origin.protocol, None, args)
    with client:
        if isinstance(client, PositronicClient):
            yield lambda inputs: {"result": client.infer(inputs)}
        else:
            yield (
                lambda inputs: (
                    {"batch": client.infer_batch(inputs)} if isinstance(inputs, list) else client.infer(inputs)
                )
            )


def _connected(protocol: str, model: str | None, args: argparse.Namespace) -> PositronicClient | WebsocketClientPolicy:
    key, port = connection.api_key_of(args.api_key), connection.usual_port(args.host, args.port)
    if protocol == "positronic":
        # As recorded: the images were shrunk already.
        client = PositronicClient(args.host, port, resize=None, model_id=model, api_key=key)
        client.reset()
        return client
    place = connection.uri(args.host, port) + (f"/?model={quote(model, safe='')}" if model else "")
    # What was recorded is old.
    return WebsocketClientPolicy(place, None, key, connect_timeout_s=args.timeout, max_age_s=None)


def _answer_or_error(ask: Callable[[object], Mapping[str, object]], inputs: object) -> Mapping[str, object]:
    try:
        return ask(inputs)
    except RuntimeError as error:
        return {"error": str(error).strip().splitlines()[-1]}


def _comparison(recorded: Mapping[str, object], answered: Mapping[str, object], difference: float) -> str:
    then, now = (
        f"an error ({printable(str(answer['error'])[:_LONGEST_ERROR])})" if "error" in answer else "an answer"
        for answer in (recorded, answered)
    )
    if "error" in recorded or "error" in answered:
        return f"then {then}, now {now}"
    return f"largest difference of the actions {difference:.4g}"


def largest_difference(recorded: object, answered: object) -> float:
    """Of the actions in two answers; infinity where one has none, another shape, or what is no number."""
    first, second = list(_actions(recorded)), list(_actions(answered))
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return float("inf")
    differences = [np.nan_to_num(np.abs(a - b), nan=np.inf).max() for a, b in zip(first, second, strict=True) if a.size]
    return float(max(differences, default=0.0))


def _actions(answer: object) -> Iterator[np.ndarray]:
    """The numbers of an answer that move a robot, in order."""
    if isinstance(answer, Mapping):
        for key, value in answer.items():
            if key in ("actions", "action", "pose", "positions", "velocities", "delta", "target_grip"):
                yield np.asarray(value, np.float64)
            elif isinstance(value, (Mapping, list)):
                yield from _actions(value)
    elif isinstance(answer, list):
        for item in answer:
            yield from _actions(item)
