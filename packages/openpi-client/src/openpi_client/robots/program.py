"""What all programs of robots share: flags, a loop between a robot and a server that fit, and how a program ends.

robot program    ProcessRequester, ticks of the wall clock           running(make_robot, host, port, args, ...)
world program    the world waits for the policy, as benchmarks do     playing(world, host, port, args, ...)
"""

import contextlib
import dataclasses
import logging
import math
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type, TypeVar

from typing_extensions import Literal

from openpi_client import connection, realtime
from openpi_client.realtime import hanging, strategies
from openpi_client.realtime.loop import end_by_exception
from openpi_client.robots import flags
from openpi_client.robots.dry_run import DryRun
from openpi_client.robots.fit import check_fit
from openpi_client.robots.worlds import World
from openpi_client.websocket_client_policy import WebsocketClientPolicy

A = TypeVar("A")

logger = logging.getLogger(__name__)

# A simulator takes whatever it is told, and a benchmark is to see it.
_UNBOUNDED = realtime.Limits(low=-math.inf, high=math.inf)


@dataclasses.dataclass(frozen=True)
class WorldArgs:
    """Flags of every program.

    Attributes:
        api_key: of the server, if it wants one; default: the environment variable OPENPI_API_KEY.
        dry_run: print what would be commanded, and move nothing.
        log_dir: gets a folder for each episode, with what happened in each tick; None = no log.
    """

    api_key: Optional[str] = None
    dry_run: bool = False
    log_dir: Optional[Path] = Path("data/logs")


@dataclasses.dataclass(frozen=True)
class RobotArgs(WorldArgs):
    """Flags of every program of a robot.

    Attributes:
        strategy: auto = trained or guided real-time chunking, where the server offers it, else receding: asks while it
            plays. synchronous = holds while it asks, as published programs do.
        speed: 0.25 plays at a quarter of the recorded speed, for a first run.
        blend_s: seconds from where the robot is to where the policy begins; 0 = it jumps.
        accept_warnings: start although the server finds the first observation suspicious.
    """

    strategy: Literal["auto", "receding", "synchronous"] = "auto"
    speed: float = 1.0
    blend_s: float = 5.0
    accept_warnings: bool = False


def main(run: Callable[[A], None], kind: Type[A], *, prefix: str = "", argv: Optional[Sequence[str]] = None) -> None:
    """Runs a program: its flags, logging, and what it cannot do as one line. Ctrl-C ends it with code 130, and SIGTERM,
    as of a container that is stopped, with 143: the robot is let go, whatever it was at. A driver that never returns
    from that ends it with 1, after `hanging.LONGEST_S`."""
    args = flags.parse(kind, argv, prefix=prefix)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    end_by_exception()
    hanging.end_program()
    try:
        run(args)
    except KeyboardInterrupt:
        logger.info("interrupted; the robot holds")
        sys.exit(130)
    except (ValueError, LookupError, ImportError, OSError, RuntimeError, EOFError) as refused:
        sys.exit(f"{Path(sys.argv[0]).parent.name}: {refused}")


@contextlib.contextmanager
def running(
    make_robot: Callable[[Mapping[str, object]], realtime.Robot],
    host: str,
    port: Optional[int],
    args: RobotArgs,
    *,
    rows: int,
    rate_hz: Optional[float] = None,
    strategy: Optional[strategies.Strategy] = None,
    image_layout: Literal["hwc", "chw"] = "hwc",
) -> Iterator[Tuple[realtime.Robot, realtime.ControlLoop]]:
    """A robot, or with `dry_run` what prints for it, and its loop with a server; both are closed at the end.

    Args:
        port: None = the usual one, `connection.usual_port`.
        make_robot: connects it, and does not move it. Called with what the server says of its policy.
        rows: of a chunk that are played from one question to the next, at least.
        rate_hz: of the ticks, where neither the robot nor the server's contract has a rate.
        strategy: another one than `args.strategy` says.
    Raises:
        ConnectionError: no server, or no robot.
        ValueError: they do not fit.
    """
    with contextlib.ExitStack() as stack:
        key, port = connection.api_key_of(args.api_key), connection.usual_port(host, port)
        policy = stack.enter_context(realtime.ProcessRequester(host, port, key, image_layout=image_layout))
        robot = make_robot(policy.metadata)
        stack.callback(_let_go, robot)
        robot = DryRun(robot) if args.dry_run else robot
        check_fit(robot, policy.metadata, rows=rows)
        loop = realtime.ControlLoop(
            robot,
            policy,
            strategy=strategy or strategy_of(args.strategy, rows, policy.metadata),
            safety=realtime.Safety(blend_s=args.blend_s, speed=args.speed, accept_warnings=args.accept_warnings),
            rate_hz=robot.rate_hz or rate_of(policy.metadata) or rate_hz,
            log_folder=args.log_dir,
        )
        yield robot, loop


def _let_go(robot: realtime.Robot) -> None:
    with hanging.told("the robot's close()"):
        robot.close()


@contextlib.contextmanager
def playing(
    world: World, host: str, port: Optional[int], args: WorldArgs, *, rows: int
) -> Iterator[Tuple[realtime.Robot, realtime.ControlLoop]]:
    """A simulated world and its loop with a server: it waits for each answer, and plays `rows` rows of it.

    A row is a step of the world, whatever its rate is called.

    Args:
        world: reset.
        port: as of `running`.
    Raises:
        ConnectionError, ValueError: as `running`.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(world.close)
        key, port = connection.api_key_of(args.api_key), connection.usual_port(host, port)
        policy = stack.enter_context(WebsocketClientPolicy(host, port, key, max_age_s=None))
        robot = DryRun(world) if args.dry_run else world
        clock = realtime.VirtualClock(on_advance=(lambda seconds: None) if args.dry_run else world.advance)
        metadata = policy.get_server_metadata()
        check_fit(robot, metadata, rows=rows)
        yield (
            robot,
            realtime.ControlLoop(
                robot,
                realtime.SimulatedLatency(policy, clock, [0.0]),
                strategy=realtime.Synchronous(rows),
                safety=realtime.Safety(blend_s=0, frozen_after_s=None, accept_warnings=True, limits=_UNBOUNDED),
                rate_hz=rate_of(metadata) or world.step_hz,
                log_folder=args.log_dir,
                clock=clock,
            ),
        )


def played(loop: realtime.ControlLoop, world: World, most_steps: int) -> Dict[str, object]:
    """An episode of a world, until it is over or has had so many steps; its summary.

    Raises:
        ConnectionError: an answer was an error, or of no use. That is no failure of the episode: it does not count.
    """

    def failures() -> List[str]:
        events = [] if loop.last_log is None else loop.last_log.events
        return [event["error"] for event in events if event["kind"] == "failed"]

    # A server that is gone is waited for at each answer: no world is to be held for a day of that.
    summary = loop.run(max_s=seconds(most_steps, loop.rate_hz), until=lambda: world.is_over or bool(failures()))
    if failures():
        raise ConnectionError(f"an answer is of no use, so the episode does not count: {failures()[0]}")
    return summary


def strategy_of(name: str, rows: int, metadata: Mapping[str, object]) -> strategies.Strategy:
    """The strategy by the word of its flag, for `rows` rows between two questions."""
    receding = realtime.Receding(rows)
    known: Dict[str, strategies.Strategy] = {
        "auto": dataclasses.replace(strategies.best(metadata), execution_horizon=rows, fallback=receding),
        "receding": receding,
        "synchronous": realtime.Synchronous(rows),
    }
    return known[name]


def seconds(steps: int, rate_hz: float) -> float:
    """`max_s` for a number of ticks: half a tick less, so that no rounding adds one."""
    return (steps - 0.5) / rate_hz


def rate_of(metadata: Mapping[str, object]) -> Optional[float]:
    """Rows per second, by a server's contract; None = it does not say."""
    contract = metadata.get("contract")
    return contract.get("control_hz") if isinstance(contract, Mapping) else None
