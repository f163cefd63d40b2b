"""How much FP8 changes action chunks: the products as a GPU makes them, on a processor.

    python benchmarks/fp8_accuracy.py [--samples 8] [--report benchmarks/fp8_accuracy.md]

A trained model (the demo's), recorded tiny ones with random weights, and middle-sized ones with random weights, plain
and with a few channels thirty times as large as the others, as large models have them.
"""

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.models_pytorch import fp8_calibration, loading
from openpi.models_pytorch.gemma import RMSNorm
from openpi.models_pytorch.model import fresh_parameters
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.weights import names

ROOT = Path(__file__).resolve().parents[1]
TARGET = 0.998
_OUTLIERS, _TIMES_AS_LARGE = 4, 30.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    load: the model, with parameters of a dtype.
    batches: inputs of a sampler, one sample each.
    """

    name: str
    config: Pi0Config
    load: Callable[[Pi0Config, torch.dtype], nn.Module]
    batches: Sequence[dict[str, Any]]


def cases(count: int) -> Iterator[Case]:
    yield demo(count)
    for name in ("pi0", "pi05"):
        yield recorded(name)
    yield Case("middle-sized pi0.5, random weights", MIDDLE, drawn, random_batches(MIDDLE, count))
    yield Case("the same, some channels 30 times as large", MIDDLE, with_outliers, random_batches(MIDDLE, count))


def demo(count: int) -> Case:
    """Scenes of the table-top, through the checkpoint's own transforms."""
    from openpi import transforms
    from openpi.envs import world
    from openpi.policies import policy_config
    from openpi.training import recipe_io

    checkpoint = Checkpoint(ROOT / "packages/openpi-demo/src/openpi_demo/base")
    recipe = recipe_io.load_recipe(checkpoint.folder)
    to_model = transforms.compose(policy_config.load_pipeline(recipe, checkpoint).inputs)
    arena: Any = world.find("tabletop")(task="pick")  # type: ignore[call-arg]
    played, tasks = arena.open(), arena.tasks()
    batches = []
    for seed in range(count):
        task = tasks[seed % len(tasks)]
        played.reset(task, seed)
        batches.append(batch_of(to_model({**played.observe(), "prompt": task.prompt})))
    played.close()
    config: Any = recipe.model

    def load(config: Pi0Config, dtype: torch.dtype) -> nn.Module:
        told = "float32" if dtype == torch.float32 else "bfloat16"
        return loading.load_checkpoint(config, checkpoint.weights(config), dtype=told)

    return Case("the demo's base, trained, on its scenes", config, load, batches)


def recorded(name: str) -> Case:
    sys.path.insert(0, str(ROOT / "tests/support"))
    from golden_kits import load_kit

    kit = load_kit(ROOT / "tests/golden" / name)
    seen = kit.observation()
    batches = [rows(seen, slice(i, i + 1)) for i in range(len(seen["state"]))]

    def load(config: Pi0Config, dtype: torch.dtype) -> nn.Module:
        return loading.from_tree(config, kit.params, dtype=lambda row, stored: loading.served_dtype(row, dtype))

    return Case(f"recorded tiny {name}, random weights", kit.config, load, batches)


def rows(tree: Any, part: slice) -> Any:
    return {key: rows(value, part) for key, value in tree.items()} if isinstance(tree, dict) else tree[part]


def batch_of(sample: Any) -> Any:
    if isinstance(sample, dict):
        return {key: batch_of(value) for key, value in sample.items()}
    return np.asarray(sample)[None]


# --- middle-sized -------------------------------------------------------------------------------------------------

_EXPERT = GemmaConfig(512, depth=8, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64, vocab_size=4096)
MIDDLE = Pi0Config(
    pi05=True,
    paligemma_variant=_EXPERT,
    action_expert_variant=dataclasses.replace(_EXPERT, width=256, mlp_dim=1024),
    image_encoder_variant=SiglipConfig(256, 8, 1024, 4, 14),
    image_resolution=(112, 112),
    max_token_len=48,
    action_horizon=16,
)


def drawn(config: Pi0Config, dtype: torch.dtype) -> nn.Module:
    """As training begins, but for modulations: at zero, nothing that the action expert computes would count."""
    model = loading.create(config)
    served = {row.torch: loading.served_dtype(row, dtype) for row in names.rows(config)}
    for name, value in fresh_parameters(model, set(served), seed=0):
        if ".dense.weight" in name:
            value = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * value.shape[1] ** -0.5
        loading.set_parameter(model, name, value.to(served[name]), requires_grad=False)
    return model


def with_outliers(config: Pi0Config, dtype: torch.dtype) -> nn.Module:
    model = drawn(config, dtype)
    for module in model.modules():
        if isinstance(module, RMSNorm) and module.weight is not None:
            module.weight.data[: _OUTLIERS * 7 : 7] = _TIMES_AS_LARGE - 1
    return model


def random_batches(config: Pi0Config, count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    length = config.max_token_len

    def one() -> dict[str, Any]:
        size = (1, *config.image_resolution, 3)
        smooth = rng.integers(0, 256, (1, 7, 7, 3), np.uint8).repeat(size[1] // 7, 1).repeat(size[2] // 7, 2)
        return {
            "image": {key: np.roll(smooth, i, axis=3) for i, key in enumerate(config.image_keys)},
            "image_mask": dict.fromkeys(config.image_keys, np.ones(1, bool)),
            "state": rng.standard_normal((1, config.action_dim), np.float32),
            "tokenized_prompt": rng.integers(2, 4000, (1, length), np.int32),
            "tokenized_prompt_mask": np.arange(length)[None] < rng.integers(8, length),
        }

    return [one() for _ in range(count)]


# --- the table ----------------------------------------------------------------------------------------------------


def row_of(case: Case) -> list[str]:
    noise = np.random.default_rng(0).standard_normal(
        (len(case.batches), 1, case.config.action_horizon, case.config.action_dim), dtype=np.float32
    )

    def chunks(sampler: PytorchSampler) -> np.ndarray:
        return np.concatenate([sampler.sample(b, start) for b, start in zip(case.batches, noise, strict=True)])

    def sampler(dtype: torch.dtype) -> PytorchSampler:
        kind: Any = "float32" if dtype == torch.float32 else "bfloat16"
        config = dataclasses.replace(case.config, dtype=kind)
        return PytorchSampler(case.load(config, dtype), device="cpu")

    exact, served = chunks(sampler(torch.float32)), sampler(torch.bfloat16)
    rounded = fp8_calibration.cosines(chunks(served), exact)
    size = sum(p.numel() for p in served.model.parameters())
    measured = [fp8_calibration.calibrate(served.model, lambda: chunks(served), target=0.0, about={})]
    if measured[0].lowest < TARGET:
        measured.append(fp8_calibration.calibrate(served.model, lambda: chunks(served), target=TARGET, about={}))
    every, best = measured[0], measured[-1]
    errors = [layer.error for layer in every.layers.values()]
    return [
        f"{case.name} ({size / 1e6:.2g} M, n={len(case.batches)})",
        f"{rounded.min():.5f}",
        f"{np.median(errors):.3f} to {max(errors):.3f}",
        f"{every.lowest:.5f} / {every.mean:.5f}",
        f"{len(best.chosen())} of {len(best.layers)}",
        f"{best.lowest:.5f} / {best.mean:.5f}",
    ]


COLUMNS = (
    "model",
    "bf16 against f32, lowest cosine",
    "error of a product, median to largest",
    "all products in FP8: cosine, lowest / mean",
    f"kept in FP8 for {TARGET}",
    "cosine, lowest / mean",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for case in cases(args.samples):
        start = time.process_time()
        lines.append(f"| {' | '.join(row_of(case))} |")
        print(lines[-1], f"{time.process_time() - start:.0f} s", flush=True)
    if args.report:
        head = f"# FP8: how alike action chunks are\n\n{datetime.date.today()}, PyTorch {torch.__version__}, processor."
        args.report.write_text("\n".join([head, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
