"""What is compiled, in a process of its own, where no shapes are checked: the compiler would compile the checks.

    python compiled_side.py PART,BACKEND,... PART,BACKEND,...

Every part is compiled whole: a graph break is an error.
"""

import dataclasses
import sys

import numpy as np
import torch
from torch import nn

import tiny_recipe
from golden_kits import load_kit
from openpi.models.pi0_config import Pi0Config
from openpi.models.rtc_config import RtcConfig
from openpi.models_pytorch import compiling, loading
from openpi.models_pytorch.model import fresh_parameters
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.training import data_loader
from openpi.training.backends.pytorch.backend import PyTorchBackend
from paths import GOLDEN


def actions(backend: str, family: str, device: str = "cpu") -> None:
    """Sampling gives the recorded ones; on a GPU as a CUDA graph."""
    kit = load_kit(GOLDEN / family)
    model = loading.from_tree(kit.config, kit.params)
    sampler = PytorchSampler(model, device=device, compile_mode="default", compile_backend=backend)
    for all_cameras, name in ((False, "sampled_actions_10"), (True, "sampled_actions_10_all_cameras")):
        found = sampler.sample(kit.observation(all_cameras=all_cameras), kit.inputs["sample_noise"])
        np.testing.assert_allclose(found, kit.outputs[name], atol=1e-4 if device == "cpu" else 1e-3)


def continues(backend: str, mode: str, jacobian: str, device: str = "cpu") -> None:
    """Chunks that go on from others are those that the program as it is written gives; on a GPU as a CUDA graph."""
    rng = np.random.default_rng(0)
    shape = (2, tiny_recipe.MODEL.action_horizon, tiny_recipe.MODEL.action_dim)
    weights = rng.random(shape, np.float32)
    continued = {"actions": rng.standard_normal(shape, np.float32), "weights": weights, "delay": np.int32([0, 2])}
    inputs = {
        "image": {"base_0_rgb": rng.integers(0, 255, (2, 28, 28, 3), np.uint8)},
        "image_mask": {"base_0_rgb": np.ones(2, bool)},
        "state": rng.standard_normal(shape[::2], np.float32),
        "tokenized_prompt": rng.integers(1, 100, (2, 8), np.int32),
        "tokenized_prompt_mask": np.ones((2, 8), bool),
        "continued": continued,
    }
    config = dataclasses.replace(tiny_recipe.MODEL, pi05=True, remat="full")
    options = {"num_steps": 2, "chunking": RtcConfig(mode, jacobian=jacobian)}  # type: ignore[arg-type]
    found = [
        PytorchSampler(random_model(config), **how).sample(inputs, continued["actions"][::-1].copy(), **options)
        for how in ({"device": "cpu"}, {"device": device, "compile_mode": "default", "compile_backend": backend})
    ]
    np.testing.assert_allclose(*found, atol=1e-4)


def shapes(backend: str, count: str) -> None:
    """As many as there may be: PyTorch's own limit is eight, and then an error."""
    vision = random_model().vision
    images = torch.rand(int(count), 28, 28, 3, generator=torch.Generator().manual_seed(0))
    expected = vision(images, dtype=torch.float32)
    compiling.compile_blocks(vision, backend=backend)
    for n in range(1, len(images) + 1):
        torch.testing.assert_close(vision(images[:n], dtype=torch.float32), expected[:n])


def random_model(config: Pi0Config = tiny_recipe.MODEL) -> nn.Module:
    model = loading.create(config, device="cpu")
    for name, value in fresh_parameters(model, dict(model.named_parameters()), seed=0):
        loading.set_parameter(model, name, value)
    return model


def steps(backend: str, remat: str) -> None:
    """Training steps, and validation, give what they give without."""
    config = dataclasses.replace(
        tiny_recipe.tiny,
        exp_name="compiled",
        backend="pytorch",
        model=dataclasses.replace(tiny_recipe.MODEL, pi05=True, remat=remat),
        pytorch_training_precision="float32",
    )
    found: tuple[list[float], list[float]] = [], []
    for numbers, is_compiled in zip(found, (True, False), strict=True):
        side = PyTorchBackend(dataclasses.replace(config, pytorch_compile=is_compiled), compile_backend=backend)
        state, batches = side.create_state(), iter(data_loader.create_batch_loader(config))
        for step in range(2):
            state, metrics = side.train_step(state, side.place(next(batches), step))
            numbers += [metrics["loss"], metrics["grad_norm"]]
        numbers.append(side.evaluate(state, next(batches), 0)[0])
    np.testing.assert_allclose(*found, rtol=1e-4)


if __name__ == "__main__":
    for words in sys.argv[1:]:
        part, *arguments = words.split(",")
        {"actions": actions, "continues": continues, "shapes": shapes, "steps": steps}[part](*arguments)
        torch.compiler.reset()
