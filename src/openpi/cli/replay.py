"""`openpi replay FOLDER --port N`: sends what a server recorded to a server again, and compares the answers.

FOLDER is one session of `openpi serve --record`, a folder of several, or one of `scripts/serve_policy.py --record`. A
policy draws its noise anew, so answers differ unless the model is deterministic; `--tolerance` makes a difference an
error. Exit codes: 0 = done; 1 = refused, failed, or different; 2 = bad command line.
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
    except (ValueError, OSError, RuntimeError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi replay: {error}", file=sys.stderr)
        return 1
    return 0 if is_same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openpi replay", description=SUMMARY)
    parser.add_argument("folder", type=Path, help="a recorded session, or a folder of sessions")
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
    """
    from openpi.serving.recording import read_steps

    largest, times_ms = 0.0, []
    for session in sessions_in(args.folder):
        with open_client(session, args) as ask:
            for path, record in read_steps(session):
                inputs, recorded = part(record, "inputs"), part(record, "outputs")
                start_s = time.perf_counter()
                answer = ask(inputs)
                times_ms.append(1000 * (time.perf_counter() - start_s))
                difference = largest_difference(recorded, answer)
                largest = max(largest, difference)
                print(f"{path}: {times_ms[-1]:.1f} ms, largest difference of the actions {difference:.4g}")
    p50, p90 = np.percentile(times_ms, [50, 90])
    print(f"{len(times_ms)} requests, p50 {p50:.1f} ms, p90 {p90:.1f} ms; largest difference {largest:.4g}")
    if args.tolerance is None or largest <= args.tolerance:
        return True
    print(f"openpi replay: actions differ by {largest:.4g}, more than {args.tolerance:g}", file=sys.stderr)
    return False


def sessions_in(folder: Path) -> list[Path]:
    """The folder, if it is a session, else those in it.

    Raises:
        FileNotFoundError: neither.
    """
    if any(folder.glob("step_*.npy")):
        return [folder]
    found = sorted({path.parent for path in folder.glob("*/step_*.npy")})
    if not found:
        raise FileNotFoundError(
            f"{folder} has no step_<n>.npy, nor has any folder in it; expected what --record writes"
        )
    return found


class open_client:
    """Asks the server in the protocol of a recorded session. `with open_client(...) as ask: ask(inputs) -> answer`."""

    def __init__(self, session: Path, args: argparse.Namespace) -> None:
        self._is_positronic = _protocol(session) == "positronic"
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


def _protocol(session: Path) -> str:
    import json

    told = session / "session.json"
    return json.loads(told.read_text())["protocol"] if told.is_file() else "openpi"


def part(record: Mapping[str, Any], name: str) -> Any:
    """`inputs` or `outputs` of a flat record, nested where its keys are not those that clients join themselves."""
    if name in record:  # a list of observations
        return record[name]
    flat = {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}
    return flat if name == "inputs" and any(key.startswith("observation/") for key in flat) else _nested(flat)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    from openpi.shared.tree import unflatten

    return unflatten(flat)


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
