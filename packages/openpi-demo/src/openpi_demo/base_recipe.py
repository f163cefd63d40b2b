"""How the shipped base was made: `python -m openpi_demo.base_recipe --work FOLDER`.

Records demonstrations of "pick up the {colour} block" and "move to the {colour} plate" with the patch of the asked
thing in each picture, trains `RECIPE` by the ordinary loop, and writes the servable checkpoint: bfloat16 weights
without the pointing head, statistics, tokenizer, recipe and contract.
"""

import argparse
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np

from openpi import transforms
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.models.model_config import BaseModelConfig
from openpi.policies.robot_spec import RobotSpec
from openpi.policies.tabletop_policy import TABLETOP_SPEC, TabletopInputs, TabletopOutputs
from openpi.shared.frameworks import split_processor
from openpi.shared.tree import Leaves
from openpi.training import recipe_io
from openpi.training.config import TrainConfig, get_config
from openpi.training.data_config import AssetsConfig, DataConfig, SimpleDataConfig, repack, with_delta_actions
from openpi.training.optimizer import CosineDecaySchedule, Muon
from openpi.training.recipes import tabletop
from openpi_demo.pointing import PointingPi0Config
from openpi_demo.tabletop import record, tasks
from openpi_demo.tabletop.world import CONTROL_HZ, FRONT_CAMERA, WRIST_CAMERA

NUM_SCENES = {tasks.PICK: 1800, tasks.REACH: 700}
FIRST_SEED = 10_000
NUM_WORKERS = 2
NUM_STEPS = 4000
SERVED_AS = "tabletop_pick"

_LABELS = {"base_0_rgb": FRONT_CAMERA, "left_wrist_0_rgb": WRIST_CAMERA}


@dataclasses.dataclass(frozen=True)
class PointingInputs:
    """The robot's inputs, with the labels of the pointing loss."""

    spec: ClassVar[RobotSpec] = TABLETOP_SPEC

    def __call__(self, data: dict) -> dict:
        labels = {slot: np.asarray(label).reshape(()) for slot, label in data["extras"].items()}
        return {**TabletopInputs()(data), "extras": labels}


def pointing_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """`tabletop_transforms` with labels."""
    del model_config
    group = transforms.Group(inputs=(PointingInputs(),), outputs=(TabletopOutputs(),))
    return with_delta_actions(group, tabletop.DELTA_MASK)


_MODEL = dataclasses.replace(tabletop.TINY_PI05, loss_draws=2)
_MODEL_FIELDS = {field.name: getattr(_MODEL, field.name) for field in dataclasses.fields(_MODEL)}

# Of 120 held-out scenes with three blocks, half of them with plates, 120 picked (six steps per chunk: 109); of 30 with
# plates to move to, 30. With AdamW (1e-3) and picking only, 71 % were picked after 5500 steps.
RECIPE = TrainConfig(
    name="tabletop_pick_base",
    model=PointingPi0Config(**_MODEL_FIELDS),
    data=SimpleDataConfig(
        repo_id="openpi/tabletop_pick_labelled",
        assets=AssetsConfig(asset_id=tabletop.ASSET_ID),
        base_config=DataConfig(
            repack_transforms=repack(
                tabletop.CLIENT_KEYS | {"extras": {slot: f"{camera}_patch" for slot, camera in _LABELS.items()}}
            ),
            prompt_from_task=True,
        ),
        data_transforms=pointing_transforms,
    ),
    lr_schedule=CosineDecaySchedule(warmup_steps=200, peak_lr=2e-3, decay_steps=NUM_STEPS, decay_lr=2e-5),
    optimizer=Muon(),
    ema_decay=0.997,
    batch_size=64,
    num_workers=0,
    cpu_devices=2,
    num_train_steps=NUM_STEPS,
    save_interval=1000,
    keep_period=None,
)


def record_labelled(root: Path) -> None:
    """The base's dataset: every scene once per prompt of its task, with one, two or three blocks."""
    patch = {"dtype": "int64", "shape": [1], "names": ["patch"]}
    features = record.lerobot_features() | {f"{camera}_patch": dict(patch) for camera in _LABELS.values()}
    with LeRobotWriter(root, fps=CONTROL_HZ, features=features, robot_type=TABLETOP_SPEC.robot) as writer:
        for task, num_scenes in NUM_SCENES.items():
            seeds = range(FIRST_SEED, FIRST_SEED + num_scenes)
            for demonstration in record.demonstrations(task, seeds, num_workers=NUM_WORKERS):
                frames = record.lerobot_frames(demonstration) | _patches(demonstration)
                writer.add_episode(frames, demonstration.prompt)


def export(checkpoint: Path, target: Path) -> None:
    """A training checkpoint of `RECIPE` -> the folder that ships."""
    import ml_dtypes

    from openpi.shared.tree import flatten, unflatten
    from openpi.weights import orbax_io

    params = flatten(orbax_io.read_params(checkpoint / "params"))
    kept = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in params.items() if "pointing_head" not in path}
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    orbax_io.write_params(partial / "params", unflatten(kept))
    (partial / "params" / "commit_success.txt").unlink(missing_ok=True)  # names this machine's folder
    shutil.copytree(checkpoint / "assets", partial / "assets")
    shutil.copyfile(checkpoint / "contract.json", partial / "contract.json")
    recipe_io.save_recipe(partial, get_config(SERVED_AS))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the dataset and the training run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished base")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)

    split_processor(RECIPE.cpu_devices)
    from openpi.training import loop

    dataset = args.work / "dataset"
    if not dataset.exists():
        record_labelled(dataset)
    config = dataclasses.replace(
        RECIPE,
        exp_name="base",
        data=dataclasses.replace(RECIPE.data, repo_id=str(dataset)),
        assets_base_dir=str(args.work / "assets"),
        checkpoint_base_dir=str(args.work / "checkpoints"),
        resume=args.resume,
    )
    result = loop.train(config)
    if result.signum is not None or result.checkpoint is None:
        raise SystemExit("stopped; go on with --resume")
    export(result.checkpoint, args.output)


def _patches(demonstration: record.Demonstration) -> Leaves:
    model = tabletop.TINY_PI05
    frames = demonstration.frames
    return {
        f"{camera}_patch": record.patch_labels(
            frames[f"{camera}_target_px"],
            frames[f"{camera}_target_visible"],
            image_size=model.image_resolution[0],
            patch_size=model.image_encoder.patch_size,
        ).astype(np.int64)[:, None]
        for camera in _LABELS.values()
    }


if __name__ == "__main__":
    from openpi_demo import base_recipe  # checkpoints name what they need by its module, which is not `__main__`

    base_recipe.main()
