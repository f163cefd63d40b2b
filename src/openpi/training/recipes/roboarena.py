"""RoboArena baselines on DROID: PaliGemma with different action tokenizers, and a diffusion one. Inference only."""

from openpi import transforms
from openpi.models import tokenizer
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.policies import droid_policy
from openpi.training.config import TrainConfig
from openpi.training.data_config import DROID_DELTA_MASK, AssetsConfig, SimpleDataConfig
from openpi.training.recipes.droid import served_droid


def joint_position_transforms(model_config: BaseModelConfig) -> transforms.Group:
    """The checkpoint predicts joint positions relative to the state; the robot takes absolute ones."""
    return transforms.Group(
        inputs=(droid_policy.DroidInputs(model_type=model_config.model_type),),
        outputs=(transforms.AbsoluteActions(DROID_DELTA_MASK), droid_policy.DroidOutputs()),
    )


RECIPES = [
    TrainConfig(
        name="paligemma_binning_droid",
        note="Serves a RoboArena baseline: 256 bins per action dimension, as in earlier autoregressive policies. 15 "
        "steps of 8 take 120 tokens, hence 400 in all.",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            max_token_len=400,
            fast_model_tokenizer=tokenizer.BinningTokenizer,
        ),
        data=served_droid(),
    ),
    TrainConfig(
        name="paligemma_fast_droid",
        note="Serves a RoboArena baseline: PaliGemma with the universal FAST tokenizer, trained on DROID alone.",
        model=Pi0FASTConfig(action_dim=8, action_horizon=15),
        data=served_droid(),
    ),
    TrainConfig(
        name="paligemma_fast_specialist_droid",
        note="As paligemma_fast_droid with a FAST tokenizer fitted to DROID: fewer tokens for the same actions.",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            fast_model_tokenizer=tokenizer.FASTTokenizer,
            fast_model_tokenizer_kwargs={"fast_tokenizer_path": "KarlP/fast_droid_specialist"},
        ),
        data=served_droid(),
    ),
    TrainConfig(
        name="paligemma_vq_droid",
        note="A RoboArena baseline with a learned tokenizer (finite scalar quantisation). Listed for completeness: its "
        "decoder is not part of this build, so serving is refused before anything is loaded.",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            fast_model_tokenizer=tokenizer.FSQTokenizer,
            fast_model_tokenizer_kwargs={"fsq_tokenizer_path": "gs://openpi-assets/tokenizers/droid_fsq_tokenizer"},
        ),
        data=served_droid(),
    ),
    TrainConfig(
        name="paligemma_diffusion_droid",
        note="Serves a RoboArena baseline: pi0's flow matching on PaliGemma without the robot pre-training, 8 wide "
        "because no other robot shares the weights.",
        model=Pi0Config(action_dim=8, action_horizon=10),
        data=served_droid(),
    ),
    TrainConfig(
        name="paligemma_binning_droid_jointpos",
        note="Serves the binning baseline on joint positions, predicted relative to the state and returned absolute. "
        "600 tokens as published.",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            max_token_len=600,
            fast_model_tokenizer=tokenizer.BinningTokenizer,
        ),
        data=SimpleDataConfig(assets=AssetsConfig(asset_id="droid"), data_transforms=joint_position_transforms),
    ),
]
