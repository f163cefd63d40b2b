"""Any robot of LeRobot, plug-ins included, in our control loop (docs/how-to/lerobot.md).

    python -m openpi_client.robots.lerobot --robot.type=so101_follower --robot.port=/dev/ttyACM0 \\
        --robot.cameras='{front: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}}' \\
        --host 192.168.1.20 --prompt "fold the towel"

`--robot.*` are LeRobot's own flags. LeRobot is imported when a robot is made, not before.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import pkgutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from typing_extensions import Protocol

from openpi_client import connection, realtime
from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime import hanging
from openpi_client.realtime.loop import end_by_exception
from openpi_client.realtime.requests import Requester
from openpi_client.realtime.robot import check_names
from openpi_client.robots.lerobot_features import Choices, FeatureMap
from openpi_client.robots.libraries import need
from openpi_client.websocket_client_policy import WebsocketClientPolicy

logger = logging.getLogger(__name__)

# LeRobot's words for how a motor's values are normalized -> ours for units.
_UNITS = {"degrees": "deg", "range_m100_100": "-100..100", "range_0_100": "0..100"}
# What of a command a robot may round without being told of.
_CLIPPED = 1e-3
_POLL_S = 0.01


class LeRobot(Protocol):
    """What we use of `lerobot.robots.Robot`."""

    @property
    def observation_features(self) -> Metadata: ...
    @property
    def action_features(self) -> Metadata: ...
    def connect(self) -> None: ...
    def disconnect(self) -> None: ...
    def get_observation(self) -> Metadata: ...
    def send_action(self, action: Mapping[str, object]) -> Metadata: ...


class LeRobotRobot(realtime.Robot):
    """A robot of LeRobot that has the joints and cameras of a server's contract, by name.

    Attributes:
        features: what of the robot is what of the policy.
    """

    def __init__(
        self,
        robot: LeRobot,
        metadata: Mapping[str, object],
        *,
        prompt: Optional[str] = None,
        choices: Optional[Choices] = None,
    ) -> None:
        """
        Args:
            robot: need not be connected yet.
            metadata: of the server, as `Requester.metadata`.
            prompt: None = the server's own.
        Raises:
            ValueError: names, units or kinds of actions do not fit; the text says which, and what to give.
        """
        self.features = FeatureMap(
            robot.observation_features, robot.action_features, metadata, choices, units=units_of(robot)
        )
        self.action_names, self.state_names = self.features.action_names, self.features.state_names
        check_names(self, metadata)
        self._robot, self._prompt = robot, prompt
        self._bgr = {name for name, camera in _cameras(robot).items() if _color_mode(camera) == "bgr"}
        self._clipped: Dict[str, float] = {}

    def observe(self) -> Observation:
        return self.features.observation(self._raw(), self._prompt)

    def pose(self) -> Optional[np.ndarray]:
        return self.features.pose(self._robot.get_observation())

    def apply(self, action: np.ndarray) -> None:
        wanted = self.features.action(action)
        sent = self._robot.send_action(wanted)
        for name, value in wanted.items():
            if name not in self._clipped and abs(float((sent or wanted).get(name, value)) - value) > _CLIPPED:
                self._clipped[name] = value
                logger.warning(
                    "LeRobot sent %s instead of %.4g to '%s' (max_relative_target?)", sent[name], value, name
                )

    def _raw(self) -> Mapping[str, object]:
        raw = self._robot.get_observation()
        return {name: value[..., ::-1] if name in self._bgr else value for name, value in raw.items()}


def units_of(robot: object) -> Dict[str, str]:
    """Units of a robot's positions by feature, as its motors tell; empty where it has none that LeRobot knows."""
    motors = getattr(getattr(robot, "bus", None), "motors", None)
    if not isinstance(motors, Mapping):
        return {}
    modes = {name: str(getattr(getattr(motor, "norm_mode", ""), "value", "")) for name, motor in motors.items()}
    return {f"{name}.pos": _UNITS[mode] for name, mode in modes.items() if mode in _UNITS}


def _cameras(robot: object) -> Mapping[str, object]:
    cameras = getattr(robot, "cameras", None)
    return cameras if isinstance(cameras, Mapping) else {}


def _color_mode(camera: object) -> str:
    mode = getattr(camera, "color_mode", "rgb")
    return str(getattr(mode, "value", mode)).lower()


# Making one


def make_robot(arguments: Sequence[str]) -> LeRobot:
    """A robot from LeRobot's own flags, `--robot.type=... --robot.port=...`; not connected.

    Raises:
        ImportError: LeRobot is not installed.
        SystemExit: as argparse; flags that LeRobot does not know.
    """
    draccus, robots = (_library(name) for name in ("draccus", "lerobot.robots"))
    _register_everything()
    command_line: Any = dataclasses.make_dataclass("CommandLine", [("robot", robots.RobotConfig)])
    return robots.make_robot_from_config(draccus.parse(config_class=command_line, args=list(arguments)).robot)


def _library(name: str) -> ModuleType:
    return need(name, "pip install lerobot (Python 3.12 or later) in this environment")


def _register_everything() -> None:
    """LeRobot knows types of robots and cameras by the modules that were imported."""
    for package in (_library("lerobot.cameras"), _library("lerobot.robots")):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if module.ispkg:
                with contextlib.suppress(ImportError):  # what it needs is not installed
                    importlib.import_module(module.name)
    _library("lerobot.utils.import_utils").register_third_party_plugins()


@contextlib.contextmanager
def connected(robot: LeRobot) -> Iterator[LeRobot]:
    """Disconnects at the end, however it ends. LeRobot may ask for a calibration when it connects."""
    try:
        robot.connect()
    except BaseException:
        # It may say that it is not connected; why not is said already.
        with contextlib.suppress(Exception), hanging.told("LeRobot's disconnect()"):
            robot.disconnect()
        raise
    try:
        yield robot
    finally:
        with hanging.told("LeRobot's disconnect()"):
            robot.disconnect()


# The program


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit codes: 0 = the episode is over; 1 = it could not go on; 2 = something is wrong before it."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args([word for word in words if not word.startswith("--robot.")])
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    end_by_exception()
    hanging.end_program()
    try:
        robot = make_robot([word for word in words if word.startswith("--robot.")])
        with contextlib.closing(_requester(args)) as policy:
            ours = LeRobotRobot(robot, policy.metadata, prompt=args.prompt, choices=choices_of(args))
            with connected(robot):
                return _dry_run(ours, policy) if args.dry_run else _run(ours, policy, args)
    except (ImportError, ValueError, OSError) as error:
        print(f"openpi_client.robots.lerobot: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The flags of the program, but for those of LeRobot."""
    parser = argparse.ArgumentParser(
        prog="python -m openpi_client.robots.lerobot",
        description="Runs a robot of LeRobot with a policy server.",
        epilog="--robot.type=TYPE and all other --robot.* are LeRobot's own flags, written with '='.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the server: a name, an address, or a URL")
    parser.add_argument("--port", type=int, help="default: 8000, or 443 of wss://...")
    parser.add_argument("--api-key", help="of the server; default: OPENPI_API_KEY")
    parser.add_argument("--prompt", help="the task in words; without it, the server's own")
    parser.add_argument("--max-s", type=float, help="seconds of the episode; without it, until Ctrl-C")
    parser.add_argument("--rate-hz", type=float, help="of the ticks; without it, that of the training data")
    parser.add_argument("--speed", type=float, default=1.0, help="0.25 plays at a quarter of the recorded speed")
    parser.add_argument("--log-folder", type=Path, help="gets a folder per episode")
    parser.add_argument(
        "--dry-run", action="store_true", help="asks once, prints what would be commanded, moves nothing"
    )
    add_choices(parser)
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Flags for what names do not decide: those of `Choices`."""
    group = parser.add_argument_group("where names do not decide (may be repeated)")
    pair: Dict[str, Any] = {"action": "append", "default": [], "type": _pair}
    group.add_argument("--name", metavar="DIMENSION=FEATURE", help="of the contract = of the robot", **pair)
    group.add_argument("--camera", metavar="KEY=CAMERA", help="of the contract = of the robot", **pair)
    group.add_argument("--unit", metavar="FEATURE=UNIT", help="of the robot's values, such as deg", **pair)
    group.add_argument(
        "--convert", metavar="FEATURE=SCALE,OFFSET", help="the policy reads SCALE * value + OFFSET", **pair
    )
    group.add_argument("--fixed", metavar="FEATURE=VALUE", help="for what the policy does not command", **pair)


def choices_of(args: argparse.Namespace) -> Choices:
    """
    Raises:
        ValueError: something is given twice, or is no number.
    """
    given = {name: _dict(name, getattr(args, name)) for name in ("name", "camera", "unit", "convert", "fixed")}
    return Choices(
        names=given["name"],
        cameras=given["camera"],
        units=given["unit"],
        convert={name: _two_numbers(name, text) for name, text in given["convert"].items()},
        fixed={name: _number(name, text) for name, text in given["fixed"].items()},
    )


def _pair(text: str) -> Tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r}; expected NAME=VALUE")
    return name, value


def _dict(flag: str, pairs: List[Tuple[str, str]]) -> Dict[str, str]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"--{flag} has {', '.join(sorted({n for n in names if names.count(n) > 1}))} twice")
    return found


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"'{text}' for {name} is no finite number")
    return value


def _two_numbers(name: str, text: str) -> Tuple[float, float]:
    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"'{text}' for {name}; expected SCALE,OFFSET")
    return _number(name, parts[0]), _number(name, parts[1])


def _requester(args: argparse.Namespace) -> Requester:
    key, port = connection.api_key_of(args.api_key), connection.usual_port(args.host, args.port)
    if os.name == "posix":
        return realtime.ProcessRequester(args.host, port, key)
    return realtime.ThreadRequester(WebsocketClientPolicy(args.host, port, key))


def _run(robot: LeRobotRobot, policy: Requester, args: argparse.Namespace) -> int:
    loop = realtime.ControlLoop(
        robot,
        policy,
        hold=robot.features.hold,
        rate_hz=args.rate_hz,
        safety=realtime.Safety(speed=args.speed),
        log_folder=args.log_folder,
    )
    try:
        summary = loop.run(max_s=args.max_s)
    except KeyboardInterrupt:
        return 0
    print(json.dumps({"end": summary["end"], "ticks": summary["ticks"]}))
    return 0 if summary["end"] in ("time is over", "complete") else 1


def _dry_run(robot: LeRobotRobot, policy: Requester) -> int:
    """Asks once, and prints for each joint where it is, and where the first and the last row would send it."""
    pose = robot.pose()
    policy.submit(1, robot.observe())
    answer = policy.poll()
    while answer is None:
        time.sleep(_POLL_S)
        answer = policy.poll()
    if answer.result is None:
        print(f"the server did not answer: {answer.error}", file=sys.stderr)
        return 1
    rows = np.asarray(answer.result["actions"], np.float64)
    wanted = [robot.features.action(row) for row in (rows[0], rows[-1])]
    now = {} if pose is None else robot.features.action(pose)
    print(f"{'':24}{'now':>12}{'row 0':>12}{f'row {len(rows) - 1}':>12}")
    for name in wanted[0]:
        values = [now.get(name, np.nan), *(row[name] for row in wanted)]
        print(f"{name:24}" + "".join(f"{value:12.4g}" for value in values))
    for warning in answer.result.get("warnings", ()):
        print(f"warning: {warning}")
    print("nothing was commanded (--dry-run)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
