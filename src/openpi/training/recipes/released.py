"""Names of the released checkpoints that recipes start from."""

from openpi.training.data_config import AssetsConfig
from openpi.training.weight_loaders import CheckpointWeightLoader

CHECKPOINTS = "gs://openpi-assets/checkpoints"


def weights(checkpoint: str) -> CheckpointWeightLoader:
    """Start from the parameters of a released checkpoint, such as `pi05_base`."""
    return CheckpointWeightLoader(f"{CHECKPOINTS}/{checkpoint}/params")


def assets(checkpoint: str, asset_id: str) -> AssetsConfig:
    """Reuse the statistics that a released checkpoint was trained with.

    Right when the robot and its action space are the same: the weights then see the ranges that they know.
    """
    return AssetsConfig(assets_dir=f"{CHECKPOINTS}/{checkpoint}/assets", asset_id=asset_id)
