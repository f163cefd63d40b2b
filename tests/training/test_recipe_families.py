"""Each robot family from its dataset to a robot that is driven: train, save, resume, serve, ask over the wire.

The recipes are the registered ones; only their models are small, and the weights drawn. Families of one
kind of model differ in their data, and train by one program: neither what a batch leaves out, nor adapters, nor the
optimiser makes another of it (`test_compact.py`, `test_adapters.py`, `test_optimizer.py`).
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import paths
import rlds_datasets
import tiny_recipe
from openpi.cli.serving import server
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import BaseModelConfig, ModelType, freeze_nothing
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.calvin_policy import make_calvin_example
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.libero_policy import make_libero_example
from openpi.policies.tabletop_policy import make_tabletop_example
from openpi.policies.ur5_policy import make_ur5_example
from openpi.training import loop
from openpi.training.checkpoints import complete_steps
from openpi.training.config import TrainConfig, get_config
from openpi.training.optimizer import AdamW, CosineDecaySchedule
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import orbax_io
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_positronic.policy import make_positronic_example
from robot_datasets import FORMATS, write_dataset
from serving_live import server_thread

TOKENIZERS = paths.GOLDEN / "tokenizers"
NUM_STEPS = 6
INTERRUPTED_AFTER = 4

# family -> (recipe, observation of its robot, width of the robot's actions)
FAMILIES = {
    "aloha": ("pi0_aloha_pen_uncap", make_aloha_example, 14),
    "libero": ("pi0_libero", make_libero_example, 7),
    "libero_fast": ("pi0_fast_libero", make_libero_example, 7),
    "ur5": ("pi0_ur5", make_ur5_example, 7),
    "calvin": ("pi0_calvin", make_calvin_example, 15),
    "droid": ("pi05_droid_finetune", make_droid_example, 8),
    "trossen": ("pi0_trossen_transfer_block", make_aloha_example, 14),
    "positronic": (
        "pi05_positronic_lowmem",
        lambda: make_positronic_example() | {"observation/state": np.zeros(15)},
        8,
    ),
    "droid_rlds": ("pi05_droid_jointpos_polaris", make_droid_example, 8),
    "tabletop": ("tabletop_place", make_tabletop_example, 6),
}

_EXPERT = GemmaConfig(width=16, depth=1, mlp_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=2048)


def small(model: BaseModelConfig) -> BaseModelConfig:
    """A model of the same kind that runs within milliseconds, and as the other recipes' of that kind."""
    changes = {
        "dtype": "float32",
        "paligemma_variant": _EXPERT,
        "image_encoder_variant": SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2),
        "image_resolution": (28, 28),
        "action_horizon": 4,
        "tokenizer_path": str(TOKENIZERS / "tiny_paligemma_tokenizer.model"),
        "augmentation": False,
        "remat": "none",
        "skip_unused": False,
    }
    if model.model_type is ModelType.PI0_FAST:
        changes |= {"max_token_len": 112, "action_tokenizer_path": str(TOKENIZERS / "fast")}
    else:
        changes |= {"action_expert_variant": _EXPERT, "action_dim": 16, "max_token_len": 96 if model.pi05 else 16}
        changes |= {"loss_draws": 1}
    return dataclasses.replace(model, **changes)


def on_this_machine(name: str, folder: Path) -> TrainConfig:
    """The registered recipe with a small model, on a small dataset of its robot, in a folder of its own."""
    published = get_config(name)
    model = small(published.model)
    orbax_io.write_params(folder / "start", tiny_recipe.drawn_params(model.abstract_params()))
    assets = dataclasses.replace(published.data.assets, assets_dir=None)
    if hasattr(published.data, "rlds_data_dir"):
        data = rlds_datasets.of_recipe(published.data, folder / "dataset")
    else:
        dataset = write_dataset(folder / "dataset", FORMATS[published.data.repo_id])
        data = dataclasses.replace(published.data, repo_id=str(dataset))
    return dataclasses.replace(
        published,
        model=model,
        data=dataclasses.replace(data, assets=assets),
        weight_loader=CheckpointWeightLoader(str(folder / "start")),
        freeze_filter=freeze_nothing,
        optimizer=AdamW(),
        lr_schedule=CosineDecaySchedule(),
        ema_decay=0.99,
        assets_base_dir=str(folder / "assets"),
        checkpoint_base_dir=str(folder / "checkpoints"),
        exp_name="first",
        batch_size=2,
        num_workers=0,
        cpu_devices=1,
        log_interval=1,
        save_interval=INTERRUPTED_AFTER,
        holdout_episodes=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_robot_family_trains_resumes_and_serves(family, tmp_path):
    name, make_observation, action_width = FAMILIES[family]
    config = on_this_machine(name, tmp_path)
    loop.train(dataclasses.replace(config, num_train_steps=INTERRUPTED_AFTER))
    loop.train(dataclasses.replace(config, num_train_steps=NUM_STEPS, resume=True))

    run = config.checkpoint_dir
    assert complete_steps(run)[-1] == NUM_STEPS - 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS))
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)

    with server_thread(lambda: server.load_policy(server.Args(str(run)))) as (_, port):
        client = WebsocketClientPolicy("127.0.0.1", port)
        actions = client.infer(make_observation() | {"prompt": "pick up the red cube"})["actions"]
        assert client.get_server_metadata().get("reset_pose") == (config.policy_metadata or {}).get("reset_pose")
        client.close()
    assert actions.shape == (config.model.action_horizon, action_width)
    assert np.isfinite(actions).all()
