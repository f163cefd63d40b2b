"""What a LeRobot policy folder holds besides weights: `config.json`, and processors with normalisation statistics.

Source: the checkpoint specification, section 5.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared.errors import first_line
from openpi.shared.normalize import NormStats
from openpi.weights import safetensors_io
from openpi.weights.layout import CONFIG_FILE, read_config

logger = logging.getLogger("openpi")

PROCESSORS = {"policy_preprocessor": "normalizer_processor", "policy_postprocessor": "unnormalizer_processor"}
TYPES = ("pi0", "pi05", "pi0_fast")

# Our names of vectors -> the dataset's, and the kind that `normalization_mapping` speaks of.
_FEATURES = {"state": ("observation.state", "STATE"), "actions": ("action", "ACTION")}
_FIELDS = {"mean": "mean", "std": "std", "q01": "q01", "q99": "q99"}
# Steps of processors that our transforms do, or that have nothing to do with numbers.
_COVERED = {
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "tokenizer_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "normalizer_processor",
    "unnormalizer_processor",
}


def read_norm_stats(folder: Path, *, use_quantiles: bool) -> dict[str, NormStats]:
    """Statistics of state and actions, from the files that the processors name.

    Args:
        use_quantiles: how the recipe normalises.
    Raises:
        FileNotFoundError: there are none.
        ValueError: the policy was trained with another kind of normalisation, or a file is damaged.
    """
    _check_kind(folder, use_quantiles)
    tensors: dict[str, np.ndarray] = {}
    for file, step in _steps(folder):
        name = step.get("registry_name")
        if name not in _COVERED:
            logger.warning("%s has the step '%s', which is not done here; the recipe's transforms are", file.name, name)
        state = step.get("state_file")
        if state is not None:
            opened = safetensors_io.open_tensors(file.parent / Path(state).name)
            tensors = {key: np.array(opened[key], np.float64).reshape(-1) for key in opened} | tensors
    found = {}
    for ours, (feature, _) in _FEATURES.items():
        fields = {field: tensors.get(f"{feature}.{name}") for field, name in _FIELDS.items()}
        if fields["mean"] is not None and fields["std"] is not None:
            found[ours] = NormStats(**fields)  # type: ignore[arg-type]
    missing = [feature for ours, (feature, _) in _FEATURES.items() if ours not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no normalisation statistics of {' and '.join(missing)}: base policies of LeRobot have none, "
            "or none in policy_preprocessor.json. Pass norm_stats, or put assets/<asset id>/norm_stats.json there "
            "(`openpi stats` computes it)"
        )
    return found


def _check_kind(folder: Path, use_quantiles: bool) -> None:
    mapping = read_config(folder).get("normalization_mapping") or {}
    ours = "QUANTILES" if use_quantiles else "MEAN_STD"
    for _, kind in _FEATURES.values():
        theirs = mapping.get(kind, ours)
        if theirs != ours:
            raise ValueError(
                f"{folder / CONFIG_FILE} normalises {kind} by {theirs}, and this recipe does it by {ours}: "
                "the robot would get wrong actions. Use a recipe of the model family that the policy has"
            )


def _steps(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name in PROCESSORS:
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        try:
            steps = list(json.loads(file.read_text())["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}); expected an object with 'steps'") from error
        yield from ((file, step) for step in steps)


def write(folder: Path, config: Any, norm_stats: Mapping[str, NormStats] | None, *, dtype: str) -> None:
    """Writes `config.json` and, with statistics, the processors.

    Args:
        config: of the model.
        norm_stats: in the units of the dataset.
        dtype: `float32` or `bfloat16`.
    """
    kind = config.model_type.value
    uses_quantiles = kind != "pi0"
    width = {ours: _width(norm_stats, ours, config.action_dim) for ours in _FEATURES}
    cameras = {
        f"observation.images.{key}": _feature("VISUAL", 3, *config.image_resolution) for key in config.image_keys
    }
    mapping = dict.fromkeys(("STATE", "ACTION"), "QUANTILES" if uses_quantiles else "MEAN_STD")
    document: dict[str, Any] = {
        "type": kind,
        "n_obs_steps": 1,
        "chunk_size": config.action_horizon,
        "n_action_steps": config.action_horizon,
        "max_state_dim": config.action_dim,
        "max_action_dim": config.action_dim,
        "tokenizer_max_length": config.max_token_len,
        "image_resolution": list(config.image_resolution),
        "empty_cameras": 0,
        "dtype": dtype,
        "normalization_mapping": {"VISUAL": "IDENTITY", **mapping},
        "input_features": {**cameras, "observation.state": _feature("STATE", width["state"])},
        "output_features": {"action": _feature("ACTION", width["actions"])},
    }
    if kind != "pi0_fast":
        document |= {"num_inference_steps": 10, "min_period": 4e-3, "max_period": 4.0}
    _write_json(folder / CONFIG_FILE, document)
    if norm_stats is None:
        return
    features = document["input_features"] | document["output_features"]
    normal = {"eps": 1e-8, "features": features, "norm_map": document["normalization_mapping"]}
    tensors = {
        f"{feature}.{name}": np.asarray(value, np.float32)
        for ours, (feature, _) in _FEATURES.items()
        for field, name in _FIELDS.items()
        if (value := getattr(norm_stats[ours], field)) is not None
    }
    text = {"max_length": config.max_token_len, "padding": "max_length", "padding_side": "right", "task_key": "task"}
    prompt = ("tokenizer_processor", {**text, "truncation": True, "tokenizer_name": "google/paligemma-3b-pt-224"})
    steps: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "policy_preprocessor": [
            ("rename_observations_processor", {"rename_map": {}}),
            ("to_batch_processor", {}),
            *([("pi0_new_line_processor", {}), prompt] if kind == "pi0" else []),
            ("normalizer_processor", normal),
            *(
                [("pi05_prepare_state_tokenizer_processor_step", {"max_state_dim": config.action_dim}), prompt]
                if kind == "pi05"
                else []
            ),
            ("device_processor", {"device": "cpu", "float_dtype": None}),
        ],
        "policy_postprocessor": [
            ("unnormalizer_processor", normal),
            ("device_processor", {"device": "cpu", "float_dtype": None}),
        ],
    }
    for name, its_steps in steps.items():
        listed = []
        for place, (step, options) in enumerate(its_steps):
            entry: dict[str, Any] = {"registry_name": step, "config": options}
            if step == PROCESSORS[name]:
                entry["state_file"] = f"{name}_step_{place}_{step}.safetensors"
                safetensors_io.save(folder / entry["state_file"], tensors)
            listed.append(entry)
        _write_json(folder / f"{name}.json", {"name": name, "steps": listed})


def _width(norm_stats: Mapping[str, NormStats] | None, ours: str, default: int) -> int:
    return default if norm_stats is None else norm_stats[ours].width


def _feature(kind: str, *shape: int) -> dict[str, Any]:
    return {"type": kind, "shape": list(shape)}


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")
