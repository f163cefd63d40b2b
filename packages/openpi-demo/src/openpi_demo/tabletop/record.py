"""Demonstrations: the expert's episodes as arrays, streamed over seeds.

A scene is shown once per prompt that makes sense in it, so that within a scene only the words separate one
behaviour from another. Three of four demonstrations are disturbed while the labels stay clean (see `expert`).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np

from openpi.shared import worker_process
from openpi_demo.tabletop import arm, expert, tasks
from openpi_demo.tabletop.render import RayRenderer, project
from openpi_demo.tabletop.tasks import Goal
from openpi_demo.tabletop.world import CAMERAS, FRONT_CAMERA, WRIST_CAMERA, Scene, TabletopWorld

DISTURBED_FRACTION = 0.75
_MIN_VISIBLE_PIXELS = 2  # of the thing, before it counts as seen


@dataclass(frozen=True)
class Demonstration:
    """One successful episode of `t` frames, each taken just before its action.

    frames:
        front, wrist: uint8[t, h, w, 3], RGB.
        state: float32[t, 6], measured. action: float32[t, 6], absolute targets; layout in `arm.STATE_NAMES`.
        front_target_px, wrist_target_px: float32[t, 2], (column, row) of the asked block's centre there
            (of the plate's, if no block is asked for).
        front_target_visible, wrist_target_visible: bool[t], whether the centre is in the picture and the
            thing not hidden; where false the pixel is meaningless.
    """

    frames: Mapping[str, np.ndarray]
    prompt: str
    seed: int

    def __len__(self) -> int:
        return len(self.frames["action"])


def demonstrations(
    task: str,
    seeds: Iterable[int],
    *,
    num_blocks: int | None = None,
    prompts_per_scene: int | None = None,
    num_workers: int = 0,
) -> Iterator[Demonstration]:
    """Streams demonstrations: for each seed one scene, for each scene one episode per prompt, in order.

    Args:
        task: `pick`, `reach` or `place`.
        num_blocks: in every scene; None mixes scenes of one, two and three.
        prompts_per_scene: a random choice of that many prompts; None takes all of them.
        num_workers: processes; 0 records in this one. The result does not depend on it.
    """
    record = partial(record_scene, task, num_blocks=num_blocks, prompts_per_scene=prompts_per_scene)
    if num_workers == 0:
        yield from itertools.chain.from_iterable(map(record, seeds))
        return
    # Processes are spawned, not forked: the caller may hold threads (JAX does).
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=worker_process.start) as pool:
        seeds = iter(seeds)
        while batch := list(itertools.islice(seeds, 16 * num_workers)):  # endless streams fit in memory
            yield from itertools.chain.from_iterable(pool.map(record, batch, chunksize=4))


def record_scene(
    task: str, seed: int, *, num_blocks: int | None = None, prompts_per_scene: int | None = None
) -> list[Demonstration]:
    """All demonstrations of the scene that belongs to `seed`."""
    rng = np.random.default_rng([seed, 0])
    scene = tasks.sample_scene(rng, task, num_blocks=num_blocks)
    goals = tasks.goals_in(scene, task)
    if prompts_per_scene is not None:
        chosen = rng.permutation(len(goals))[:prompts_per_scene]
        goals = tuple(goals[i] for i in sorted(chosen))
    return [record_episode(scene, goal, seed=seed) for goal in goals]


def record_episode(scene: Scene, goal: Goal, *, seed: int) -> Demonstration:
    """One successful demonstration of `goal` in `scene`.

    `seed` decides whether and how the motion is disturbed. A disturbance that spoils the episode is redrawn.

    Raises:
        RuntimeError: even the undisturbed expert fails, so the scene cannot be solved.
    """
    rng = np.random.default_rng([seed, 1, *goal.prompt.encode()])
    path = expert.plan(scene, goal)
    if rng.random() < DISTURBED_FRACTION:
        for _ in range(5):
            frames = _execute(scene, goal, path, expert.disturbed(path, rng))
            if frames is not None:
                return Demonstration(frames, goal.prompt, seed)
    frames = _execute(scene, goal, path, path)
    if frames is None:
        raise RuntimeError(f"the expert cannot {goal.prompt!r} in {scene}.")
    return Demonstration(frames, goal.prompt, seed)


def patch_labels(pixels: np.ndarray, visible: np.ndarray, *, image_size: int, patch_size: int) -> np.ndarray:
    """Index of the image patch that holds each pixel, row by row from the top left; -1 where not visible.

    Args:
        pixels: float32[..., 2], (column, row). visible: bool[...].
    Returns:
        int32[...], below (image_size // patch_size) ** 2.
    """
    per_side = image_size // patch_size
    column, row = np.moveaxis(np.clip(pixels // patch_size, 0, per_side - 1).astype(np.int32), -1, 0)
    return np.where(visible, row * per_side + column, -1).astype(np.int32)


def lerobot_features(image_size: int = 64) -> dict[str, dict]:
    """LeRobot feature entries of what `lerobot_frames` returns; `fps` is `world.CONTROL_HZ`."""
    image = {"dtype": "image", "shape": [image_size, image_size, 3], "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "shape": [arm.STATE_DIM], "names": list(arm.STATE_NAMES)}
    return {"image": image, "wrist_image": dict(image), "state": vector, "actions": dict(vector)}


def lerobot_frames(demonstration: Demonstration) -> dict[str, np.ndarray]:
    """The columns of a LeRobot episode, named as in `lerobot_features`."""
    frames = demonstration.frames
    return {
        "image": frames[FRONT_CAMERA],
        "wrist_image": frames[WRIST_CAMERA],
        "state": frames["state"],
        "actions": frames["action"],
    }


def _execute(scene: Scene, goal: Goal, path: np.ndarray, executed_path: np.ndarray) -> dict[str, np.ndarray] | None:
    """Runs one path, then films it if it succeeded, else None: pictures cost more than physics."""
    executed = expert.actions(executed_path)
    world = TabletopWorld(scene)
    for action in executed:
        world.step(action)
    if not tasks.is_success(world, goal):
        return None
    return _film(TabletopWorld(scene), goal, executed, labels=expert.actions(path))


def _film(world: TabletopWorld, goal: Goal, executed: np.ndarray, *, labels: np.ndarray) -> dict[str, np.ndarray]:
    renderer = RayRenderer()
    rows = []
    for action, label in zip(executed, labels, strict=True):
        row = {"state": world.state, "action": label}
        for camera in CAMERAS:
            row |= _look(world, renderer, camera, goal)
        rows.append(row)
        world.step(action)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _look(world: TabletopWorld, renderer: RayRenderer, camera: str, goal: Goal) -> dict[str, np.ndarray]:
    picture, ids = renderer.render_with_ids(world, camera)
    centre, geom_id = _target(world, goal)
    pixel = project(world, camera, centre, renderer.size)
    num_seen = np.count_nonzero(ids == geom_id)
    return {
        camera: picture,
        f"{camera}_target_px": np.zeros(2, np.float32) if pixel is None else pixel.astype(np.float32),
        f"{camera}_target_visible": np.array(pixel is not None and num_seen >= _MIN_VISIBLE_PIXELS),
    }


def _target(world: TabletopWorld, goal: Goal) -> tuple[np.ndarray, int]:
    """Where the thing is that the goal starts with, and its geom: the block, or else the plate."""
    if goal.block is not None:
        return world.block_position(goal.block), world.block_geom_id(goal.block)
    assert goal.plate is not None
    return world.plate_position(goal.plate), world.plate_geom_id(goal.plate)
