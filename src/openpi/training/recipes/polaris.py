"""PolaRiS: DROID joint-position policies, co-trained for 1000 steps with 10% simulated data before evaluation."""

from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.training.config import TrainConfig
from openpi.training.data_config import DROID_FRAME_RANGES, RLDSDroidDataConfig
from openpi.training.droid_rlds_dataset import DroidActionSpace, RLDSDataset
from openpi.training.recipes.droid import CONSTANT_LR, RLDS_DIR
from openpi.training.recipes.released import assets, weights

_MIXTURE = (
    RLDSDataset(name="droid", version="1.0.1", weight=0.9, filter_dict_path=DROID_FRAME_RANGES),
    RLDSDataset(
        name="polaris_droid_cotrain_dataset",
        version="1.0.0",
        weight=0.1,
        filter_dict_path="gs://openpi-assets/droid/polaris_droid_cotrain_dataset_sample_ranges_v1_0_0.json",
    ),
)


def _cotrain(name: str, model: BaseModelConfig, *, note: str) -> TrainConfig:
    """Continues the DROID joint-position checkpoint of the same name, with its statistics."""
    return TrainConfig(
        name=name,
        note=f"{note} 1000 steps on DROID with 10 % simulated frames, so that the policy has seen the simulator; the "
        "learning rate stays constant, because the run is short. Reads both datasets in RLDS form.",
        model=model,
        data=RLDSDroidDataConfig(
            rlds_data_dir=RLDS_DIR,
            action_space=DroidActionSpace.JOINT_POSITION,
            assets=assets(f"polaris/{name}", "droid"),
            datasets=_MIXTURE,
        ),
        weight_loader=weights(f"polaris/{name}"),
        lr_schedule=CONSTANT_LR,
        num_train_steps=1_000,
        batch_size=128,
        log_interval=100,
        save_interval=1000,
        keep_period=1000,
        num_workers=0,
    )


RECIPES = [
    _cotrain(
        "pi05_droid_jointpos_polaris",
        Pi0Config(pi05=True, action_horizon=15),
        note="Continues the pi0.5 joint-position checkpoint for evaluation in PolaRiS, with its statistics.",
    ),
    _cotrain(
        "pi0_fast_droid_jointpos_polaris",
        Pi0FASTConfig(action_dim=8, action_horizon=10, max_token_len=180),
        note="Continues the pi0-FAST joint-position checkpoint for evaluation in PolaRiS.",
    ),
    _cotrain(
        "pi0_droid_jointpos_polaris",
        Pi0Config(action_horizon=10, max_token_len=100),
        note="Continues the pi0 joint-position checkpoint for evaluation in PolaRiS; 100 tokens, because some "
        "instructions are longer than pi0's usual 48.",
    ),
    _cotrain(
        "pi0_droid_jointpos_100k_polaris",
        Pi0Config(action_horizon=10, max_token_len=100),
        note="As pi0_droid_jointpos_polaris, from the checkpoint after 100k steps.",
    ),
]
