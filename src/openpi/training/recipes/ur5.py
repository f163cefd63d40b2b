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
    # The published example; it forgets to repack the actions, this one does not.
    TrainConfig(
        name="pi0_ur5",
        model=Pi0Config(),
        data=_data("pi0_base"),
        weight_loader=weights("pi0_base"),
        num_train_steps=30_000,
    ),
]
