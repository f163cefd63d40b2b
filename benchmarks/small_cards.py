"""What the recipes for small cards learn, beside float32: losses of a small model, step by step, on the same batches.

    python benchmarks/small_cards.py [--steps 150] [--only RUN ...] [--report benchmarks/small_cards.md]

The demo's base (1.5 million weights, trained) learns chunks that follow from the colour of a picture. All runs have the
same batches, noise and flow times. Only weights, optimiser state and rounding differ, as in `pi05_libero_24gb`,
`pi05_libero_48gb` and `pi05_libero_lora_24gb`; "rounded to the nearest" is bfloat16 weights with plain AdamW.
"""

import argparse
import dataclasses
import datetime
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpi.models.gemma_config import LoRAConfig
from openpi.training.backend import open_backend
from openpi.training.config import TrainConfig, get_config
from openpi.training.optimizer import AdamW, CosineDecaySchedule
from openpi.training.recipes.tabletop import TINY_PI05

WINDOW, BATCH = 25, 8
_EIGHT = AdamW(state_bits=8, clip_gradient_norm=math.inf)


def _adapted(expert: Any) -> Any:
    adapters = LoRAConfig(16, alpha=16.0)
    return dataclasses.replace(expert, attn_lora=adapters, ffn_lora=adapters)


_LORA = dataclasses.replace(
    TINY_PI05,
    dtype="bfloat16",
    paligemma_variant=_adapted(TINY_PI05.paligemma_variant),
    action_expert_variant=_adapted(TINY_PI05.action_expert_variant),
)
_ADAPTERS: dict[str, Any] = {"model": _LORA, "freeze_filter": _LORA.get_freeze_filter()}
RUNS: dict[str, dict[str, Any]] = {
    "float32": {"pytorch_training_precision": "float32", "optimizer": AdamW(clip_gradient_norm=math.inf)},
    "48 GB: float32 weights, 8-bit moments": {"optimizer": _EIGHT, "pytorch_free_gradients": True},
    "24 GB: bfloat16 weights rounded at random, 8-bit moments": {
        "optimizer": _EIGHT,
        "pytorch_free_gradients": True,
        "pytorch_training_precision": "pure_bfloat16",
    },
    "bfloat16 weights rounded to the nearest": {
        "optimizer": AdamW(clip_gradient_norm=math.inf),
        "pytorch_training_precision": "pure_bfloat16",
    },
    "adapters over bfloat16": {"optimizer": AdamW(clip_gradient_norm=math.inf), **_ADAPTERS},
    "24 GB: adapters over eight bits, 8-bit moments": {
        "optimizer": _EIGHT,
        "pytorch_frozen_bits": 8,
        **_ADAPTERS,
    },
}


def recipe(fields: dict[str, Any], steps: int) -> TrainConfig:
    return dataclasses.replace(
        get_config("tabletop_place"),
        backend="pytorch",
        lr_schedule=CosineDecaySchedule(warmup_steps=20, peak_lr=5e-5, decay_steps=steps, decay_lr=5e-6),
        ema_decay=None,
        batch_size=BATCH,
        cpu_devices=1,
        **{"model": dataclasses.replace(TINY_PI05, dtype="bfloat16"), **fields},
    )


def batch(config: TrainConfig, step: int) -> dict[str, Any]:
    """Pictures of one colour each, and chunks that swing as the colour says."""
    model: Any = config.model
    rng, fixed = np.random.default_rng([1, step]), np.random.default_rng(0)
    colours = rng.uniform(-1, 1, (BATCH, 3)).astype(np.float32)
    size = (BATCH, *model.image_resolution, 3)
    picture = np.broadcast_to(((colours + 1) * 127.5).astype(np.uint8)[:, None, None], size)
    turns = np.linspace(0, math.pi, model.action_horizon)[None, :, None]
    mix = fixed.standard_normal((3, model.action_dim))
    actions = np.sin((colours @ mix)[:, None] + turns).astype(np.float32)
    words = np.arange(model.max_token_len) < 6
    return {
        "image": dict.fromkeys(model.image_keys, picture),
        "image_mask": dict.fromkeys(model.image_keys, np.ones(BATCH, bool)),
        "state": np.zeros((BATCH, model.action_dim), np.float32),
        "tokenized_prompt": np.broadcast_to(words * 5, (BATCH, len(words))).astype(np.int32),
        "tokenized_prompt_mask": np.broadcast_to(words, (BATCH, len(words))),
        "actions": actions,
    }


def losses(config: TrainConfig, steps: int) -> np.ndarray:
    engine: Any = open_backend(config)
    engine.check()
    state, found = engine.create_state(), []
    for step in range(steps):
        state, metrics = engine.train_step(state, engine.place(batch(config, step), step))
        found.append(metrics["loss"])
    return np.asarray(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    columns = {}
    for name in args.only:
        start = time.process_time()
        columns[name] = losses(recipe(RUNS[name], args.steps), args.steps).reshape(-1, WINDOW).mean(axis=1)
        print(f"{name}: {columns[name].round(4).tolist()} {time.process_time() - start:.0f} s", flush=True)
    lines = [f"| steps | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        lines.append(f"| {i * WINDOW} to {(i + 1) * WINDOW - 1} | {' | '.join(f'{loss:.4f}' for loss in row)} |")
    if args.report:
        head = f"# Recipes for small cards: losses\n\n{datetime.date.today()}, PyTorch {torch.__version__}, processor."
        told = f"`python benchmarks/small_cards.py --steps {args.steps}`; mean loss of {WINDOW} steps."
        args.report.write_text("\n".join([head, told, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
