"""Demonstrations of the table-top as a LeRobot v3.0 dataset: `openpi demo record`."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from openpi.data.lerobot.writer import LeRobotWriter
from openpi_demo.tabletop import record, tasks
from openpi_demo.tabletop.world import CONTROL_HZ

ROBOT_TYPE = "tabletop"


@dataclass(frozen=True)
class RecordOptions:
    """Records demonstrations by the scripted expert as a LeRobot v3.0 dataset.

    Attributes:
        output: folder of the dataset; must not exist.
        episodes: number of demonstrations.
        task: what is demonstrated.
        prompts_per_scene: demonstrations that share a scene; more scenes teach more than more prompts.
        num_blocks: in every scene, 1 to 3.
        seed: of the first scene; the following scenes count up from it.
        num_workers: processes; the dataset does not depend on it.
        overwrite: replace an existing dataset.
    """

    output: Path
    episodes: int = 400
    task: Literal["pick", "reach", "place"] = "place"
    prompts_per_scene: int = 1
    num_blocks: int = 3
    seed: int = 0
    num_workers: int = 2
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}; expected at least 1.")
        most = len(tasks.GOALS[self.task])
        if self.task != tasks.REACH:
            most = most * self.num_blocks // len(tasks.BLOCK_COLOURS)
        if not 1 <= self.prompts_per_scene <= most:
            raise ValueError(
                f"prompts_per_scene is {self.prompts_per_scene}; a scene of {self.task!r} with {self.num_blocks} "
                f"blocks has 1 to {most} prompts."
            )


def record_dataset(options: RecordOptions, on_episode: Callable[[int, str], None]) -> Path:
    """Writes the dataset, whole or not at all.

    Args:
        on_episode: called with the number of episodes so far and the prompt of the latest.
    Raises:
        FileExistsError: the folder exists and `overwrite` is not set.
    """
    num_scenes = -(-options.episodes // options.prompts_per_scene)
    writer = LeRobotWriter(
        options.output,
        fps=CONTROL_HZ,
        features=record.lerobot_features(),
        robot_type=ROBOT_TYPE,
        overwrite=options.overwrite,
    )
    with writer:
        demonstrations = record.demonstrations(
            options.task,
            range(options.seed, options.seed + num_scenes),
            num_blocks=options.num_blocks,
            prompts_per_scene=options.prompts_per_scene,
            num_workers=options.num_workers,
        )
        for count, demonstration in enumerate(itertools.islice(demonstrations, options.episodes), start=1):
            writer.add_episode(record.lerobot_frames(demonstration), demonstration.prompt)
            on_episode(count, demonstration.prompt)
    return options.output
