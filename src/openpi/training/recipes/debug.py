"""Small models on random data: does this machine train at all?"""

from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.weight_loaders import CheckpointWeightLoader

_PI0 = Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy")
_PI05 = Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", pi05=True)

RECIPES = [
    # Tiny experts, but the real image encoder: expect a minute or two on a CPU.
    TrainConfig(
        name="debug",
        model=_PI0,
        batch_size=2,
        save_interval=100,
        overwrite=True,
        exp_name="debug",
        num_train_steps=10,
    ),
    # Starts from what `debug` leaves behind.
    TrainConfig(
        name="debug_restore",
        model=_PI0,
        batch_size=2,
        weight_loader=CheckpointWeightLoader("./checkpoints/debug/debug/9/params"),
        overwrite=True,
        exp_name="debug",
        num_train_steps=10,
    ),
    TrainConfig(
        name="debug_pi05",
        model=_PI05,
        batch_size=2,
        num_train_steps=10,
        overwrite=True,
        exp_name="debug_pi05",
    ),
]
