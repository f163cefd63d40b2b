"""Records what the real LeRobot 0.6.1 writes: `python make.py`, in an environment with `lerobot[pi,dataset]==0.6.1`.

    policies/<kind>_<actions>/   config and processors; `off` has the step of relative actions, switched off
    datasets/<codec>/            two episodes with a feature of more axes; the film of `av1` has odd sides

Tokenizers are on the hub; objects that are never called stand in for them here.
"""

import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_policy_config, make_pre_post_processors
from transformers import AutoProcessor, AutoTokenizer

HERE = Path(__file__).parent
NAMES = ["waist.pos", "elbow.pos", "wrist.pos", "gripper.pos"]


def policies() -> None:
    AutoTokenizer.from_pretrained = AutoProcessor.from_pretrained = lambda *args, **kwargs: lambda text: text
    for kind in ("pi0", "pi05", "pi0_fast"):
        for actions in ("off", "relative"):
            config = make_policy_config(kind, device="cpu", use_relative_actions=actions == "relative")
            config.action_feature_names = NAMES
            config.input_features = {
                "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
                "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
            }
            config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
            folder = HERE / "policies" / f"{kind}_{actions}"
            shutil.rmtree(folder, ignore_errors=True)
            for processor in make_pre_post_processors(config, dataset_stats=stats()):
                processor.save_pretrained(folder)
            config.save_pretrained(folder)


def stats() -> dict:
    rng = np.random.default_rng(0)
    found = {}
    for key in ("observation.state", "action"):
        low, span = rng.normal(size=4), rng.uniform(0.1, 2, size=4)
        values = {"mean": low + span / 2, "std": span / 4, "q01": low, "q99": low + span}
        found[key] = {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
    return found


def dataset(name: str, encoder: str, shape: tuple[int, int, int]) -> None:
    root = HERE / "datasets" / name
    shutil.rmtree(root, ignore_errors=True)
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "pose": {"dtype": "float32", "shape": (2, 3), "names": None},
        "observation.images.film": {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]},
    }
    rng = np.random.default_rng(1)
    written = LeRobotDataset.create("test/set", 10, features, root=root, rgb_encoder=RGBEncoderConfig(vcodec=encoder))
    for episode in range(2):
        for frame in range(5):
            picture = np.full(shape, 40 * frame + 20 * episode, np.uint8)
            vectors = {key: rng.normal(size=features[key]["shape"]).astype(np.float32) for key in list(features)[:3]}
            written.add_frame({**vectors, "observation.images.film": picture, "task": f"task {episode}"})
        written.save_episode()
    written.finalize()


if __name__ == "__main__":
    policies()
    dataset("av1", "libsvtav1", (33, 47, 3))
    dataset("hevc", "hevc", (64, 96, 3))
