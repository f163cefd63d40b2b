"""Records what the real LeRobot 0.6.1 writes: `python make.py`, in an environment with `lerobot[pi,dataset]==0.6.1`.

    policies/<kind>_<actions>/   config and processors; `off` has the step of relative actions, switched off
    datasets/<codec>/            two episodes with a feature of more axes; the film of `av1` has odd sides
    datasets/annotated/          depth, language columns and subtasks; `annotated.json`: what LeRobot reads of them

Tokenizers are on the hub; objects that are never called stand in for them here.
"""

import json
import os
import shutil
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets as hub
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.configs.video import RGBEncoderConfig
from lerobot.datasets import language
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


def annotated() -> None:
    """The language columns are put behind the others, as `lerobot-annotate` does."""
    root = HERE / "datasets" / "annotated"
    shutil.rmtree(root, ignore_errors=True)
    names = ["height", "width", "channels"]
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "subtask_index": {"dtype": "int64", "shape": (1,), "names": None},
        "observation.images.top": {"dtype": "image", "shape": (16, 16, 3), "names": names},
        "observation.images.far": {
            "dtype": "video",
            "shape": (16, 32, 1),
            "names": names,
            "info": {"is_depth_map": True},
        },
    }
    rng = np.random.default_rng(2)
    written = LeRobotDataset.create("test/set", 10, features, root=root)
    for _ in range(2):
        for frame in range(6):
            values = {key: rng.normal(size=2).astype(np.float32) for key in ("observation.state", "action")}
            values["observation.images.top"] = np.full((16, 16, 3), 40 * frame, np.uint8)
            values["observation.images.far"] = np.full((16, 32, 1), 500 + 100 * frame, np.uint16)
            written.add_frame({**values, "subtask_index": np.array([frame // 3]), "task": "put the cup away"})
        written.save_episode()
    written.finalize()
    _annotate(root)
    texts = pd.Index(["reach for the cup", "carry it"], name="subtask")
    pd.DataFrame({"subtask_index": [0, 1]}, index=texts).to_parquet(root / "meta/subtasks.parquet")
    read = LeRobotDataset("test/set", root=root)
    items = [{key: read[i][key] for key in language.LANGUAGE_COLUMNS} for i in range(len(read))]
    root.with_suffix(".json").write_text(json.dumps(items, indent=1) + "\n")


def _annotate(root: Path) -> None:
    def row(role: str, content: str | None, style: str | None, **more: object) -> dict:
        return {"role": role, "content": content, "style": style, "camera": None, "tool_calls": None, **more}

    subtasks = [row("assistant", text, "subtask", timestamp=t) for t, text in ((0.0, "reach"), (0.3, "carry"))]
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": "I have it"}}}
    events = [row("user", "stop", "interjection"), row("assistant", None, None, tool_calls=[call])]
    [file] = root.glob("data/*/*.parquet")
    table = pq.read_table(file)
    columns = {
        "language_persistent": [subtasks if n == 0 else [] for n in table["episode_index"].to_pylist()],
        "language_events": [events if n == 2 else [] for n in table["frame_index"].to_pylist()],
    }
    kinds = (language.language_persistent_column_feature(), language.language_events_column_feature())
    told = hub.Dataset.from_dict(columns, features=hub.Features(dict(zip(columns, kinds, strict=True))))
    told.to_parquet(root / "told.parquet")
    added = pq.read_table(root / "told.parquet")
    (root / "told.parquet").unlink()
    for name in columns:
        table = table.append_column(added.field(name), added[name])
    pq.write_table(table.replace_schema_metadata(None), file, row_group_size=6)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"] |= language.language_feature_info()
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))


if __name__ == "__main__":
    policies()
    dataset("av1", "libsvtav1", (33, 47, 3))
    dataset("hevc", "hevc", (64, 96, 3))
    annotated()
