"""What each backend can do, found out from the backends themselves; the table in the documentation is this one."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import tiny_recipe
from openpi.models.gemma_config import LoRAConfig
from openpi.policies import sampler_jax, sampler_pytorch
from openpi.training.backend import Backend, open_backend
from openpi.training.config import TrainConfig
from openpi.training.freeze import PathRegex
from openpi.training.optimizer import SGD, AdamW, CosineDecaySchedule, Muon, RsqrtDecaySchedule

DOCUMENT = Path(__file__).parent.parent / "docs" / "reference" / "backends.md"
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
    "nothing computed for masked cameras and padding": model(skip_unused=True),
    "validation on held-out episodes": run(holdout_episodes=1),
}


def can(name: str, change: Change) -> bool:
    """Whether a backend accepts a recipe, and makes what training and checkpoints need of it."""
    config = change(dataclasses.replace(tiny_recipe.tiny, exp_name="table", backend=name))
    backend: Backend = open_backend(config)
    try:
        backend.check()
    except ValueError:
        return False
    specs = backend.param_specs()
    assert backend.required_bytes(lambda path: False) > 4 * len(specs)
    return True


def table() -> str:
    rows = {feature: [can(name, change) for name in BACKENDS] for feature, change in FEATURES.items()}
    rows["sampling with given noise, warm-up before the first request"] = [
        hasattr(SAMPLERS[name], "warm_up") and hasattr(SAMPLERS[name], "sample") for name in BACKENDS
    ]
    lines = [f"| feature | {' | '.join(BACKENDS.values())} |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join('yes' if has else '-' for has in both)} |" for name, both in rows.items()]
    return "\n".join(lines)


def test_the_documented_table_is_what_the_backends_say_and_has_no_holes() -> None:
    built = table()
    assert "| - |" not in built
    assert built in DOCUMENT.read_text()


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
