"""Asks a policy server for actions with random observations, and says how long it takes.

It needs neither a robot nor a simulator, and imports nothing of openpi but its client.

    python examples/simple_client/main.py --host 192.168.1.20 --env DROID
"""

import dataclasses
import enum
import logging
import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import tyro
import websockets.exceptions

from openpi_client import connection
from openpi_client.websocket_client_policy import WebsocketClientPolicy

logger = logging.getLogger("simple_client")

WARM_UP_REQUESTS = 2
PERCENTILES = (25, 50, 75, 90, 95, 99)


class EnvMode(enum.Enum):
    """Robots whose observations can be made up."""

    ALOHA = "aloha"
    ALOHA_SIM = "aloha_sim"
    DROID = "droid"
    LIBERO = "libero"


@dataclasses.dataclass(frozen=True)
class Args:
    """Asks a policy server for actions with random observations, and says how long it takes.

    Attributes:
        host: of the server, or a ws:// or wss:// URL.
        port: of the server; default: 8000, or 443 of wss://...
        api_key: of the server, if it wants one; default: the environment variable OPENPI_API_KEY.
        num_steps: timed requests.
        timing_file: Parquet file for the times, one column per series.
        env: whose observations to send.
    """

    host: str = "0.0.0.0"
    port: int | None = None
    api_key: str | None = None
    num_steps: int = 20
    timing_file: pathlib.Path | None = None
    env: EnvMode = EnvMode.ALOHA_SIM


class Timings:
    """Series of times in ms, by name."""

    def __init__(self) -> None:
        self._series: dict[str, list[float]] = defaultdict(list)

    def add(self, client_ms: float, reply: Mapping) -> None:
        """Adds the time of one request, and the times that its reply reports."""
        self._series["client_infer_ms"].append(client_ms)
        for source in ("server", "policy"):
            for name, value in reply.get(f"{source}_timing", {}).items():
                self._series[f"{source}_{name}"].append(float(value))

    def columns(self) -> dict[str, np.ndarray]:
        """name -> float64[n], sorted by name. A series that began late is padded in front with NaN.

        A server cannot report the time of the exchange before the first, for one.
        """
        length = max((len(values) for values in self._series.values()), default=0)
        return {
            name: np.concatenate([np.full(length - len(values), np.nan), values])
            for name, values in sorted(self._series.items())
        }

    def statistics(self) -> dict[str, dict[str, float]]:
        """name -> statistic -> ms."""
        return {name: _statistics(values[~np.isnan(values)]) for name, values in self.columns().items()}

    def write(self, path: pathlib.Path) -> None:
        """Writes a Parquet table with one column per series."""
        import pyarrow
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        # NaN is how a missing value looks in NumPy; in the table it is null.
        columns = {name: pyarrow.array(values, from_pandas=True) for name, values in self.columns().items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _statistics(values: np.ndarray) -> dict[str, float]:
    percentiles = {f"P{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {"Mean": float(values.mean()), "Std": float(values.std()), **percentiles}


def timing_table(statistics: Mapping[str, Mapping[str, float]]) -> str:
    """One row per series, times in ms with one decimal; the first column is aligned left, the others right."""
    header = ["ms", *next(iter(statistics.values()), {})]
    rows = [[name, *(f"{value:.1f}" for value in row.values())] for name, row in statistics.items()]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *cells in [header, *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def aloha_observation(rng: np.random.Generator) -> dict:
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    return {
        "state": np.ones(14),
        "images": {name: _pixels(rng, (3, 224, 224)) for name in cameras},
        "prompt": "do something",
    }


def droid_observation(rng: np.random.Generator) -> dict:
    return {
        "observation/exterior_image_1_left": _pixels(rng, (224, 224, 3)),
        "observation/wrist_image_left": _pixels(rng, (224, 224, 3)),
        "observation/joint_position": rng.random(7),
        "observation/gripper_position": rng.random(1),
        "prompt": "do something",
    }


def libero_observation(rng: np.random.Generator) -> dict:
    return {
        "observation/state": rng.random(8),
        "observation/image": _pixels(rng, (224, 224, 3)),
        "observation/wrist_image": _pixels(rng, (224, 224, 3)),
        "prompt": "do something",
    }


def _pixels(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return rng.integers(256, size=shape, dtype=np.uint8)


OBSERVATIONS: dict[EnvMode, Callable[[np.random.Generator], dict]] = {
    EnvMode.ALOHA: aloha_observation,
    EnvMode.ALOHA_SIM: aloha_observation,
    EnvMode.DROID: droid_observation,
    EnvMode.LIBERO: libero_observation,
}


def main(args: Args) -> None:
    make_observation = OBSERVATIONS[args.env]
    rng = np.random.default_rng()
    port = connection.usual_port(args.host, args.port)
    policy = WebsocketClientPolicy(args.host, port, connection.api_key_of(args.api_key))
    logger.info("Server metadata: %s", policy.get_server_metadata())

    for _ in range(WARM_UP_REQUESTS):
        policy.infer(make_observation(rng))

    timings = Timings()
    for _ in range(args.num_steps):
        observation = make_observation(rng)
        start = time.perf_counter()
        reply = policy.infer(observation)
        timings.add(1000 * (time.perf_counter() - start), reply)

    print(timing_table(timings.statistics()))
    if args.timing_file is not None:
        timings.write(args.timing_file)
        logger.info("Wrote %s", args.timing_file)


def with_env_in_capitals(words: list[str]) -> list[str]:
    """As `serve_policy.py` takes it: `--env droid`, `--env=droid`."""
    before = ["", *words]
    return [
        word.upper() if before[i] == "--env" else f"--env={word[6:].upper()}" if word.startswith("--env=") else word
        for i, word in enumerate(words)
    ]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    try:
        main(tyro.cli(Args, args=with_env_in_capitals(sys.argv[1:])))
    except (RuntimeError, OSError, websockets.exceptions.InvalidHandshake) as refused:
        sys.exit(f"simple_client: {refused}")
