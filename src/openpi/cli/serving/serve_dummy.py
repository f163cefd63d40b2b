"""`openpi serve --dummy CONTRACT|RECIPE|DATASET`: a server without a checkpoint, for building the robot's side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.cli.console import check_range, command, configure_logging
from openpi.cli.serving._running import PROGRAM, run_server

if TYPE_CHECKING:
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.policies.contract import Contract
    from openpi.policies.dummy_policy import DummyPolicy


@dataclasses.dataclass(frozen=True)
class Args:
    """Serves a robot's contract without a checkpoint: stands still, or plays a recorded episode.

    Attributes:
        dummy: a contract (contract.json, or the folder of a checkpoint), a recipe, or a LeRobot dataset.
        hold: stand still; otherwise an episode is played, if there is a dataset.
        dataset: LeRobot dataset to play an episode of, where `dummy` is none.
        episode: its number.
        horizon: rows of a chunk, where `dummy` is a dataset.
        latency_ms: that an answer takes, as a model would.
        jitter_ms: it takes up to so much longer or shorter.
        drop: share of the questions that are answered with an error, 0 to 1.
        host: address to listen on; 0.0.0.0 opens the server to the network.
        port: 0 chooses a free one.
        port_file: file to write the port into once it is open.
        api_key: clients must send it; default: the environment variable OPENPI_API_KEY.
        tls_cert: certificate chain (PEM), for wss:// and https://.
        tls_key: its private key (PEM).
    """

    dummy: str
    hold: bool = False
    dataset: Path | None = None
    episode: int = 0
    horizon: int = 50
    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    drop: float = 0.0
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    api_key: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


@command(PROGRAM)
def main(argv: list[str]) -> int:
    import tyro

    from openpi.cli.serving.server import tls_context

    args = tyro.cli(Args, args=argv, prog=PROGRAM)
    configure_logging()
    check_range("port", args.port, 0, 65535)
    check_range("latency_ms", args.latency_ms, 0)
    check_range("jitter_ms", args.jitter_ms, 0, args.latency_ms)
    check_range("drop", args.drop, 0, 1)
    check_range("horizon", args.horizon, 1)
    options = {"tls": tls_context(args.tls_cert, args.tls_key)}
    policy = make(args)
    print(policy.contract.describe())
    place = {"host": args.host, "port": args.port, "port_file": args.port_file}
    return run_server(lambda: policy, **place, api_key=args.api_key, options=options)


def make(args: Args) -> DummyPolicy:
    """Raises ValueError, LookupError, OSError: `--dummy` is none of what it may be, or does not fit the dataset."""
    from openpi.policies.dummy_policy import DummyPolicy, standing_still

    contract, dataset = _contract(args)
    dataset = args.dataset or dataset
    chunk = standing_still(contract) if args.hold or dataset is None else _episode(args, contract, dataset)
    return DummyPolicy(contract, chunk, latency_ms=args.latency_ms, jitter_ms=args.jitter_ms, drop=args.drop)


def _contract(args: Args) -> tuple[Contract, Path | None]:
    """The contract, and the dataset that it comes from, if it does."""
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.policies.contract import CONTRACT_FILE, Contract

    place = Path(args.dummy).expanduser()
    if place.name == CONTRACT_FILE or (place / CONTRACT_FILE).is_file():
        return Contract.load(place.parent if place.name == CONTRACT_FILE else place), None
    if (place / "meta/info.json").is_file():
        return of_dataset(LeRobotMetadata.load(place), args.horizon), place
    if place.exists():
        raise ValueError(f"{place} is no contract ({CONTRACT_FILE}), no checkpoint with one, and no LeRobot dataset")
    rate_hz = LeRobotMetadata.load(args.dataset).fps if args.dataset else None
    return of_recipe(args.dummy, rate_hz), None


def of_recipe(name: str, control_hz: float | None) -> Contract:
    """What a checkpoint of a recipe would have, without its statistics.

    Raises:
        ValueError, OSError, ImportError: there is no such recipe, or the transforms of its robot bring no spec.
    """
    from openpi.policies.contract import Contract
    from openpi.training.config import get_config

    config = get_config(name)
    data = dataclasses.replace(config.data, assets=dataclasses.replace(config.data.assets, assets_dir=None))
    data_config: Any = data.create(config.assets_dirs, config.model)
    return Contract.build(dataclasses.replace(data_config, norm_stats=None), config.model, control_hz=control_hz)


def of_dataset(metadata: LeRobotMetadata, horizon: int) -> Contract:
    """A contract under the dataset's own keys."""
    from openpi.data.lerobot.features import dimension_names
    from openpi.policies.contract import Contract
    from openpi.policies.robot_spec import CameraSpec, VectorSpec, numbered

    def vector(key: str) -> VectorSpec:
        width = int(np.prod(metadata.features[key]["shape"]))
        names = dimension_names(metadata.features[key])
        return VectorSpec.uniform(key, names if len(names) == width else numbered(key, width), "unknown")

    actions = _action_key(metadata)
    state = [key for key in ("observation.state", "state") if key in metadata.features]
    return Contract(
        robot=metadata.robot_type or "unknown",
        model_type="dummy",
        cameras=tuple(CameraSpec(key, slot=None) for key in metadata.camera_keys),
        state=tuple(vector(key) for key in state[:1]),
        actions=dataclasses.replace(vector(actions), key="actions"),
        action_kind="as recorded",
        trained_relative=(False,) * vector(actions).width,
        action_horizon=horizon,
        control_hz=metadata.fps,
        default_prompt=next(iter(metadata.tasks.values()), ""),
    )


def _action_key(metadata: LeRobotMetadata) -> str:
    found = [key for key in ("action", "actions") if key in metadata.features]
    if not found:
        raise ValueError(
            f"{metadata.root} has neither 'action' nor 'actions' (its features: {', '.join(metadata.features)})"
        )
    return found[0]


def _episode(args: Args, contract: Contract, place: Path) -> Callable[[np.ndarray], np.ndarray]:
    from openpi.data.lerobot.reader import LeRobotDataset
    from openpi.policies.dummy_policy import RecordedEpisode

    dataset = LeRobotDataset(place, episodes=[args.episode], columns=())
    metadata = dataset.metadata
    action = _action_key(metadata)
    states = [key for key in ("observation.state", "state") if key in metadata.features]
    actions = dataset.column(action)
    contract.check_actions(actions.shape[1], where=f"the actions of {place} have")
    if not states or dataset.column(states[0]).shape[1] != len(contract.state_names):
        raise ValueError(
            f"{place} has no state of {len(contract.state_names)} values, by which the place in the episode is found: "
            f"{', '.join(contract.state_names)}. Use --hold"
        )
    return RecordedEpisode(dataset.column(states[0]).astype(float), actions.astype(float), contract.action_horizon)
