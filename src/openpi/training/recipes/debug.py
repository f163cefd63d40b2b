"""Small models on random data: does this machine train at all?"""

from openpi.models.pi0_config import Pi0Config
from openpi.training.config import TrainConfig
from openpi.training.weight_loaders import CheckpointWeightLoader

_PI0 = Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy")
_PI05 = Pi0Config(paligemma_variant="dummy", action_expert_variant="dummy", pi05=True)

RECIPES = [
    TrainConfig(
        name="debug",
        note="Does this machine train at all? Ten steps of pi0 on random samples, batch 2. Tiny experts, but the real "
        "image encoder: a minute or two on a CPU.",
        model=_PI0,
        batch_size=2,
        save_interval=100,
        overwrite=True,
        exp_name="debug",
        num_train_steps=10,
    ),
    TrainConfig(
        name="debug_restore",
        note="Does loading work? Starts from the weights that a run of `debug` leaves behind; run that first.",
        model=_PI0,
        batch_size=2,
        weight_loader=CheckpointWeightLoader("./checkpoints/debug/debug/9/params"),
        overwrite=True,
        exp_name="debug",
        num_train_steps=10,
    ),
    TrainConfig(
        name="debug_pi05",
        note="As debug, with pi0.5.",
        model=_PI05,
        batch_size=2,
        num_train_steps=10,
        overwrite=True,
        exp_name="debug_pi05",
    ),
]
