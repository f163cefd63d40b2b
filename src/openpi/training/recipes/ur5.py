"""UR5: one arm, a scene and a wrist camera, 20 Hz in the base models; joints trained relative to the state."""

from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.data_config import DataConfig, LeRobotUR5DataConfig
from openpi.training.recipes.released import assets, weights


def _data(checkpoint: str) -> LeRobotUR5DataConfig:
    """Your dataset, with the statistics of the UR5e data that the base has seen."""
    return LeRobotUR5DataConfig(
        repo_id="your_hf_username/ur5_dataset",
        assets=assets(checkpoint, "ur5e"),
        base_config=DataConfig(prompt_from_task=True),
    )


RECIPES = [
    TrainConfig(
        name="pi0_ur5",
        note="Full fine-tuning on a UR5 with a gripper; your LeRobot dataset has the features image, wrist_image, "
        "joints [6], gripper [1], actions [7] and task texts. Joints relative to the state, gripper absolute, and the "
        "statistics `ur5e` of the base, which knows this arm. The published example forgets to repack the actions, "
        "this one does not.",
        model=Pi0Config(),
        data=_data("pi0_base"),
        weight_loader=weights("pi0_base"),
        num_train_steps=30_000,
    ),
]
