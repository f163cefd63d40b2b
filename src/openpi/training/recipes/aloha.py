"""ALOHA: two 6-joint arms with grippers, up to four cameras, 50 Hz."""

import dataclasses

from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.data_config import AssetsConfig, LeRobotAlohaDataConfig, repack
from openpi.training.recipes.released import assets, weights
from openpi.training.recipes.tabletop import FROM_NOTHING, TINY_PI0

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

# 1.4 M parameters. pi0, so that the state goes in as numbers; one camera, in which a pixel is 15 mm of the table.
_TINY = dataclasses.replace(
    TINY_PI0,
    image_resolution=(112, 112),
    image_keys=("base_0_rgb",),
    action_dim=14,
    action_horizon=50,
    max_token_len=16,
)


def _serve(name: str, model: Pi0Config, default_prompt: str | None = None, *, note: str) -> TrainConfig:
    """Serves a released checkpoint: the statistics `trossen` come with it, there is no dataset."""
    return TrainConfig(
        name=name,
        note=note,
        model=model,
        data=LeRobotAlohaDataConfig(assets=AssetsConfig(asset_id="trossen"), default_prompt=default_prompt),
        policy_metadata=_METADATA,
    )


RECIPES = [
    _serve(
        "pi0_aloha",
        Pi0Config(),
        note="Serves pi0_base on an ALOHA, prompted by the client. Chunks of 50 steps are one second at 50 Hz. For "
        "tasks that the base has not seen, fine-tune (pi0_aloha_pen_uncap shows how).",
    ),
    _serve(
        "pi05_aloha",
        Pi0Config(pi05=True),
        note="Serves pi05_base on an ALOHA, prompted by the client; the state goes in as text. Otherwise as pi0_aloha.",
    ),
    _serve(
        "pi0_aloha_towel",
        Pi0Config(),
        "fold the towel",
        note="Serves the released towel checkpoint. It knows one task, so the prompt is fixed and clients need none.",
    ),
    _serve(
        "pi0_aloha_tupperware",
        Pi0Config(),
        "open the tupperware and put the food on the plate",
        note="Serves the released tupperware checkpoint. It knows one task, so the prompt is fixed.",
    ),
    TrainConfig(
        name="pi0_aloha_sim",
        note="Full fine-tuning on simulated cube transfer: 50 episodes, one camera, one task, statistics of its own. "
        "Absolute actions, because the published checkpoint was trained so: the simulator's controller takes joint "
        "targets. 20k steps suffice for one task.",
        model=Pi0Config(),
        data=LeRobotAlohaDataConfig(
            repo_id="lerobot/aloha_sim_transfer_cube_human",
            default_prompt="Transfer cube",
            use_delta_joint_actions=False,
        ),
        weight_loader=weights("pi0_base"),
        num_train_steps=20_000,
    ),
    TrainConfig(
        name="pi0_aloha_sim_tiny",
        note="Simulated cube transfer on a CPU: 1.4 M parameters, learnt from nothing but 24 recordings of `openpi "
        "record aloha --image-size 112 --images --noise 0.004` in some 25 CPU minutes. 4 of 20 unseen scenes "
        "(docs/results.md), so more recordings are the next thing to try. The state as numbers, joints absolute as in "
        "pi0_aloha_sim. Evaluate with --image-size 112 --execute-horizon 25.",
        model=_TINY,
        data=LeRobotAlohaDataConfig(
            repo_id="lerobot/aloha_sim_transfer_cube_human",
            default_prompt="Transfer cube",
            use_delta_joint_actions=False,
        ),
        **FROM_NOTHING,
    ),
    TrainConfig(
        name="pi0_aloha_pen_uncap",
        note="Full fine-tuning on a real ALOHA with three cameras. The base knows this robot, so its statistics "
        "`trossen` are reused: the weights then see the ranges that they know. Joints relative to the state, as in the "
        "base's training. The start for an ALOHA of your own: change the dataset and the prompt.",
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
    TrainConfig(
        name="pi05_aloha_pen_uncap",
        note="As pi0_aloha_pen_uncap, from pi0.5. Batch 64 as published; --gradient-accumulation-steps makes it fit.",
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
