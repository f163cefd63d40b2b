"""FP8: products as a GPU makes them, and what is measured of a checkpoint for it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_kits import load_kit
from meta_device import DEVICE, NothingWaits
from openpi.models_pytorch import fp8, fp8_calibration, loading
from openpi.models_pytorch.fp8 import Fp8Linear
from openpi.models_pytorch.fp8_file import FP8_FILE, Calibration, Layer
from openpi.models_pytorch.siglip import Linear
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.shared import download

TARGET = 0.998


def linear_of(inputs: int, outputs: int, seed: int = 0) -> Linear:
    linear = Linear(inputs, outputs)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (linear.weight, linear.bias):
        assert parameter is not None
        parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()
    return linear


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_in_fp8_is_that_of_the_rounded_numbers(dtype: torch.dtype) -> None:
    linear, x = linear_of(48, 32), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = Fp8Linear(linear, float(x.abs().amax()))
    found = layer(x)
    rows, weight = fp8.encoded(x, layer.scale).float() * layer.scale, layer.weight.float() * layer.weight_scale
    assert linear.bias is not None
    expected = F.linear(rows, weight, linear.bias.float())
    assert found.dtype == dtype and found.shape == (2, 5, 32)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.05)
    exact = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert float((found.float() - exact).norm() / exact.norm()) < 0.05
    assert layer.weight.element_size() == 1
    as_on_gpus = layer._scaled(fp8.encoded(x.flatten(0, -2), layer.scale), linear.bias.to(dtype), dtype)
    torch.testing.assert_close(
        as_on_gpus, found.flatten(0, -2), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )


@torch.no_grad()
def test_inputs_far_beyond_what_was_seen_are_clipped_and_stay_finite() -> None:
    layer, x = Fp8Linear(linear_of(16, 16), amax=1.0), torch.ones(1, 16).bfloat16()
    assert torch.equal(layer(1e6 * x), layer(fp8.HEADROOM * x))


def test_where_gradients_are_wanted_they_are_those_of_the_rounded_weights() -> None:
    layer, x = Fp8Linear(linear_of(16, 16), amax=1.0), torch.randn(3, 16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (layer.weight.float() * layer.weight_scale).sum(0).expand(3, -1))


@torch.no_grad()
def test_a_product_in_fp8_waits_for_nothing() -> None:
    layer, x = Fp8Linear(linear_of(16, 32), amax=4.0).to(DEVICE), torch.randn(3, 16).bfloat16().to(DEVICE)
    with NothingWaits():
        assert layer(x).shape == (3, 32)


# --- calibration --------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two products; between them one number is so large that in FP8 the others are zero beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"up": linear_of(16, 16), "down": linear_of(16, 16, seed=1)})
        down: Any = self.mlp["down"]
        down.weight.data[:, 0] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp["up"](x)
        return self.mlp["down"](torch.cat([torch.full_like(hidden[..., :1], 3e6), hidden[..., 1:]], dim=-1))


@torch.no_grad()
def test_a_product_that_does_not_bear_it_stays_as_it_is_and_is_told() -> None:
    chain, x = Chain(), torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    layers = {"mlp.up": chain.mlp["up"], "mlp.down": chain.mlp["down"]}
    named = nn.ModuleDict({"block": chain})
    found = fp8_calibration.calibrate(named, lambda: chain(x).float().numpy(), target=0.99, about={})
    assert {name: layer.is_fp8 for name, layer in found.layers.items()} == {
        "block.mlp.up": True, "block.mlp.down": False,
    }  # fmt: skip
    assert found.layers["block.mlp.down"].error > 0.5 > 0.05 > found.layers["block.mlp.up"].error
    assert found.lowest >= 0.99 and "kept as it is" in fp8_calibration.table(found)
    assert layers == {f"mlp.{name}": module for name, module in chain.mlp.items()}, "the model is left as it was"


@pytest.fixture(scope="module")
def calibrated(golden: Path) -> tuple[Any, Calibration, np.ndarray]:
    kit = load_kit(golden / "pi05")
    kit = dataclasses.replace(kit, config=dataclasses.replace(kit.config, dtype="bfloat16"))
    sampler = sampler_of(kit)

    def run() -> np.ndarray:
        return sampler.sample(kit.observation(), kit.inputs["sample_noise"], num_steps=2)

    return kit, fp8_calibration.calibrate(sampler.model, run, target=TARGET, about={"dataset": "recorded"}), run()


def sampler_of(kit: Any, **options: Any) -> PytorchSampler:
    model = loading.from_tree(kit.config, kit.params, dtype=lambda row, _: loading.served_dtype(row, torch.bfloat16))
    return PytorchSampler(model, device="cpu", **options)


def test_chunks_in_fp8_are_alike_and_the_file_brings_the_same(
    calibrated: tuple[Any, Calibration, np.ndarray], tmp_path: Path
) -> None:
    kit, found, plain = calibrated
    found.save(tmp_path)
    read = Calibration.load(tmp_path)
    assert read == found and [entry.name for entry in tmp_path.iterdir()] == [FP8_FILE]
    assert len(read.chosen()) > 20
    sampler = sampler_of(kit, calibration=read)
    num_made = sum(isinstance(module, Fp8Linear) for module in sampler.model.modules())
    assert num_made == len(read.chosen())
    chunks = sampler.sample(kit.observation(), kit.inputs["sample_noise"], num_steps=2)
    cosines = fp8_calibration.cosines(chunks, plain)
    assert TARGET <= cosines.min() < 1 and not np.array_equal(chunks, plain)
    assert cosines.min() == pytest.approx(found.lowest, abs=1e-9)


def test_a_calibration_of_other_weights_or_of_another_model_is_refused(
    calibrated: tuple[Any, Calibration, np.ndarray],
) -> None:
    kit, found, _ = calibrated
    name = next(iter(found.chosen()))
    other = dataclasses.replace(found.layers[name], weight_amax=3 * found.layers[name].weight_amax)
    with pytest.raises(ValueError, match="that was another checkpoint"):
        sampler_of(kit, calibration=dataclasses.replace(found, layers={name: other}))
    with pytest.raises(ValueError, match=r"not of this model, such as 'vision\.nothing'"):
        sampler_of(kit, calibration=dataclasses.replace(found, layers={"vision.nothing": other}))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("version",), 7), (("layers",), [1]), (("layers", "a", "amax"), "inf"), (("layers", "a", "amax"), -1.0),
        (("layers", "a", "weight_amax"), 0), (("layers", "a", "is_fp8"), "yes"), (("cosine",), {}),
        (("layers", "a"), 3),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_what_writes_it_again(
    where: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    Calibration({"a": Layer(1.0, 1.0, 0.1, True)}, 1.0, 1.0, TARGET, {}).save(tmp_path)
    document = json.loads((tmp_path / FP8_FILE).read_text())
    entry = document
    for key in where[:-1]:
        entry = entry[key]
    entry[where[-1]] = value
    (tmp_path / FP8_FILE).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"is damaged or of another version.*`openpi calibrate-fp8`"):
        Calibration.load(tmp_path)


# --- the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, in bfloat16."""
    folder = tmp_path_factory.mktemp("fp8") / "base"
    shutil.copytree(download.maybe_download("package:openpi.demo/base"), folder)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from openpi.data.lerobot.writer import LeRobotWriter

    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channel"]}
    vector = {"dtype": "float32", "shape": (6,), "names": None}
    features = {"image": image, "wrist_image": image, "state": vector, "actions": vector}
    folder, rng = tmp_path_factory.mktemp("scenes") / "dataset", np.random.default_rng(0)
    with LeRobotWriter(folder, fps=10, features=features, robot_type="arm") as writer:
        pictures = rng.integers(0, 256, (2, 14, 64, 64, 3), np.uint8)
        vectors = rng.uniform(-0.3, 0.3, (2, 14, 6)).astype(np.float32)
        frames = {"image": pictures[0], "wrist_image": pictures[1], "state": vectors[0], "actions": vectors[1]}
        writer.add_episode(frames, task="pick up the red block")
    return folder


def test_a_checkpoint_is_calibrated_on_a_dataset_and_served_in_fp8(
    checkpoint: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from openpi.cli.checkpoints import calibrate_fp8
    from openpi.cli.serving import server

    with pytest.raises(FileNotFoundError, match=r"has no fp8\.json.*`openpi calibrate-fp8"):
        server.load_policy(server.Args(str(checkpoint), dtype="bfloat16", fp8=True, pytorch_device="cpu"))
    assert calibrate_fp8.main([str(checkpoint), "--dataset", str(scenes), "--samples", "2", "--num-steps", "2"]) == 1
    assert "in float32" in capsys.readouterr().err
    words = [str(checkpoint), "--dataset", str(scenes), "--samples", "2", "--num-steps", "2", "--dtype", "bfloat16"]
    assert calibrate_fp8.main(words) == 0
    told = capsys.readouterr().out
    found = Calibration.load(checkpoint)
    assert f"{len(found.chosen())} of {len(found.layers)} products in FP8" in told and found.lowest >= TARGET
    assert found.about["samples"] == 2 and found.about["dataset"] == str(scenes)
    asked = server.Args(str(checkpoint), dtype="bfloat16", fp8=True, pytorch_device="cpu", num_steps=2, rtc="off")
    policy = server.load_policy(asked)
    assert any(isinstance(module, Fp8Linear) for module in policy._sampler.model.modules())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"backend": "jax", "dtype": "bfloat16"}, "backend is jax"),
        ({}, "model in float32"),
        ({"dtype": "float32"}, "model in float32"),
    ],
)
def test_what_fp8_is_not_for_is_refused_before_weights_are_read(
    options: dict[str, Any], told: str, checkpoint: Path
) -> None:
    from openpi.cli.serving import server

    with pytest.raises(ValueError, match=told):
        server.load_policy(server.Args(str(checkpoint), fp8=True, **options))
