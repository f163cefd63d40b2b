"""DROID: a Franka with a wrist and an exterior camera, 15 Hz; 7 joint velocities or positions, and a gripper."""

from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.training.config import TrainConfig
from openpi.training.data_config import (
    AssetsConfig,
    DataConfig,
    LeRobotDROIDDataConfig,
    RLDSDroidDataConfig,
    SimpleDataConfig,
    droid_transforms,
)
from openpi.training.droid_rlds_dataset import DroidActionSpace
from openpi.training.optimizer import CosineDecaySchedule
from openpi.training.recipes.released import assets, weights

RLDS_DIR = "<path_to_droid_rlds_dataset>"

# After the warm-up the rate stays: DROID runs are stopped by looking at the robot, not at a schedule.
CONSTANT_LR = CosineDecaySchedule(warmup_steps=1_000, peak_lr=5e-5, decay_steps=1_000_000, decay_lr=5e-5)


def served_droid() -> SimpleDataConfig:
    """Inference on a DROID robot: no dataset; the statistics `droid` come with the checkpoint."""
    return SimpleDataConfig(
        assets=AssetsConfig(asset_id="droid"),
        data_transforms=droid_transforms,
        base_config=DataConfig(prompt_from_task=True),
    )


def _full_droid(droid_assets: AssetsConfig) -> RLDSDroidDataConfig:
    return RLDSDroidDataConfig(
        repo_id="droid",
        rlds_data_dir=RLDS_DIR,
        action_space=DroidActionSpace.JOINT_POSITION,
        assets=droid_assets,
    )


RECIPES = [
    TrainConfig(
        name="pi0_droid",
        note="Serves the released pi0 for DROID. Actions are joint velocities; 10 steps are two thirds of a second at "
        "15 Hz.",
        model=Pi0Config(action_horizon=10),
        data=served_droid(),
    ),
    TrainConfig(
        name="pi0_fast_droid",
        note="Serves the released pi0-FAST for DROID: joint velocities written as tokens, 8 wide because this model "
        "pads nothing. One pass of the model for each token makes it the slowest of the three.",
        model=Pi0FASTConfig(action_dim=8, action_horizon=10),
        data=served_droid(),
    ),
    TrainConfig(
        name="pi05_droid",
        note="Serves the released pi0.5 for DROID; where `--env DROID` leads. Joint velocities; 15 steps are one "
        "second.",
        model=Pi0Config(pi05=True, action_horizon=15),
        data=served_droid(),
    ),
    TrainConfig(
        name="pi0_fast_full_droid_finetune",
        note="pi0-FAST on the whole of DROID in RLDS form (1.8 TB), read without TensorFlow. Joint positions relative "
        "to the state, because they can be replayed in simulation; frames in which the robot idles are left out. "
        "Batch 256 and 100k steps are for a node of large GPUs. 180 tokens hold prompt, state and 16 steps.",
        model=Pi0FASTConfig(action_dim=8, action_horizon=16, max_token_len=180),
        data=_full_droid(AssetsConfig()),
        weight_loader=weights("pi0_fast_base"),
        lr_schedule=CONSTANT_LR,
        num_train_steps=100_000,
        batch_size=256,
        save_interval=5000,
        keep_period=20_000,
        num_workers=0,  # threads: worker processes take twice the processor time for these frames
    ),
    TrainConfig(
        name="pi05_full_droid_finetune",
        note="As pi0_fast_full_droid_finetune, from pi0.5 and with the statistics `droid` of its base.",
        model=Pi0Config(pi05=True, action_dim=32, action_horizon=16),
        data=_full_droid(assets("pi05_base", "droid")),
        weight_loader=weights("pi05_base"),
        lr_schedule=CONSTANT_LR,
        num_train_steps=100_000,
        batch_size=256,
        save_interval=5000,
        keep_period=10_000,
        num_workers=0,
    ),
    TrainConfig(
        name="pi05_droid_finetune",
        note="A small set of your own on a DROID robot, in LeRobot form with the keys of the conversion script. Starts "
        "from the DROID checkpoint and keeps its statistics, so that states and velocities it knows keep their "
        "meaning. Horizon 16 and 20k steps as published.",
        model=Pi0Config(pi05=True, action_dim=32, action_horizon=16),
        data=LeRobotDROIDDataConfig(
            repo_id="your_hf_username/my_droid_dataset",
            base_config=DataConfig(prompt_from_task=True),
            assets=assets("pi05_droid", "droid"),
        ),
        weight_loader=weights("pi05_droid"),
        num_train_steps=20_000,
        batch_size=32,
    ),
]
