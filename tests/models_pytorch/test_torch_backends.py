"""What each backend can do: the table in the documentation is what they accept, and what they accept is run here."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import paths
import tiny_recipe
from openpi.models.gemma_config import LoRAConfig
from openpi.policies import sampler_jax, sampler_pytorch
from openpi.policies.policy_config import create_trained_policy
from openpi.shared.tree import unflatten
from openpi.training import loop
from openpi.training.backend import Backend, open_backend
from openpi.training.config import TrainConfig
from openpi.training.freeze import PathRegex
from openpi.training.optimizer import SGD, AdamW, CosineDecaySchedule, Muon, RsqrtDecaySchedule
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import names, orbax_io

DOCUMENT = paths.ROOT / "docs" / "reference" / "backends.md"
BACKENDS = {"jax": "JAX", "pytorch": "PyTorch"}
SAMPLERS = {"jax": sampler_jax.JaxSampler, "pytorch": sampler_pytorch.PytorchSampler}

Change = Callable[[TrainConfig], TrainConfig]


def model(**fields: object) -> Change:
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def run(**fields: object) -> Change:
    return lambda config: dataclasses.replace(config, **fields)


def adapters(config: TrainConfig) -> TrainConfig:
    lora = LoRAConfig(rank=2, alpha=2.0)
    expert = dataclasses.replace(tiny_recipe.MODEL.experts[0], attn_lora=lora, ffn_lora=lora)
    adapted = dataclasses.replace(config.model, paligemma_variant=expert)
    return dataclasses.replace(config, model=adapted, freeze_filter=adapted.get_freeze_filter(), ema_decay=None)


FEATURES: dict[str, Change] = {
    "pi0": model(),
    "pi0.5": model(pi05=True),
    "pi0-FAST": lambda config: dataclasses.replace(config, model=tiny_recipe.fast.model),
    "full fine-tuning": run(),
    "LoRA on attention and MLP, any expert": adapters,
    "checkpoints of adapters only": lambda config: dataclasses.replace(adapters(config), save_frozen_params=False),
    "freezing by path": run(freeze_filter=PathRegex(".*img.*")),
    "averaged weights (EMA)": run(ema_decay=0.999),
    "mixed precision: f32 weights, bfloat16 computation": model(dtype="bfloat16"),
    "all in f32": run(pytorch_training_precision="float32"),
    "AdamW": run(optimizer=AdamW()),
    "AdamW with 8-bit state": run(optimizer=AdamW(state_bits=8)),
    "SGD": run(optimizer=SGD()),
    "Muon": run(optimizer=Muon()),
    "cosine schedule": run(lr_schedule=CosineDecaySchedule()),
    "inverse square root schedule": run(lr_schedule=RsqrtDecaySchedule()),
    "gradient accumulation": run(gradient_accumulation_steps=2),
    "rematerialisation: everything": model(remat="full"),
    "rematerialisation: all but products": model(remat="dots"),
    "rematerialisation: nothing": model(remat="none"),
    "image augmentation": model(augmentation=True),
    "several noise draws for one prefix": model(loss_draws=4),
    "training for real-time chunking": model(rtc_max_delay=2),
    "nothing computed for masked cameras and padding": model(skip_unused=True),
    "validation on held-out episodes": run(holdout_episodes=1),
}


SERVED = "sampling with given noise, warm-up before the first request"

# Every feature is in one of them; each run is trained, saved, continued, validated and served.
RUNS: dict[str, tuple[str, ...]] = {
    "pi0": (
        *("pi0", "full fine-tuning", "averaged weights (EMA)", "mixed precision: f32 weights, bfloat16 computation"),
        *("AdamW", "cosine schedule", "gradient accumulation", "rematerialisation: everything"),
        *("nothing computed for masked cameras and padding", "validation on held-out episodes", SERVED),
    ),
    "pi05": (
        *("pi0.5", "LoRA on attention and MLP, any expert", "checkpoints of adapters only", "all in f32"),
        *("AdamW with 8-bit state", "inverse square root schedule", "rematerialisation: all but products", SERVED),
    ),
    "fast": ("pi0-FAST", "freezing by path", "Muon", "rematerialisation: nothing"),
    "augmented": (
        "pi0",
        "SGD",
        "several noise draws for one prefix",
        "image augmentation",
        "training for real-time chunking",
    ),
}


def accepts(name: str, feature: str) -> bool:
    """Whether a backend takes a recipe with a feature; else it raises ValueError before anything starts."""
    if feature == SERVED:
        return hasattr(SAMPLERS[name], "warm_up") and hasattr(SAMPLERS[name], "sample")
    config = FEATURES[feature](dataclasses.replace(tiny_recipe.tiny, exp_name="table", backend=name))
    backend: Backend = open_backend(config)
    try:
        backend.check()
    except ValueError:
        return False
    return True


def table() -> str:
    rows = {feature: [accepts(name, feature) for name in BACKENDS] for feature in (*FEATURES, SERVED)}
    lines = [f"| feature | {' | '.join(BACKENDS.values())} |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join('yes' if has else '-' for has in both)} |" for name, both in rows.items()]
    return "\n".join(lines)


def test_the_documented_table_is_what_the_backends_say_and_has_no_holes() -> None:
    built = table()
    assert "| - |" not in built
    assert built in DOCUMENT.read_text()


def test_every_feature_is_run() -> None:
    assert {feature for features in RUNS.values() for feature in features} == {*FEATURES, SERVED}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_accepts_it_trains_saves_and_continues(
    name: str, run: str, arm_dataset: Path, tmp_path: Path
) -> None:
    config = recipe(name, run, arm_dataset, tmp_path)
    first = loop.train(config)
    assert first.step == 0 and math.isfinite(first.metrics["loss"])
    rest = loop.train(dataclasses.replace(config, num_train_steps=2, resume=True))
    assert rest.step == 1 and math.isfinite(rest.metrics["loss"]) and rest.metrics["grad_norm"] > 0
    if config.holdout_episodes:
        assert math.isfinite(rest.metrics["validation_loss"])
    if SERVED not in RUNS[run]:
        return
    policy = create_trained_policy(config, rest.checkpoint)
    assert type(policy._sampler) is SAMPLERS[name]
    observation = {"camera": np.full((32, 32, 3), 90, np.uint8), "joints": np.zeros(3), "prompt": "pick up the cube"}
    policy.warm_up(observation)
    noise = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    chunks = [policy.infer(observation, noise=noise[i])["actions"] for i in (0, 1, 0)]
    assert chunks[0].shape == (3, tiny_recipe.NUM_JOINTS)
    np.testing.assert_array_equal(chunks[0], chunks[2])
    assert np.abs(chunks[0] - chunks[1]).max() > 0.1


def recipe(name: str, run: str, dataset: Path, folder: Path) -> TrainConfig:
    """The smallest with the features of a run."""
    config = dataclasses.replace(
        tiny_recipe.arm,
        exp_name=run,
        backend=name,
        checkpoint_base_dir=str(folder),
        assets_base_dir=str(folder),
        num_train_steps=1,
        eval_batches=1,
    )
    changes = (FEATURES[feature] for feature in RUNS[run] if feature != SERVED)
    config = functools.reduce(lambda config, change: change(config), changes, config)
    config = dataclasses.replace(config, data=dataclasses.replace(tiny_recipe.arm.data, repo_id=str(dataset)))
    if not config.save_frozen_params:
        base = dataclasses.replace(config.model, paligemma_variant=tiny_recipe.MODEL.experts[0])
        rng = np.random.default_rng(0)
        params = {path: 0.1 * rng.standard_normal(shape, np.float32) for path, shape in names.tree_shapes(base).items()}
        orbax_io.write_params(folder / "base" / "params", unflatten(params))
        loader = CheckpointWeightLoader(str(folder / "base" / "params"))
        config = dataclasses.replace(config, weight_loader=loader)
    return config


def test_both_backends_have_the_same_parameters() -> None:
    for feature in ("pi0", "pi0.5", "pi0-FAST", "LoRA on attention and MLP, any expert"):
        specs = [
            open_backend(FEATURES[feature](dataclasses.replace(tiny_recipe.tiny, backend=name))).param_specs()
            for name in BACKENDS
        ]
        shapes = [{path: tuple(spec.shape) for path, spec in found.items()} for found in specs]
        assert shapes[0] == shapes[1], feature


if __name__ == "__main__":
    print(table())
