"""`positronic-inference sim`: a policy in charge of a simulated Franka that stacks cubes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import configuronic as cfn

from openpi_positronic.simulation.drivers import Driver
from openpi_positronic.simulation.policies import RobotPolicy
from openpi_positronic.simulation.station import Observer
from positronic import commands
from positronic.cfg import driver as drivers
from positronic.cfg import observers as observed
from positronic.cfg import policy as policies


@cfn.config(
    policy=policies.placeholder,
    driver=drivers.timed,
    camera_fps=15,
    simulate_timeout=False,
    output_dir=None,
    camera_dict=None,
    observers=observed.stack_cubes,
    mujoco_model_path=None,
    renderer="rays",
    seed=None,
    connect_timeout_s=30.0,
)
def sim(
    policy: RobotPolicy,
    driver: Driver,
    camera_fps: float,
    simulate_timeout: bool,
    output_dir: str | None,
    camera_dict: Mapping[str, str] | None,
    observers: Sequence[Observer],
    mujoco_model_path: str | None,
    renderer: str,
    seed: int | None,
    connect_timeout_s: float,
) -> None:
    """Episodes of stacking cubes, recorded as a raw dataset if `output_dir` is given."""
    from openpi_positronic.simulation.simulate import SimulationOptions, simulate

    commands.refuse_text(policy=policy, driver=driver, observers=observers)
    options = {
        "camera_fps": camera_fps,
        "simulate_timeout": simulate_timeout,
        "observers": observers,
        "renderer": renderer,
        "seed": seed,
        "connect_timeout_s": connect_timeout_s,
    }
    if camera_dict is not None:
        options["cameras"] = dict(camera_dict)
    if mujoco_model_path is not None:
        options["model_path"] = Path(commands.local_path(mujoco_model_path))
    with commands.sent_recordings(output_dir) as folder:
        simulate(policy, driver, SimulationOptions(output_dir=folder, **options))


def main() -> None:
    commands.run({"sim": sim})


if __name__ == "__main__":
    main()
