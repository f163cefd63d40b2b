"""`openpi replay PLACE --port N`: sends what a server recorded to a server again, and compares the answers.

PLACE is a session of `openpi serve --record` (a folder, or a .mcap file), a folder of several, or that of
`scripts/serve_policy.py --record`. A policy draws its noise anew, so answers differ unless the model is deterministic;
`--tolerance` makes a difference an error. Exit codes: 0 = done; 1 = refused, failed, or different; 2 = bad command
line.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SUMMARY = "recorded requests to a server again, and the answers compared"

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = _parser().parse_args(argv)
    configure_logging()
    try:
        is_same = replay(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi replay: {error}", file=sys.stderr)
        return 1
    return 0 if is_same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openpi replay", description=SUMMARY)
    parser.add_argument("place", type=Path, help="a recorded session (folder or .mcap file), or a folder of sessions")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", help="of the server; default: its own")
    parser.add_argument("--api-key", default=os.environ.get("OPENPI_API_KEY"))
    parser.add_argument("--tolerance", type=float, help="largest difference between actions that is not an error")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="wait so long for the server")
    return parser


def replay(args: argparse.Namespace) -> bool:
    """Replays all sessions; returns whether all answers are within the tolerance, if there is one.

    Raises:
        FileNotFoundError: nothing recorded there.
        ValueError: a damaged record.
        RuntimeError: the server answered a request with an error.
        ConnectionError, TimeoutError: no server.
        ImportError: a form of recording needs an extra that is not installed; it is named.
    """
    from openpi.serving.recording import find_sessions, protocol_of, read_session

    largest, times_ms = 0.0, []
    for session in find_sessions(args.place):
        with open_client(protocol_of(session), args) as ask:
            for exchange in read_session(session):
                start_s = time.perf_counter()
                answer = ask(exchange.inputs)
                times_ms.append(1000 * (time.perf_counter() - start_s))
                difference = largest_difference(exchange.outputs, answer)
                largest = max(largest, difference)
                what = f"{session} step {exchange.step}"
                print(f"{what}: {times_ms[-1]:.1f} ms, largest difference of the actions {difference:.4g}")
    if not times_ms:
        raise ValueError(f"{args.place} holds no complete request; the server was killed before its first answer")
    p50, p90 = np.percentile(times_ms, [50, 90])
    print(f"{len(times_ms)} requests, p50 {p50:.1f} ms, p90 {p90:.1f} ms; largest difference {largest:.4g}")
    if args.tolerance is None or largest <= args.tolerance:
        return True
    print(f"openpi replay: actions differ by {largest:.4g}, more than {args.tolerance:g}", file=sys.stderr)
    return False


class open_client:
    """Asks the server in the protocol of a recorded session. `with open_client(...) as ask: ask(inputs) -> answer`."""

    def __init__(self, protocol: str, args: argparse.Namespace) -> None:
        self._is_positronic = protocol == "positronic"
        self._args = args

    def __enter__(self) -> Any:
        from openpi_client.positronic_client import PositronicClient
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        args = self._args
        if self._is_positronic:
            # As recorded: the images were shrunk already.
            client: Any = PositronicClient(args.host, args.port, resize=None, model_id=args.model, api_key=args.api_key)
            self._client = client
            return lambda inputs: {"result": client.infer(inputs)}
        query = f"/?model={args.model}" if args.model else ""
        self._client = client = WebsocketClientPolicy(
            f"ws://{args.host}:{args.port}{query}", None, args.api_key, connect_timeout_s=args.timeout
        )
        return lambda inputs: (
            {"batch": client.infer_batch(inputs)} if isinstance(inputs, list) else client.infer(inputs)
        )

    def __exit__(self, *_: object) -> None:
        self._client.close()


def largest_difference(recorded: Any, answered: Any) -> float:
    """Of the actions in two answers; infinity where one has none, or another shape."""
    first, second = list(_actions(recorded)), list(_actions(answered))
    if len(first) != len(second) or any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return float("inf")
    differences = [np.abs(a - b).max() for a, b in zip(first, second, strict=True) if a.size]
    return float(max(differences, default=0.0))


def _actions(answer: Any) -> Iterator[np.ndarray]:
    """The numbers of an answer that move a robot, in order."""
    if isinstance(answer, Mapping):
        for key, value in answer.items():
            if key in ("actions", "action", "pose", "positions", "velocities", "target_grip"):
                yield np.asarray(value, np.float64)
            elif isinstance(value, (Mapping, list)):
                yield from _actions(value)
    elif isinstance(answer, list):
        for item in answer:
            yield from _actions(item)


if __name__ == "__main__":
    sys.exit(main())
