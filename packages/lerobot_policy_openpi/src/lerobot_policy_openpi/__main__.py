"""Writes the policy folder that `lerobot-rollout --policy.path` takes: which server, and what of the robot is what.

python -m lerobot_policy_openpi --host 192.168.1.20 --output openpi_policy --robot.type=so101_follower --robot.port=...
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from lerobot_policy_openpi.configuration_openpi import OpenPIConfig
from lerobot_policy_openpi.processor_openpi import make_openpi_pre_post_processors
from openpi_client import connection
from openpi_client.robots import lerobot as robots
from openpi_client.robots.lerobot_features import Choices, FeatureMap
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 = written; 2 = robot and server do not fit, or there is no server."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args([word for word in words if not word.startswith("--robot.")])
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} exists; give another --output, or remove it")
        robot = robots.make_robot([word for word in words if word.startswith("--robot.")])
        key, port = connection.api_key_of(), connection.usual_port(args.host, args.port)
        with WebsocketClientPolicy(args.host, port, key, connect_timeout_s=args.timeout) as server:
            metadata = server.get_server_metadata()
        config = config_for(robot, metadata, robots.choices_of(args), host=args.host, port=port)
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        print(f"lerobot_policy_openpi: {error}", file=sys.stderr)
        return 2
    write(config, args.output)
    rate_hz = metadata["contract"].get("control_hz")
    fps = f" --fps={rate_hz:g}" if rate_hz else ""
    print(f"wrote {args.output}; now: lerobot-rollout --policy.path={args.output}{fps} --task=... --robot.type=...")
    return 0


def config_for(robot: object, metadata: Mapping[str, object], choices: Choices, **server: object) -> OpenPIConfig:
    """The config of a policy for a robot of LeRobot, which need not be connected.

    Args:
        server: `host`, `port` and other fields of `OpenPIConfig`.
    Raises:
        ValueError: the robot does not fit the server's contract.
    """
    units = {**robots.units_of(robot), **choices.units}
    observed, commanded = robot.observation_features, robot.action_features
    FeatureMap(observed, commanded, metadata, choices, units=units)
    state = [name for name, kind in observed.items() if kind is float]
    actions = [name for name, kind in commanded.items() if kind is float]
    pictures = {name: shape for name, shape in observed.items() if isinstance(shape, tuple) and shape[-1] == 3}
    inputs = {OBS_STATE: PolicyFeature(FeatureType.STATE, (len(state),))} if state else {}
    for name, (height, width, channels) in pictures.items():
        inputs[f"{OBS_IMAGES}.{name}"] = PolicyFeature(FeatureType.VISUAL, (channels, height, width))
    return OpenPIConfig(
        input_features=inputs,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (len(actions),))},
        device="cpu",
        state_names=state,
        action_names=actions,
        names=dict(choices.names),
        cameras=dict(choices.cameras),
        units=units,
        convert={name: list(pair) for name, pair in choices.convert.items()},
        fixed=dict(choices.fixed),
        **server,
    )


def write(config: OpenPIConfig, folder: Path) -> None:
    """The folder, complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config.save_pretrained(partial)
        for processor in make_openpi_pre_post_processors(config):
            processor.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lerobot_policy_openpi",
        description="Writes a policy folder for lerobot-rollout --policy.path.",
        epilog="--robot.type=TYPE and all other --robot.* are LeRobot's own flags, written with '='.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the server: a name, an address, or a URL")
    parser.add_argument("--port", type=int, help="default: 8000, or 443 of wss://...")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for the server")
    parser.add_argument("--output", type=Path, required=True, help="the folder; must not exist")
    robots.add_choices(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
