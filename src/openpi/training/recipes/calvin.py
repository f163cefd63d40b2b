"""CALVIN: a simulated Franka arm at a desk, 34 tasks, 30 Hz, 7 relative actions; a robot of the first release."""

from openpi import transforms
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.policies import calvin_policy
from openpi.training.config import TrainConfig
from openpi.training.data_config import AssetsConfig, DataConfig, SimpleDataConfig, repack
from openpi.training.recipes.released import weights


def calvin_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """The simulator's 15 values in, 15 out."""
    return transforms.Group(
        inputs=(calvin_policy.CalvinInputs(model_type=model_config.model_type),),
        outputs=(calvin_policy.CalvinOutputs(),),
    )


_KEYS = {
    "observation/rgb_static": "rgb_static",
    "observation/rgb_gripper": "rgb_gripper",
    "observation/state": "state",
    "actions": "actions",
    "prompt": "prompt",
}

RECIPES = [
    TrainConfig(
        name="pi0_calvin",
        note="Full fine-tuning on a LeRobot conversion of CALVIN that you make, with the simulator's names: "
        "rgb_static, rgb_gripper, state (the 15 values of robot_obs), actions (15 wide; the simulator takes 7), "
        "task texts. Brings back the environment CALVIN of the first release, whose checkpoint is no longer published. "
        "The actions are relative already, so nothing is subtracted; everything else is the default.",
        model=Pi0Config(),
        data=SimpleDataConfig(
            repo_id="your_hf_username/calvin_dataset",
            assets=AssetsConfig(asset_id="calvin"),
            base_config=DataConfig(repack_transforms=repack(_KEYS), prompt_from_task=True),
            data_transforms=calvin_transforms,
        ),
        weight_loader=weights("pi0_base"),
        num_train_steps=30_000,
    ),
]
