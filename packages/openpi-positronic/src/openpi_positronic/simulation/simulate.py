"""Episodes in the simulator, from world to recordings."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openpi.shared import run_metadata
from openpi_positronic.franka import stacking
from openpi_positronic.franka.env import CAMERAS
from openpi_positronic.franka.render import check_camera, make_renderer
from openpi_positronic.franka.world import MODEL_PATH, FrankaWorld
from openpi_positronic.raw_episodes import RawDatasetWriter
from openpi_positronic.simulation.drivers import Driver
from openpi_positronic.simulation.policies import RobotPolicy
from openpi_positronic.simulation.station import Observer, Station
from openpi_positronic.simulation.window import CameraWindow

logger = logging.getLogger(__name__)

_RETRY_EVERY_S = 1.0


@dataclass(frozen=True)
class SimulationOptions:
    """
    Attributes:
        output_dir: raw dataset that the episodes are added to; None records none.
        cameras: image signal -> camera of the model.
        camera_fps: pictures per simulated second.
        simulate_timeout: simulated time goes on while the policy thinks.
        observers: what else is recorded at every step.
        model_path: of the MuJoCo model.
        renderer: `rays` or `gl`.
        seed: of the scenes; None draws one, which is logged and recorded.
        connect_timeout_s: how long a policy may refuse connections before its first episode, as while it starts.
    """

    output_dir: Path | None = None
    cameras: Mapping[str, str] = field(default_factory=lambda: dict(CAMERAS))
    camera_fps: float = 15.0
    simulate_timeout: bool = False
    observers: Sequence[Observer] = (stacking.scores,)
    model_path: Path = MODEL_PATH
    renderer: str = "rays"
    seed: int | None = None
    connect_timeout_s: float = 30.0


def simulate(policy: RobotPolicy, driver: Driver, options: SimulationOptions) -> None:
    """Runs the driver's episodes. A failure keeps what was recorded.

    Raises:
        ValueError, FileNotFoundError: an option that cannot be, or no display for a window; before the policy is asked.
        RuntimeError, ConnectionError, TimeoutError: of the policy.
    """
    driver.check()
    world = FrankaWorld(options.model_path)
    for camera in options.cameras.values():
        check_camera(world, camera)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    with contextlib.ExitStack() as stack:
        window = stack.enter_context(contextlib.closing(CameraWindow())) if driver.show_gui else None
        _begin(policy, options.connect_timeout_s)
        stack.callback(getattr(policy, "close", lambda: None))
        station = Station(
            world,
            policy,
            renderer=make_renderer(world, options.renderer),
            cameras=options.cameras,
            camera_fps=options.camera_fps,
            observers=options.observers,
            recordings=None if options.output_dir is None else RawDatasetWriter(options.output_dir),
            seed=seed,
            simulate_timeout=options.simulate_timeout,
            on_frames=None if window is None else window.show,
            is_real_time=driver.is_real_time,
        )
        logger.info("scenes of seed %d", seed)
        if options.output_dir is not None:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            run_metadata.write(options.output_dir, {"seed": seed})
        driver.run(station)


def _begin(policy: RobotPolicy, timeout_s: float) -> None:
    """Resets the policy; waits for one whose server is not listening yet."""
    deadline = time.monotonic() + timeout_s
    is_told = False
    while True:
        try:
            return policy.reset()
        except ConnectionError as error:
            is_refused = isinstance(error.__cause__ or error, ConnectionRefusedError)
            if not is_refused or time.monotonic() + _RETRY_EVERY_S > deadline:
                raise
            if not is_told:
                logger.warning("%s. Trying again for %g s", error, timeout_s)
            is_told = True
            time.sleep(_RETRY_EVERY_S)
