"""Writes what a LeRobot policy folder holds besides weights, such that LeRobot 0.6.1 loads and runs it.

    policy_preprocessor    rename, batch, [relative], normalize, prompt tokens, device    one observation -> the model
    policy_postprocessor   unnormalize, [absolute], device                               the model -> the robot

Source: the checkpoint specification, section 5, and the behavior of LeRobot 0.6.1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.shared.normalize import NormStats
from openpi.shared.strict_json import Json
from openpi.weights import safetensors_io
from openpi.weights.layout import CONFIG_FILE
from openpi.weights.lerobot_files import (
    ABSOLUTE,
    FEATURES,
    NORMALIZER,
    OUR_EPSILON,
    POSTPROCESSOR,
    PREPROCESSOR,
    RELATIVE,
    STAT_FIELDS,
    UNNORMALIZER,
    is_relative,
    kind_of,
)

if TYPE_CHECKING:
    from openpi.models.model_config import PaliGemmaConfig


PUBLISHED_ACTION_TOKENIZER = "physical-intelligence/fast"
_PROMPT_TOKENIZER = "google/paligemma-3b-pt-224"

Step = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class LeRobotRobot:
    """A robot in LeRobot's terms.

    Attributes:
        cameras: features, in the order in which the model sees them.
        state_width: of `observation.state`.
        action_names: one per dimension of `action`.
        relative: per action dimension, whether the model gives changes to the state.
        use_quantiles: how state and actions are normalized.
        renamed: features of the dataset that have another name than LeRobot's policies expect.
    """

    cameras: tuple[str, ...]
    state_width: int
    action_names: tuple[str, ...]
    relative: tuple[bool, ...]
    use_quantiles: bool
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


def write(
    folder: Path,
    config: PaliGemmaConfig,
    robot: LeRobotRobot,
    norm_stats: Mapping[str, NormStats] | None,
    *,
    variants: Mapping[str, str],
    dtype: str,
) -> None:
    """Writes `config.json` and, with statistics, the processors.

    Args:
        config: of the model.
        norm_stats: in the units of the dataset; dimensions beyond the robot's are left out.
        variants: fields of the config that name the model's size.
        dtype: `float32` or `bfloat16`.
    """
    relative = any(robot.relative)
    names, excluded = exclusions(robot.action_names, robot.relative) if relative else ((), ["gripper"])
    document = _policy_config(config, robot, variants, dtype)
    document |= {
        "use_relative_actions": relative,
        "relative_exclude_joints": excluded,
        "action_feature_names": list(names) if relative else None,
    }
    _write_json(folder / CONFIG_FILE, document)
    if norm_stats is None:
        return
    features = document["input_features"] | document["output_features"]
    normal = {"eps": OUR_EPSILON, "features": features, "norm_map": document["normalization_mapping"]}
    changes = {"enabled": relative, "exclude_joints": excluded, "action_names": document["action_feature_names"]}
    device: Step = ("device_processor", {"device": "cpu", "float_dtype": None})
    before: list[Step] = [
        ("rename_observations_processor", {"rename_map": dict(robot.renamed)}),
        ("to_batch_processor", {}),
        (RELATIVE, changes),
        (NORMALIZER, normal),
        *_prompt_steps(config),
        device,
    ]
    after: list[Step] = [(UNNORMALIZER, normal), (ABSOLUTE, {"enabled": relative}), device]
    widths = {"state": robot.state_width, "actions": len(robot.action_names)}
    tensors = _tensors({key: _cut(norm_stats[key], width) for key, width in widths.items()})
    for name, steps in ((PREPROCESSOR, before), (POSTPROCESSOR, after)):
        _write_processor(folder, name, steps, tensors)


def exclusions(names: tuple[str, ...], relative: tuple[bool, ...]) -> tuple[tuple[str, ...], list[str]]:
    """Names of dimensions and excluded words that say the mask by LeRobot's rule (`is_relative`).

    The names stay as they are where the rule allows it; where one contains another (joint_1, joint_10), all are
    numbered.
    """
    numbered = tuple(f"<{place}> {name}" for place, name in enumerate(names))
    words = tuple(f"<{place}>" for place in range(len(names)))
    for found, marks in ((names, names), (numbered, words)):
        excluded = [mark for mark, changes in zip(marks, relative, strict=True) if not changes]
        if tuple(is_relative(name, excluded) for name in found) == tuple(relative):
            break
    return found, excluded


def _policy_config(config: PaliGemmaConfig, robot: LeRobotRobot, variants: Mapping[str, str], dtype: str) -> Json:
    kind = config.model_type.value
    normal = kind_of(use_quantiles=robot.use_quantiles)
    cameras = {key: _feature("VISUAL", 3, *config.image_resolution) for key in robot.cameras}
    document: dict[str, Any] = {
        "type": kind,
        "n_obs_steps": 1,
        **variants,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "tokenizer_max_length": config.max_token_len,
        "image_resolution": list(config.image_resolution),
        "empty_cameras": 0,
        "dtype": dtype,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": normal, "ACTION": normal},
        "input_features": {**cameras, "observation.state": _feature("STATE", robot.state_width)},
        "output_features": {"action": _feature("ACTION", len(robot.action_names))},
    }
    if kind != "pi0_fast":
        return document | {"num_inference_steps": 10, "min_period": 4e-3, "max_period": 4.0}
    return document | {
        "text_tokenizer_name": _PROMPT_TOKENIZER,
        "action_tokenizer_name": action_tokenizer(config),
        "max_action_tokens": _max_action_tokens(config),
        "max_decoding_steps": _max_action_tokens(config),
    }


def action_tokenizer(config: Any) -> str:
    """Of pi0-FAST: its name on the hub."""
    return config.action_tokenizer_path or PUBLISHED_ACTION_TOKENIZER


def _max_action_tokens(config: Any) -> int:
    """Of pi0-FAST; as LeRobot's own, but for models of longer texts."""
    return config.max_decoding_steps


def _prompt_steps(config: PaliGemmaConfig) -> list[Step]:
    """Of pi0.5 and pi0-FAST, behind the normalizer: the state is in the prompt."""
    text = {"max_length": config.max_token_len, "padding": "max_length", "padding_side": "right", "task_key": "task"}
    tokens: Step = ("tokenizer_processor", {**text, "truncation": True, "tokenizer_name": _PROMPT_TOKENIZER})
    kind = config.model_type.value
    if kind == "pi0":
        return [("pi0_new_line_processor", {}), tokens]
    with_state: Step = (f"{kind}_prepare_state_tokenizer_processor_step", {})
    if kind == "pi05":
        return [with_state, tokens]
    actions = {"trust_remote_code": True, "max_action_tokens": _max_action_tokens(config)}
    actions |= {"action_tokenizer_name": action_tokenizer(config)}
    return [with_state, tokens, ("action_tokenizer_processor", actions)]


def _cut(stats: NormStats, width: int) -> NormStats:
    values = {name: getattr(stats, name) for name in STAT_FIELDS}
    cut = {name: value[..., :width] for name, value in values.items() if value is not None}
    return NormStats(**cut)


def _tensors(norm_stats: Mapping[str, NormStats]) -> dict[str, np.ndarray]:
    """Inverse of `lerobot_files.read_norm_stats`. Our epsilon goes along in the file, but LeRobot adds it to a range
    only where that is 0.
    """
    tensors = {}
    for ours, stats in norm_stats.items():
        fields = {name: getattr(stats, name) for name in STAT_FIELDS}
        if stats.q01 is not None and stats.q99 is not None:
            fields["q99"] = np.where(stats.q99 > stats.q01, stats.q99 + OUR_EPSILON, stats.q99)
        feature = FEATURES[ours][0]
        tensors |= {f"{feature}.{name}": np.asarray(v, np.float32) for name, v in fields.items() if v is not None}
    return tensors


def _write_processor(folder: Path, name: str, steps: list[Step], tensors: dict[str, np.ndarray]) -> None:
    listed = []
    for place, (step, options) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": step, "config": options}
        if step in (NORMALIZER, UNNORMALIZER):
            entry["state_file"] = f"{name}_step_{place}_{step}.safetensors"
            safetensors_io.save(folder / entry["state_file"], tensors)
        listed.append(entry)
    _write_json(folder / f"{name}.json", {"name": name, "steps": listed})


def _feature(kind: str, *shape: int) -> dict[str, object]:
    return {"type": kind, "shape": list(shape)}


def _write_json(file: Path, document: Mapping[str, object]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")
