"""LeRobot 0.6.1 itself, both ways. It needs Python 3.12 and 6 GB of packages, so this runs only when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream tests/test_lerobot_upstream.py

OPENPI_LEROBOT_PYTHON names the interpreter of an environment that has `lerobot[pi,dataset]==0.6.1` already.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden_kits import load_kit
from openpi.cli import convert_checkpoint
from openpi.policies.policy_config import create_trained_policy
from openpi.shared import normalize
from openpi.training import recipe_io
from openpi.training.config import AssetsConfig, LeRobotLiberoDataConfig, TrainConfig
from openpi.weights import orbax_io

PROGRAMS = Path(__file__).parent / "compat"
PATIENCE_S = 300

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index"),
]


@pytest.fixture(scope="session")
def lerobot_python(tmp_path_factory) -> Path:
    """Interpreter of an environment with LeRobot."""
    if given := os.environ.get("OPENPI_LEROBOT_PYTHON"):
        return Path(given)
    environment = tmp_path_factory.mktemp("lerobot")
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", "3.12", str(environment)], check=True)
    interpreter = environment / "bin" / "python"
    # Elsewhere than in this project, whose own constraints uv would apply.
    install = ["uv", "pip", "install", "--quiet", "--python", str(interpreter), "lerobot[pi,dataset]==0.6.1"]
    subprocess.run(install, check=True, cwd=environment)
    return interpreter


def in_lerobot(python: Path, program: str, *arguments: Any) -> str:
    command = [str(python), str(PROGRAMS / program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.returncode == 0, result.stderr
    return result.stdout


def libero_stats() -> dict[str, normalize.NormStats]:
    rng = np.random.default_rng(5)
    stats = {}
    for key, width in (("state", 8), ("actions", 7)):
        low = rng.normal(size=width)
        span = np.array([2.0, 1e-3, 0.5, 3.0, 1.0, 1e-4, 0.7, 0.0][:width])  # the last stands still
        stats[key] = normalize.NormStats(mean=low + span / 2, std=span / 4, q01=low, q99=low + span)
    return stats


@pytest.fixture
def checkpoint(request, golden: Path, tmp_path: Path) -> tuple[Path, TrainConfig]:
    """A tiny model of a robot whose actions may be changes, in our own layout."""
    family, relative = request.param
    kit = load_kit(golden / family)
    tokenizer = str(golden / "tokenizers" / "tiny_paligemma_tokenizer.model")
    model = dataclasses.replace(kit.config, tokenizer_path=tokenizer)
    data = LeRobotLiberoDataConfig(assets=AssetsConfig(asset_id="robot"), extra_delta_transform=relative)
    recipe = TrainConfig(name="tiny_lerobot", model=model, data=data)
    folder = tmp_path / "step"
    orbax_io.write_params(folder / "params", kit.params)
    normalize.save(folder / "assets" / "robot", libero_stats())
    recipe_io.save_recipe(folder, recipe)
    return folder, recipe


def sizes_of(model: Any) -> dict[str, Any]:
    dims, encoder = model.experts[0], model.image_encoder
    language = {name: getattr(dims, name) for name in ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads")}
    vision = {
        "hidden_size": encoder.width,
        "intermediate_size": encoder.mlp_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
    }
    return {"vision": vision, "language": language | {"head_dim": dims.head_dim}, "tokenizer": model.tokenizer_path}


@pytest.mark.parametrize("checkpoint", [(f, r) for f in ("pi0", "pi05") for r in (False, True)], indirect=True)
def test_lerobot_sends_its_robot_the_actions_that_we_send(checkpoint, lerobot_python: Path, tmp_path: Path) -> None:
    folder, recipe = checkpoint
    convert_checkpoint.convert(str(folder), tmp_path / "out", to="lerobot", any_model=True, with_certificate=False)
    rng = np.random.default_rng(6)
    images = [rng.integers(256, size=(224, 224, 3), dtype=np.uint8) for _ in range(2)]
    stats = libero_stats()["state"]
    state = (stats.mean + stats.std * rng.normal(size=8)).astype(np.float32)
    noise = rng.normal(size=(10, 8)).astype(np.float32)
    features = ("observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb")
    given = {**dict(zip(features, images, strict=True)), "state": state, "noise": noise, "task": "put it there"}
    np.savez(tmp_path / "observation.npz", **given)
    (tmp_path / "sizes.json").write_text(json.dumps(sizes_of(recipe.model)))
    arguments = (tmp_path / "out", tmp_path / "observation.npz", tmp_path / "sizes.json", tmp_path / "theirs.npz")
    in_lerobot(lerobot_python, "upstream_lerobot.py", *arguments)

    policy = create_trained_policy(recipe, folder, backend="pytorch", pytorch_device="cpu", dtype="float32")
    keys = ("observation/image", "observation/wrist_image")
    observation = {**dict(zip(keys, images, strict=True)), "observation/state": state, "prompt": "put it there"}
    ours = policy.infer(observation, noise=noise)["actions"]
    theirs = np.load(tmp_path / "theirs.npz")["actions"]
    assert theirs.shape == ours.shape == (10, 7)
    np.testing.assert_allclose(theirs, ours, atol=2e-4)
