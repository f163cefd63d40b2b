"""RoboArena baselines on DROID: PaliGemma with different action tokenisers, and a diffusion one. Inference only."""

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
    # 256 bins per dimension: 15 steps x 8 dims need 120 tokens on top of the prompt.
    TrainConfig(
        name="paligemma_binning_droid",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            max_token_len=400,
            fast_model_tokenizer=tokenizer.BinningTokenizer,
        ),
        data=served_droid(),
    ),
    # The universal FAST tokeniser.
    TrainConfig(name="paligemma_fast_droid", model=Pi0FASTConfig(action_dim=8, action_horizon=15), data=served_droid()),
    # A FAST tokeniser fitted to DROID.
    TrainConfig(
        name="paligemma_fast_specialist_droid",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            fast_model_tokenizer=tokenizer.FASTTokenizer,
            fast_model_tokenizer_kwargs={"fast_tokenizer_path": "KarlP/fast_droid_specialist"},
        ),
        data=served_droid(),
    ),
    # A learned (finite scalar quantisation) tokeniser.
    TrainConfig(
        name="paligemma_vq_droid",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            fast_model_tokenizer=tokenizer.FSQTokenizer,
            fast_model_tokenizer_kwargs={"fsq_tokenizer_path": "gs://openpi-assets/tokenizers/droid_fsq_tokenizer"},
        ),
        data=served_droid(),
    ),
    # pi0 from scratch on PaliGemma, with the robot's own action width.
    TrainConfig(
        name="paligemma_diffusion_droid",
        model=Pi0Config(action_dim=8, action_horizon=10),
        data=served_droid(),
    ),
    # Binning on joint positions.
    TrainConfig(
        name="paligemma_binning_droid_jointpos",
        model=Pi0FASTConfig(
            action_dim=8,
            action_horizon=15,
            max_token_len=600,
            fast_model_tokenizer=tokenizer.BinningTokenizer,
        ),
        data=SimpleDataConfig(assets=AssetsConfig(asset_id="droid"), data_transforms=joint_position_transforms),
    ),
]
