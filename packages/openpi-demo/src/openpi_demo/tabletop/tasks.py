"""What can be asked for on the table-top, scenes in which to ask it, and when it is done.

Three tasks. A scene alone never tells what to do: the prompt names the object, the picture tells where it is.
"""

from dataclasses import dataclass

import numpy as np

from openpi_demo.tabletop import arm
from openpi_demo.tabletop import world as world_lib
from openpi_demo.tabletop.world import BLOCK_COLOURS, PLATE_COLOURS, Block, Plate, Scene, TabletopWorld

PICK = "pick"
REACH = "reach"
PLACE = "place"

LIFTED_M = 0.08  # the asked block's centre is above this ...
UNTOUCHED_M = 0.06  # ... and every other block's below
ON_PLATE_M = 0.045  # horizontal distance between the centres of block and plate
RELEASED = 0.75  # gripper opening; a gripper closed on a block measures about 0.48
ABOVE_PLATE_M = 0.03  # horizontal distance between the finger tips and the centre of the plate ...
LOW_M = 0.065  # ... while the tips are below this

PLATE_X_M = 0.22
PLATE_Y_M = 0.17  # one plate on each side; which one is white is random
MIN_BLOCK_DISTANCE_M = 0.08  # room for an open finger beside the neighbour

_RADIUS_M = (0.17, 0.31)
_BEARING_RAD = np.deg2rad(40)
_PLACE_Y_M = 0.10
_YAW_RAD = np.deg2rad(20)  # a turned block squares itself up between the closing fingers
_START_M = (np.array([0.18, -0.03, 0.15]), np.array([0.22, 0.03, 0.19]))
_REACH_START_M = (np.array([0.16, -0.16, 0.08]), np.array([0.28, 0.16, 0.19]))  # from anywhere, with room below
_PICK_BESIDE_PLATES = 0.5  # share of the scenes for picking that have plates in them
_BLOCK_COUNT_PROBABILITIES = (0.4, 0.3, 0.3)


@dataclass(frozen=True)
class Goal:
    """What a prompt asks for: lift `block`; go to `plate`; or, when both are given, put the one on the other."""

    block: str | None = None
    plate: str | None = None

    def __post_init__(self) -> None:
        if self.block is None and self.plate is None:
            raise ValueError("a goal names a block, a plate, or both.")

    @property
    def task(self) -> str:
        if self.plate is None:
            return PICK
        return REACH if self.block is None else PLACE

    @property
    def prompt(self) -> str:
        return {
            PICK: f"pick up the {self.block} block",
            REACH: f"move to the {self.plate} plate",
            PLACE: f"put the {self.block} block on the {self.plate} plate",
        }[self.task]


GOALS = {
    PICK: tuple(Goal(block) for block in BLOCK_COLOURS),
    REACH: tuple(Goal(plate=plate) for plate in PLATE_COLOURS),
    PLACE: tuple(Goal(block, plate) for block in BLOCK_COLOURS for plate in PLATE_COLOURS),
}
PROMPTS = {task: tuple(goal.prompt for goal in goals) for task, goals in GOALS.items()}
_GOAL_OF_PROMPT = {goal.prompt: goal for goals in GOALS.values() for goal in goals}


def parse_prompt(prompt: str) -> Goal:
    """The goal that a prompt names.

    Raises:
        ValueError: nothing here answers to this prompt.
    """
    goal = _GOAL_OF_PROMPT.get(prompt.strip().rstrip(".").lower())
    if goal is None:
        raise ValueError(f"prompt is {prompt!r}; expected one of: {'; '.join(sorted(_GOAL_OF_PROMPT))}.")
    return goal


def goals_in(scene: Scene, task: str) -> tuple[Goal, ...]:
    """Goals of a task that name only what the scene holds."""
    blocks = {None, *(block.colour for block in scene.blocks)}
    plates = {None, *(plate.colour for plate in scene.plates)}
    return tuple(goal for goal in GOALS[task] if goal.block in blocks and goal.plate in plates)


def sample_scene(rng: np.random.Generator, task: str = PICK, *, num_blocks: int | None = None) -> Scene:
    """Draws a scene; `num_blocks` None draws 1, 2 or 3.

    Raises:
        ValueError: the task is unknown or the number of blocks is not 1, 2 or 3.
    """
    if task not in GOALS:
        raise ValueError(f"task is {task!r}; expected one of {sorted(GOALS)}.")
    if num_blocks is None:
        num_blocks = 1 + int(rng.choice(3, p=_BLOCK_COUNT_PROBABILITIES))
    if not 1 <= num_blocks <= len(BLOCK_COLOURS):
        raise ValueError(f"num_blocks is {num_blocks}; expected 1 to {len(BLOCK_COLOURS)}.")
    colours = sorted(rng.permutation(BLOCK_COLOURS)[:num_blocks].tolist(), key=BLOCK_COLOURS.index)
    has_plates = task != PICK or rng.random() < _PICK_BESIDE_PLATES
    positions = _sample_positions(rng, num_blocks, max_y=_PLACE_Y_M if has_plates else np.inf)
    yaws = rng.uniform(-_YAW_RAD, _YAW_RAD, num_blocks)
    blocks = tuple(
        Block(colour, float(x), float(y), float(yaw))
        for colour, (x, y), yaw in zip(colours, positions, yaws, strict=True)
    )
    plates = _sample_plates(rng) if has_plates else ()
    start = _REACH_START_M if task == REACH else _START_M
    return Scene(blocks, plates, tip=tuple(rng.uniform(*start).tolist()))


def is_success(world: TabletopWorld, goal: Goal) -> bool:
    """Whether the world, as it is now, is what the goal asks for."""
    if goal.plate is None:
        assert goal.block is not None
        return _is_lifted(world, goal.block)
    plate = next(plate for plate in world.scene.plates if plate.colour == goal.plate)
    return _is_at(world, plate) if goal.block is None else _is_on(world, goal.block, plate)


def _is_lifted(world: TabletopWorld, colour: str) -> bool:
    heights = {block.colour: world.block_position(block.colour)[2] for block in world.scene.blocks}
    is_lifted = bool(heights.pop(colour) > LIFTED_M)
    return is_lifted and all(height < UNTOUCHED_M for height in heights.values())


def _is_at(world: TabletopWorld, plate: Plate) -> bool:
    x, y, z = arm.tip_for_joints(world.state[: arm.NUM_JOINTS])
    return bool(np.hypot(x - plate.x, y - plate.y) < ABOVE_PLATE_M and z < LOW_M)


def _is_on(world: TabletopWorld, colour: str, plate: Plate) -> bool:
    x, y, z = world.block_position(colour)
    resting = world_lib.PLATE_HEIGHT_M + world_lib.BLOCK_HALF_M
    is_centred = np.hypot(x - plate.x, y - plate.y) < ON_PLATE_M
    return bool(is_centred and abs(z - resting) < 0.008 and world.state[-1] > RELEASED)


def _sample_positions(rng: np.random.Generator, count: int, max_y: float) -> np.ndarray:
    """float64[count, 2], metres, at least `MIN_BLOCK_DISTANCE_M` apart, by rejection."""
    while True:
        radius = rng.uniform(*_RADIUS_M, count)
        bearing = rng.uniform(-_BEARING_RAD, _BEARING_RAD, count)
        xy = np.stack([radius * np.cos(bearing), radius * np.sin(bearing)], axis=-1)
        gaps = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + np.where(np.eye(count), np.inf, 0.0)
        if gaps.min() >= MIN_BLOCK_DISTANCE_M and np.abs(xy[:, 1]).max() <= max_y:
            return xy


def _sample_plates(rng: np.random.Generator) -> tuple[Plate, ...]:
    side = 1.0 if rng.random() < 0.5 else -1.0
    white, black = PLATE_COLOURS
    return (Plate(white, PLATE_X_M, side * PLATE_Y_M), Plate(black, PLATE_X_M, -side * PLATE_Y_M))
