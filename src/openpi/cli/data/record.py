"""`openpi record WORLD --episodes N --output DATASET`: demonstrations of a simulator's scripted expert.

Only episodes that succeed are kept, under the columns that the world's recipe trains on. A run that is stopped goes on
when the same command is given again. Exit codes: 0 = written; 1 = refused or failed; 2 = bad command line; 130 =
stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli import _world_words
from openpi.cli.console import command, configure_logging

if TYPE_CHECKING:
    from openpi.convert.demonstrations import Columns
    from openpi.envs.world import WorldConfig

PROGRAM = "openpi record"

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Args:
    """Records episodes of a world's scripted expert as a LeRobot dataset, under the columns of the world's recipe.

    Attributes:
        output: folder of the dataset.
        episodes: successful ones, in all; the tasks share them evenly.
        tasks: names or patterns, such as '*milk*'; default: all.
        seed: of the first attempt of each task; the others follow. Evaluations begin with 0: choose others.
        noise: standard deviation of a disturbance of what the robot does, in the units of its actions, grippers
            excepted; recorded is what the expert wants, so that a policy learns to come back.
        images: store cameras as images instead of video.
        overwrite: replace an existing dataset.
        workers: processes, each with a world of its own.
    """

    output: Path
    episodes: int = 50
    tasks: tuple[str, ...] = ()
    seed: int = 100_000
    noise: float = 0.0
    images: bool = False
    overwrite: bool = False
    workers: int = 1


@command(PROGRAM, RuntimeError)
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    configure_logging()
    _, world, args = _world_words.parse(words, Args, PROGRAM, "--output DATASET [options]")
    _record(world, args)
    logger.info("written: %s", args.output)


def columns_of(recipe: str) -> Columns:
    """Which columns a recipe reads: its repack transform, the other way round.

    Raises:
        ValueError: its robot or its repacking says too little.
    """
    from openpi.convert.demonstrations import Columns
    from openpi.policies.robot_spec import find_spec
    from openpi.shared.tree import flatten
    from openpi.training.config import get_config
    from openpi.transforms import RepackTransform

    config = get_config(recipe)
    # Without its statistics, which may have to be fetched.
    bare = dataclasses.replace(config.data, assets=dataclasses.replace(config.data.assets, assets_dir=None))
    data = bare.create(config.assets_dirs, config.model)
    repacks = [t for t in data.repack_transforms.inputs if isinstance(t, RepackTransform)]
    spec = find_spec(data.data_transforms.inputs)
    if len(repacks) != 1 or spec is None:
        raise ValueError(
            f"recipe {recipe} does not say which columns it reads: it needs one RepackTransform and a robot with a spec"
        )
    named = {key: str(column) for key, column in flatten(repacks[0].structure).items() if key != "prompt"}
    vectors = (*spec.state, spec.actions)
    return Columns(
        named,
        {vector.key: vector.names for vector in vectors},
        tuple("gripper" in name for name in spec.actions.names),
        spec.robot,
    )


def _record(world: WorldConfig, args: Args) -> None:
    from openpi.convert.demonstrations import Recording, record

    recording = Recording(
        world, columns_of(world.recipe), args.episodes, args.tasks, args.seed, args.noise, not args.images
    )
    record(recording, args.output, overwrite=args.overwrite, num_workers=args.workers)
