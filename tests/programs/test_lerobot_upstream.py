"""LeRobot 0.6.1 itself, both ways. It needs Python 3.12 and 6 GB of packages, so this runs only when asked for:

OPENPI_UPSTREAM=1 pytest -m upstream tests/programs/test_lerobot_upstream.py

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

import paths
from golden_kits import load_kit
from openpi import transforms
from openpi.cli.checkpoints import convert_checkpoint
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.models.tokenizer import FASTTokenizer
from openpi.policies.policy_config import create_trained_policy
from openpi.shared import normalize
from openpi.training import recipe_io
from openpi.training.config import AssetsConfig, LeRobotLiberoDataConfig, TrainConfig
from openpi.weights import orbax_io

PROGRAMS = paths.SUPPORT / "compat"
# sentencepiece: what the recorded tokenizer is read with.
LEROBOT = ("lerobot[pi,dataset]==0.6.1", "sentencepiece")
PATIENCE_S = 300
ATOL = 1e-3  # of actions that span 3: ten steps of another implementation in float32

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
    install = ["uv", "pip", "install", "--quiet", "--python", str(interpreter), *LEROBOT]
    subprocess.run(install, check=True, cwd=environment)
    return interpreter


def in_lerobot(python: Path, program: str, *arguments: Any, **environment: str) -> None:
    command = [str(python), str(PROGRAMS / program), *map(str, arguments)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert result.returncode == 0, result.stderr


def libero_stats() -> dict[str, normalize.NormStats]:
    rng = np.random.default_rng(5)
    stats = {}
    for key, width in (("state", 8), ("actions", 7)):
        low = (
            rng.normal(size=width).astype(np.float32).astype(float)
        )  # LeRobot keeps float32: a state that stands still is there
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
    convert_checkpoint.convert(
        str(folder), convert_checkpoint.Target(tmp_path / "out", to="lerobot", any_model=True, certify=False)
    )
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
    np.testing.assert_allclose(theirs, ours, atol=ATOL)


@pytest.mark.parametrize("checkpoint", [("pi0_fast", True)], indirect=True)
def test_lerobot_makes_the_prompt_of_pi0_fast_from_an_export(checkpoint, lerobot_python: Path, tmp_path: Path) -> None:
    """Up to the answer: its pi0-FAST begins that itself, in its own way."""
    folder, recipe = checkpoint
    convert_checkpoint.convert(
        str(folder), convert_checkpoint.Target(tmp_path / "out", to="lerobot", any_model=True, certify=False)
    )
    stats = libero_stats()["state"]
    state = (stats.mean + stats.std).astype(np.float32)
    given = {"observation.images.base_0_rgb": np.zeros((224, 224, 3), np.uint8), "state": state, "noise": np.zeros(1)}
    np.savez(tmp_path / "observation.npz", **given, task="put it there")
    (tmp_path / "sizes.json").write_text(json.dumps(sizes_of(recipe.model)))
    arguments = (tmp_path / "out", tmp_path / "observation.npz", tmp_path / "sizes.json", tmp_path / "theirs.npz")
    in_lerobot(lerobot_python, "upstream_lerobot.py", *arguments)
    theirs = np.load(tmp_path / "theirs.npz")
    normal = transforms.Normalize(libero_stats(), use_quantiles=True)({"state": state})["state"]
    np.testing.assert_allclose(theirs["state"], normal, atol=1e-4)
    tokenizer = FASTTokenizer(recipe.model.max_token_len, model_path=recipe.model.tokenizer_path)
    tokens, mask, _, _ = tokenizer.tokenize("put it there", normal, None)
    found = theirs["tokens"][theirs["tokens"] != 0][:-1]  # the line break is before the answer
    np.testing.assert_array_equal(found, tokens[mask][: len(found)])


# --- datasets -----------------------------------------------------------------------------------------------------

CAMERAS = {"observation.images.still": "image", "observation.images.film": "video"}


def dataset_features(size_hw: tuple[int, int]) -> dict[str, Any]:
    names = ["height", "width", "channels"]
    cameras = {key: {"dtype": kind, "shape": [*size_hw, 3], "names": names} for key, kind in CAMERAS.items()}
    return cameras | {
        "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": [2], "names": ["a", "b"]},
        "pose": {"dtype": "float32", "shape": [2, 3], "names": None},
        "cube": {"dtype": "float32", "shape": [2, 2, 2], "names": None},
        "reward": {"dtype": "float32", "shape": [1], "names": None},
        "done": {"dtype": "bool", "shape": [1], "names": None},
    }


def episode(seed: int, features: dict[str, Any], length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    frames = {}
    for key, feature in features.items():
        if key in CAMERAS:  # one color each: video changes details
            colors = rng.integers(40, 200, size=(length, 1, 1, 3), dtype=np.uint8)
            frames[key] = np.broadcast_to(colors, (length, *feature["shape"])).copy()
        elif feature["dtype"] == "bool":
            frames[key] = rng.random((length, 1)) > 0.5
        else:
            frames[key] = rng.normal(size=(length, *feature["shape"])).astype(np.float32)
    return frames


@dataclasses.dataclass(frozen=True)
class BothWays:
    """One dataset, to which either library adds."""

    python: Path
    root: Path
    features: dict[str, Any]
    codec: str

    def theirs(self, mode: str, *seeds: int) -> dict[str, np.ndarray]:
        """LeRobot writes these episodes, if any; returns what it reads then."""
        work = self.root.parent
        files = [work / name for name in ("features.json", "episodes.npz", "read.npz")]
        files[0].write_text(json.dumps(self.features))
        np.savez(files[1], **{f"{s}/{key}": v for s in seeds for key, v in episode(s, self.features).items()})
        in_lerobot(self.python, "upstream_lerobot_dataset.py", mode, self.root, *files, CODEC=self.codec)
        return dict(np.load(files[2]))

    def ours(self, *seeds: int, append: bool) -> None:
        with LeRobotWriter(self.root, fps=10, features=self.features, append=append) as writer:
            for seed in seeds:
                writer.add_episode(episode(seed, self.features), f"do {seed}")

    def check(self, theirs: dict[str, np.ndarray], *seeds: int) -> None:
        """Both read every value of these episodes."""
        ours = LeRobotDataset(self.root)
        parts = [episode(seed, self.features) for seed in seeds]
        assert list(theirs["task"]) == [f"do {seed}" for seed in seeds for _ in range(5)]
        assert [ours[i]["task"] for i in range(len(ours))] == list(theirs["task"])
        for key in self.features:
            expected = np.concatenate([part[key] for part in parts])
            for found in (np.stack([ours[i][key] for i in range(len(ours))]), theirs[key]):
                values = as_hwc(found) if key in CAMERAS else found.reshape(expected.shape)
                apart = np.abs(values.astype(float) - expected)
                if CAMERAS.get(key) == "video":  # of one color each, which encoders keep, if not at every edge
                    assert np.median(apart, axis=(1, 2)).max() <= 4, key
                    assert apart.mean(axis=(1, 2)).max() <= 8, key
                else:
                    assert apart.max() == 0, key
            assert theirs[f"stats/{key}/mean"].shape == ((3, 1, 1) if key in CAMERAS else expected.shape[-1:])


def as_hwc(frames: np.ndarray) -> np.ndarray:
    """LeRobot's [n, 3, h, w], films as uint8 and images as floats in [0, 1], to ours."""
    hwc = np.moveaxis(frames, 1, -1) if frames.shape[1] == 3 else frames
    return np.round(hwc * 255) if hwc.dtype.kind == "f" else hwc


@pytest.fixture(params=[("libsvtav1", (33, 47)), ("libsvtav1", (32, 48)), ("h264", (32, 48)), ("hevc", (64, 96))])
def both_ways(request, lerobot_python: Path, tmp_path: Path) -> BothWays:
    codec, size_hw = request.param
    return BothWays(lerobot_python, tmp_path / "set", dataset_features(size_hw), codec)


def test_we_add_to_what_lerobot_wrote_and_lerobot_goes_on(both_ways: BothWays) -> None:
    both_ways.check(both_ways.theirs("create", 0, 1), 0, 1)
    both_ways.ours(2, append=True)
    both_ways.check(both_ways.theirs("resume", 3), 0, 1, 2, 3)


@pytest.mark.parametrize("both_ways", [("libsvtav1", (32, 48)), ("libsvtav1", (33, 47))], indirect=True)
def test_lerobot_adds_to_what_we_wrote_and_we_go_on(both_ways: BothWays) -> None:
    both_ways.ours(0, 1, append=False)
    theirs = both_ways.theirs("resume", 2)
    both_ways.check(theirs, 0, 1, 2)
    poses = np.concatenate([episode(seed, both_ways.features)["pose"] for seed in (0, 1, 2)]).reshape(-1, 3)
    np.testing.assert_allclose(theirs["stats/pose/std"], poses.std(axis=0), atol=1e-5)
    both_ways.ours(3, append=True)
    both_ways.check(both_ways.theirs("read"), 0, 1, 2, 3)
