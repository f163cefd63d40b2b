"""What a LeRobot policy folder holds besides weights, as it is read: `config.json`, and processors with statistics.

Source: the checkpoint specification, section 5, and the behavior of LeRobot 0.6.1 (`tests/golden/lerobot_061`). Its
counterpart is `lerobot_writer.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.normalize import NormStats
from openpi.shared.strict_json import Json
from openpi.shared.typed_values import fitted
from openpi.weights import safetensors_io
from openpi.weights.layout import CONFIG_FILE, read_config

logger = logging.getLogger(__name__)

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
NORMALIZER, UNNORMALIZER = "normalizer_processor", "unnormalizer_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"

# Our names of vectors -> the dataset's, and the kind that `normalization_mapping` speaks of.
FEATURES = {"state": ("observation.state", "STATE"), "actions": ("action", "ACTION")}
STAT_FIELDS = ("mean", "std", "q01", "q99")

_WIDEST = 10_000  # action

OUR_EPSILON = 1e-6
"""What our formulas add to a standard deviation or a range (`openpi.transforms.Normalize`)."""

# Steps that our transforms do, that are compared with ours, or that have nothing to do with numbers.
_COVERED = {
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "tokenizer_processor",
    "action_tokenizer_processor",
    "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "pi0_fast_prepare_state_tokenizer_processor_step",
    NORMALIZER,
    UNNORMALIZER,
    RELATIVE,
    ABSOLUTE,
}


def has_processors(folder: Path) -> bool:
    return any((folder / f"{name}.json").is_file() for name in (PREPROCESSOR, POSTPROCESSOR))


def kind_of(*, use_quantiles: bool) -> str:
    """LeRobot's name of how a recipe normalizes."""
    return "QUANTILES" if use_quantiles else "MEAN_STD"


def is_relative(name: str | None, excluded: Sequence[str]) -> bool:
    """Whether the action dimension of this name is a change: LeRobot looks for the excluded words anywhere in the name,
    whatever their case; a dimension without a name is one.
    """
    return name is None or not any(word.lower() in name.lower() for word in excluded)


def read_relative(folder: Path) -> tuple[bool, ...] | None:
    """Per action dimension, whether the policy gives changes to the state, which LeRobot adds up.

    Returns:
        None where nothing in the folder speaks of it: files of a LeRobot that knew absolute actions only.
    Raises:
        ValueError: a file is damaged, or the two processors contradict each other.
    """
    config = read_config(folder)
    steps: dict[str | None, Mapping[str, Any]] = {}
    for file, step in _steps(folder):
        name = _name(step)
        if name in steps and name in (RELATIVE, ABSOLUTE):
            raise ValueError(f"{file} has the step '{name}' twice; expected it once. Export the policy again")
        steps[name] = _options(file, step)
    if not steps:  # weights alone: the policy's config is what its trainer went by
        names, excluded = config.get("action_feature_names"), config.get("relative_exclude_joints")
        before = {"enabled": config.get("use_relative_actions"), "action_names": names, "exclude_joints": excluded}
        steps = {RELATIVE: before, ABSOLUTE: before} if "use_relative_actions" in config else {}
    if not {RELATIVE, ABSOLUTE} & steps.keys():
        return None
    before, after = steps.get(RELATIVE, {}), steps.get(ABSOLUTE, {})
    enabled, undone = (
        _of_kind(options, "enabled", bool | None, f"{folder}, '{name}'") or False
        for name, options in ((RELATIVE, before), (ABSOLUTE, after))
    )
    if enabled != undone:
        raise ValueError(
            f"{folder}: '{RELATIVE}' of {PREPROCESSOR}.json has enabled={enabled}, and '{ABSOLUTE}' of "
            f"{POSTPROCESSOR}.json enabled={undone}; expected both or neither: nobody can tell whether it gives "
            "targets or changes. Correct the one that is wrong"
        )
    names = _of_kind(before, "action_names", list[str] | None, f"{folder}, '{RELATIVE}'") or ()
    excluded = _of_kind(before, "exclude_joints", list[str] | None, f"{folder}, '{RELATIVE}'") or ()
    width = _action_width(folder, config) or len(names)
    if not enabled:
        return (False,) * width
    padded = [*names, *[None] * (width - len(names))][:width]
    return tuple(is_relative(name, excluded) for name in padded)


def _action_width(folder: Path, config: Mapping[str, object]) -> int:
    """0 where it is not told."""
    name = FEATURES["actions"][0]
    where = f"{folder / CONFIG_FILE}, 'output_features'"
    features = _of_kind(config, "output_features", dict[str, Any] | None, where) or {}
    feature = _of_kind(features, name, dict[str, Any] | None, where) or {}
    shape = _of_kind(feature, "shape", list[int] | None, f"{where}['{name}']") or [0]
    if not 0 <= shape[0] <= _WIDEST:
        raise ValueError(f"{where}['{name}'].shape is {shape}; expected the width of an action")
    return shape[0]


def _of_kind(entries: Mapping[str, object], name: str, kind: object, where: str) -> Any:
    """An entry of a declared type; a text in place of a list of texts would pass for one of letters."""
    return fitted(entries.get(name), kind, f"{where}.{name}")


def read_norm_stats(folder: Path, *, use_quantiles: bool) -> dict[str, NormStats]:
    """Statistics of state and actions, from the files that the processors name.

    They are such that our formulas give what LeRobot's give, which add another epsilon.

    Args:
        use_quantiles: how the recipe normalizes.
    Raises:
        FileNotFoundError: there are none.
        ValueError: the policy was trained with another kind of normalization, or a file is damaged.
    """
    _check_kind(folder / CONFIG_FILE, read_config(folder).get("normalization_mapping"), use_quantiles)
    tensors: dict[str, np.ndarray] = {}
    epsilon = OUR_EPSILON
    for file, step in _steps(folder):
        name = _name(step)
        if name not in _COVERED:
            logger.warning("%s has the step '%s', which is not done here; the recipe's transforms are", file.name, name)
        if name in (NORMALIZER, UNNORMALIZER):  # what LeRobot runs by, whatever its policy's config says
            _check_kind(file, _options(file, step).get("norm_map"), use_quantiles)
        if name == NORMALIZER:
            epsilon = _of_kind({"eps": epsilon, **_options(file, step)}, "eps", float, f"{file}, '{name}'")
            if not 0 <= epsilon < 1:
                raise ValueError(f"{file}, '{name}'.eps is {epsilon}; expected a small number from 0 on")
        state = _of_kind(step, "state_file", str | None, f"{file}, '{name}'")
        if state is not None:
            opened = safetensors_io.open_tensors(file.parent / Path(state).name)
            own = {key: np.array(opened[key], np.float64).reshape(-1) for key in opened}
            _check_same(own, tensors, file.parent / Path(state).name)
            tensors = own | tensors
    found = {}
    for ours, (feature, _) in FEATURES.items():
        fields = {field: tensors.get(f"{feature}.{field}") for field in STAT_FIELDS}
        if fields["mean"] is not None and fields["std"] is not None:
            found[ours] = _in_our_formulas(NormStats(**fields), epsilon)  # type: ignore[arg-type]
    missing = [feature for ours, (feature, _) in FEATURES.items() if ours not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no normalisation statistics of {' and '.join(missing)}: base policies of LeRobot have none, "
            "or none in policy_preprocessor.json. Pass norm_stats, or put assets/<asset id>/norm_stats.json there "
            "(`openpi stats` computes it)"
        )
    return found


def _in_our_formulas(stats: NormStats, epsilon: float) -> NormStats:
    """LeRobot divides by std + epsilon, and by q99 - q01 (by epsilon where that is 0). Ranges no larger than our
    epsilon are of dimensions that stand still, and stay as they are.
    """
    std = np.where(stats.std > OUR_EPSILON, stats.std + (epsilon - OUR_EPSILON), stats.std)
    q99 = stats.q99
    if stats.q01 is not None and q99 is not None:
        q99 = np.where(q99 - stats.q01 > OUR_EPSILON, q99 - OUR_EPSILON, q99)
    return dataclasses.replace(stats, std=std, q99=q99)


def _check_kind(file: Path, mapping: object, use_quantiles: bool) -> None:
    ours = kind_of(use_quantiles=use_quantiles)
    for _, kind in FEATURES.values():
        theirs = mapping.get(kind, ours) if isinstance(mapping, Mapping) else ours
        if theirs != ours:
            raise ValueError(
                f"{file} normalises {kind} by {theirs}, and this recipe does it by {ours}: "
                "the robot would get wrong actions. Use a recipe of the model family that the policy has"
            )


def _check_same(own: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray], file: Path) -> None:
    """Normalizer and unnormalizer have statistics of the same features; a recipe has one set of them."""
    for key in (f"{feature}.{field}" for feature, _ in FEATURES.values() for field in STAT_FIELDS):
        if key in own and key in before and not np.array_equal(own[key], before[key], equal_nan=True):
            raise ValueError(
                f"{file} has another '{key}' than the step before it ({own[key][:3]}, {before[key][:3]}): one of them "
                "is of another dataset, and the robot would get wrong actions. Export the policy again"
            )


def _steps(folder: Path) -> Iterator[tuple[Path, Json]]:
    for name in (PREPROCESSOR, POSTPROCESSOR):
        file = folder / f"{name}.json"
        if not file.is_file():
            continue
        try:
            steps = [dict(step) for step in strict_json.read(file)["steps"]]
            if not all(isinstance(step.get("registry_name"), str | None) for step in steps):
                raise ValueError("a registry_name is no text")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged ({first_line(error)}); expected an object with 'steps'") from error
        yield from ((file, step) for step in steps)


def _name(step: Json) -> str | None:
    """As LeRobot registers it; of a step that is told by its class alone, what that is registered as."""
    if step.get("registry_name") is not None or not isinstance(step.get("class"), str):
        return step.get("registry_name")
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", step["class"].rpartition(".")[2]).lower().removesuffix("_step")
    return name if name in (NORMALIZER, UNNORMALIZER, RELATIVE, ABSOLUTE) else step["class"]


def _options(file: Path, step: Json) -> Mapping[str, object]:
    options = step.get("config") or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"{file} is damaged: 'config' of a step is {type(options).__name__}; expected an object")
    return options
