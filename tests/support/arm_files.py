"""Files of the tiny arm that tests hand to commands: statistics, a checkpoint, an observation."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tiny_arm
from openpi.cli import main as cli_main
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.contract import Contract
from openpi.policies.libero_policy import make_libero_example
from openpi.shared import normalize
from openpi.shared.tree import flatten, unflatten
from openpi.training import recipe_io
from openpi.weights import orbax_io


def arm_stats(**changes: Callable[[normalize.NormStats], normalize.NormStats]) -> dict[str, normalize.NormStats]:
    """Statistics wide enough for the whole dataset; `changes` replace those of one key."""
    dataset = LeRobotDataset(tiny_arm.recipe.data.repo_id)
    stats = {}
    for key, width in (("state", 8), ("actions", 7)):
        running = normalize.RunningStats()
        running.update(dataset.column(key))
        found = running.get_statistics()
        # Deltas to the state reach further than the recorded actions.
        spread = np.full(width, 4.0)
        stats[key] = normalize.NormStats(found.mean, found.std, found.mean - spread, found.mean + spread)
    return {key: changes.get(key, lambda entry: entry)(entry) for key, entry in stats.items()}


def write_stats(folder: Path, **changes: Any) -> None:
    """Where `tiny_arm` reads them when run in `folder`."""
    normalize.save(folder / "assets" / "tiny_arm" / "arm", arm_stats(**changes))


def arm_params() -> dict[str, Any]:
    """Random parameters of the tiny arm's model, none of them zero; cheaper than compiling its initialisation."""
    rng = np.random.default_rng(3)
    flat = flatten(tiny_arm.MODEL.abstract_params())
    return unflatten({path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in flat.items()})


def write_checkpoint(folder: Path, *, camera_means: dict | None = None) -> Path:
    """A step directory as training leaves it, but for the optimiser: weights, statistics, recipe, contract."""
    config = tiny_arm.recipe
    folder.mkdir(parents=True)
    orbax_io.write_params(folder / "params", arm_params())
    normalize.save(folder / "assets" / "arm", arm_stats())
    recipe_io.save_recipe(folder, config)
    data_config = config.data.create(config.assets_dirs, config.model)
    Contract.build(data_config, config.model, camera_means=camera_means).save(folder)
    return folder


def arm_observation(**changes: Any) -> dict[str, Any]:
    """What the arm's client sends, inside the range of the statistics."""
    rng = np.random.default_rng(0)
    images = {
        key: rng.integers(256, size=(32, 48, 3), dtype=np.uint8)
        for key in ("observation/image", "observation/wrist_image")
    }
    observation = {
        **make_libero_example(),
        **images,
        "observation/state": np.full(8, 0.1),
        "prompt": "pick up the cube",
    }
    return {**observation, **changes}


def run(*argv: str) -> int:
    """`openpi ...` in this process; puts the log handlers of the test run back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return cli_main.main([str(word) for word in argv])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
