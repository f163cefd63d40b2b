"""ALOHA: two 6-joint arms with grippers, up to four cameras, 50 Hz."""

from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.data_config import AssetsConfig, LeRobotAlohaDataConfig, repack
from openpi.training.recipes.released import assets, weights

# Joint angles (rad) of one arm that the robot program drives to before an episode.
_METADATA = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}

_PEN_CAMERAS = repack(
    {
        "images": {
            "cam_high": "observation.images.cam_high",
            "cam_left_wrist": "observation.images.cam_left_wrist",
            "cam_right_wrist": "observation.images.cam_right_wrist",
        },
        "state": "observation.state",
        "actions": "action",
    }
)
_PEN = "physical-intelligence/aloha_pen_uncap_diverse"


def _serve(name: str, model: Pi0Config, default_prompt: str | None = None) -> TrainConfig:
    """Serves a released checkpoint: the statistics `trossen` come with it, there is no dataset."""
    return TrainConfig(
        name=name,
        model=model,
        data=LeRobotAlohaDataConfig(assets=AssetsConfig(asset_id="trossen"), default_prompt=default_prompt),
        policy_metadata=_METADATA,
    )


RECIPES = [
    # The base models on an ALOHA, prompted by the client.
    _serve("pi0_aloha", Pi0Config()),
    _serve("pi05_aloha", Pi0Config(pi05=True)),
    # One task each, so the prompt is fixed.
    _serve("pi0_aloha_towel", Pi0Config(), "fold the towel"),
    _serve("pi0_aloha_tupperware", Pi0Config(), "open the tupperware and put the food on the plate"),
    # Simulated cube transfer, 50 episodes, one camera. Absolute actions: the simulator's controller takes joint
    # targets and 20k steps suffice for one task.
    TrainConfig(
        name="pi0_aloha_sim",
        model=Pi0Config(),
        data=LeRobotAlohaDataConfig(
            repo_id="lerobot/aloha_sim_transfer_cube_human",
            default_prompt="Transfer cube",
            use_delta_joint_actions=False,
        ),
        weight_loader=weights("pi0_base"),
        num_train_steps=20_000,
    ),
    # A real robot of the kind the base model knows: its statistics are reused, not computed.
    TrainConfig(
        name="pi0_aloha_pen_uncap",
        model=Pi0Config(),
        data=LeRobotAlohaDataConfig(
            repo_id=_PEN,
            assets=assets("pi0_base", "trossen"),
            default_prompt="uncap the pen",
            repack_transforms=_PEN_CAMERAS,
        ),
        weight_loader=weights("pi0_base"),
        num_train_steps=20_000,
    ),
    # The same with pi0.5; batch 64 as published.
    TrainConfig(
        name="pi05_aloha_pen_uncap",
        model=Pi0Config(pi05=True),
        data=LeRobotAlohaDataConfig(
            repo_id=_PEN,
            assets=assets("pi05_base", "trossen"),
            default_prompt="uncap the pen",
            repack_transforms=_PEN_CAMERAS,
        ),
        weight_loader=weights("pi05_base"),
        num_train_steps=20_000,
        batch_size=64,
    ),
]
