"""The recipe that fits the recorded pi0.5 checkpoint, as a user's file: `golden_droid.py:recipe`."""

import dataclasses
import json
import sys
from pathlib import Path

from openpi import transforms
from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.droid_policy import DroidInputs, DroidOutputs
from openpi.training.config import AssetsConfig, SimpleDataConfig, TrainConfig

_GOLDEN = Path(__file__).parents[2] / "golden"
_META = json.loads((_GOLDEN / "pi05" / "meta.json").read_text())


def droid_transforms(model_config: Pi0Config) -> transforms.Group:
    return transforms.Group(inputs=(DroidInputs(model_config.model_type),), outputs=(DroidOutputs(),))


recipe = TrainConfig(
    name="golden_droid",
    model=Pi0Config(
        pi05=True,
        dtype="float32",
        action_dim=_META["config"]["action_dim"],
        action_horizon=_META["config"]["action_horizon"],
        max_token_len=_META["config"]["max_token_len"],
        image_encoder_variant=SiglipConfig(**_META["siglip"]),
        paligemma_variant=GemmaConfig(**_META["paligemma"]),
        action_expert_variant=GemmaConfig(**_META["action_expert"]),
        tokenizer_path=str(_GOLDEN / "tokenizers" / "tiny_paligemma_tokenizer.model"),
    ),
    data=SimpleDataConfig(assets=AssetsConfig(asset_id="golden"), data_transforms=droid_transforms),
    policy_metadata={"robot": "golden"},
)

# For the checkpoints of `golden_kits.write_small`.
sys.path.append(str(Path(__file__).parents[1]))
from golden_kits import small_model  # noqa: E402

small = dataclasses.replace(recipe, name="small_droid", model=small_model(recipe.model))
