"""`openpi client-check`: how long answers take on the way from this machine to a server, and which loop that carries.

    openpi client-check --host 192.168.1.20
    OPENPI_API_KEY=... openpi client-check --host wss://192.168.1.20:8443 --seconds 60

Exit codes: 0 = the loop of the contract fits; 1 = it does not, or there is no server; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.cli.console import command, make_parser
from openpi_client.base_policy import Metadata, Observation
from openpi_client.connection import api_key_of, usual_port

if TYPE_CHECKING:
    from openpi_client.realtime import ProcessRequester
    from openpi_client.realtime.actions import ActionSpec


# Without a contract.
_RATE_HZ = 50.0
_CAMERA = (480, 640)


@command("openpi client-check", RuntimeError)
def main(argv: list[str] | None = None) -> int:
    from openpi_client.realtime import ProcessRequester
    from openpi_client.realtime.actions import ActionSpec

    args = _parser().parse_args(argv)
    port = usual_port(args.host, args.port)
    with ProcessRequester(args.host, port, api_key_of(args.api_key), connect_timeout_s=args.timeout) as policy:
        observation = example(policy.metadata)
        spec = ActionSpec.from_metadata(policy.metadata, width=None, hold="stay")  # nothing moves here
        parts, errors = measure(policy, observation, args.seconds, spec)
        lines, fits = report(parts, errors, policy.metadata, spec)
    print("\n".join(lines))
    return 0 if fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi client-check", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="a name, an address, or a URL such as wss://robot:8443")
    parser.add_argument("--port", type=int, help="where --host names none; default: 8000, or 443 of wss://...")
    parser.add_argument("--api-key", help="of the server; default: OPENPI_API_KEY")
    parser.add_argument("--seconds", type=float, default=20.0, help="of asking")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the server")
    return parser


def example(metadata: Mapping[str, object]) -> Observation:
    """An observation with the keys and sizes of a server's contract: noise for pictures, zeros for the state."""
    from openpi_client.realtime.actions import contract_of

    contract = contract_of(metadata)
    if not contract:
        raise ValueError("the server has no contract, so what it takes is not known; use examples/simple_client")
    rng = np.random.default_rng(0)
    observation: dict[str, Any] = {}
    try:
        for camera in contract.get("cameras", ()):
            height, width = (camera.get("shape") or _CAMERA)[:2]
            shape = (3, height, width) if camera.get("layout") == "chw" else (height, width, 3)
            observation[camera["key"]] = rng.integers(0, 256, shape, np.uint8)
        for vector in contract.get("state", ()):
            observation[vector["key"]] = np.zeros(vector["width"], np.float32)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the contract that the server tells is none of openpi's ({error!r})") from error
    observation.setdefault("prompt", contract.get("default_prompt") or "do something")
    return observation


def measure(
    policy: ProcessRequester, observation: Observation, seconds: float, spec: ActionSpec
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Asks again and again.

    Returns:
        ms by part, and the errors, of which answers that no loop would play are some; the first answer does not count,
        since servers compile then.
    Raises:
        RuntimeError: no answer was of use.
    """
    found: list[Mapping[str, float]] = []
    errors: list[str] = []
    number, end_s = 0, math.inf
    while time.monotonic() < end_s or not found:
        number += 1
        start_s = time.monotonic()
        policy.submit(number, observation)
        while (answer := policy.poll()) is None:
            time.sleep(2e-4)
        error = answer.error if answer.result is None else spec.problem(answer.result.get("actions"), spec.horizon)
        if error:
            errors.append(error)
            if answer.failure == "fatal" or (not found and len(errors) > 2):
                raise RuntimeError(error)
        elif number > 1:
            found.append({**answer.timing_ms, "whole_ms": 1e3 * (time.monotonic() - start_s)})
        if end_s == math.inf:
            end_s = time.monotonic() + seconds
    return {part: np.array([times.get(part, math.nan) for times in found]) for part in found[0]}, errors


def report(
    parts: Mapping[str, np.ndarray], errors: list[str], metadata: Metadata, spec: ActionSpec
) -> tuple[list[str], bool]:
    """Lines for people, and whether a loop at the contract's rate never has to hold.

    Raises:
        ValueError: the contract does not say how long a chunk is.
    """
    if spec.horizon is None:
        raise ValueError("the contract of the server does not say how many rows a chunk has (actions/horizon)")
    rate_hz, horizon = spec.rate_hz or _RATE_HZ, spec.horizon
    lines = [f"{'ms':<14}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>8}"]
    for part, times in parts.items():
        quantiles = np.nanpercentile(times, (50, 95, 99, 100))
        lines.append(f"{part.removesuffix('_ms'):<14}" + "".join(f"{value:8.1f}" for value in quantiles))
    slowest_s = 1e-3 * float(np.nanpercentile(parts["whole_ms"], 99))
    delay = math.ceil(slowest_s * rate_hz) + 1
    fits = 2 * delay <= horizon
    lines.append(f"{len(parts['whole_ms'])} answers, {len(errors)} errors{': ' + errors[0] if errors else ''}")
    where = f"at {rate_hz:g} Hz" + ("" if spec.rate_hz else ", which is assumed (the contract has no rate),")
    lines.append(
        f"{where} an answer takes up to {delay} ticks (p99, and one more); chunks have {horizon} rows: "
        + (
            f"a loop that plays while it asks never holds, with an execution_horizon of {delay} to {horizon - delay}"
            if fits
            else f"too few, a loop would hold between chunks; {2 * delay} rows would do, or a rate of at most "
            f"{max(0.0, (horizon / 2 - 1) / slowest_s):.0f} Hz"
        )
    )
    rtc = metadata.get("rtc")
    if isinstance(rtc, Mapping):
        limit = rtc.get("max_delay")
        lines.append(
            f"real-time chunking: {', '.join(map(str, rtc.get('modes', ())))}"
            + (f", delay up to {limit}" if limit else "")
        )
    return lines, fits and not errors
