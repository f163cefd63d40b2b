"""A recipe's robot in LeRobot's terms, and what LeRobot cannot say of it.

LeRobot's processors know names of cameras, normalization, and actions relative to the state. Any transform may do any
more than that, so the transforms are not looked up by name but tried: what reaches the model, and comes back from it,
must be what LeRobot would make of the same observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openpi import transforms as _transforms
from openpi.checkpoints.checkpoint import RECIPE_FILE
from openpi.policies.contract import Contract
from openpi.policies.data_half import DataHalf
from openpi.policies.lerobot_trial import Known, Trial
from openpi.policies.robot_spec import find_spec, numbered, relative_dims
from openpi.weights import lerobot_files
from openpi.weights.layout import read_config
from openpi.weights.lerobot_writer import LeRobotRobot

if TYPE_CHECKING:
    from openpi.models.model_config import PaliGemmaConfig


_CAMERA_PREFIX = "observation.images."
_STATE = "observation.state"
_SCALES = (0.3, 3.0)  # of the made-up numbers: grippers and angles live in the first, thresholds show in the second
_KNOWN_MODEL_STEPS = (
    _transforms.InjectDefaultPrompt,
    _transforms.ResizeImages,
    _transforms.TokenizePrompt,
    _transforms.PadStatesAndActions,
    _transforms.TokenizeFASTInputs,
    _transforms.ExtractFASTActions,
)


@dataclasses.dataclass(frozen=True)
class Described:
    """What `describe` found out.

    Attributes:
        robot: None where it cannot be tried at all.
        losses: what LeRobot would do otherwise, a line each; empty = it does the same.
        notes: what its users have to know.
    """

    robot: LeRobotRobot | None
    losses: tuple[str, ...]
    notes: tuple[str, ...] = ()


def describe(data_config: DataHalf, model_config: PaliGemmaConfig, contract: Contract | None) -> Described:
    """The robot of a recipe.

    Args:
        data_config: with statistics or without.
        contract: of the checkpoint; needed where the robot's transforms bring no spec.
    """
    known = Known.find(data_config, model_config, contract)
    if known is None:
        what = _names(data_config.data_transforms.inputs)
        return Described(None, (f"{what}: neither a RobotSpec nor a contract.json tells what they take",))
    losses = [*_unknown_steps(data_config), *_relative_losses(data_config, known)]
    slots: dict[str, str | None] = {}
    for seed, scale in enumerate(_SCALES):
        trial = Trial.make(known, model_config, np.random.default_rng(seed), scale)
        try:
            data = trial.run(data_config.data_transforms.inputs)
            returned = trial.back(data_config.data_transforms.outputs, model_config)
        except Exception as error:  # whatever a user's transform raises
            losses.append(f"{_robot_steps(data_config)} cannot be tried: {type(error).__name__}: {error}")
            break
        slots, lines = trial.slots_of(data, model_config.image_keys)
        losses += [f"{_robot_steps(data_config)}: {line}" for line in (*lines, *trial.input_losses(data))]
        losses += [f"{_robot_steps(data_config, outputs=True)}: {line}" for line in trial.output_losses(returned)]
    robot = _robot(data_config, known, slots)
    return Described(robot, tuple(dict.fromkeys(losses)), tuple(_notes(data_config, known, slots, robot)))


def bare_robot(data_config: DataHalf, model_config: PaliGemmaConfig) -> LeRobotRobot:
    """What goes with weights alone: a robot as wide as the model, in the model's own names."""
    cameras = tuple(f"{_CAMERA_PREFIX}{slot}" for slot in model_config.image_keys)
    width = model_config.action_dim
    names = tuple(numbered("actions", width))
    relative = relative_dims(data_config.data_transforms.outputs, width)
    return LeRobotRobot(cameras, width, names, relative, data_config.use_quantile_norm)


def check_relative(folder: Path, data_config: DataHalf) -> None:
    """Compares a LeRobot folder's relative actions with the recipe's; other folders pass.

    Raises:
        ValueError: changes would be sent as targets, or targets as changes; the dimensions are named.
    """
    if read_config(folder).get("type") is None:
        return
    theirs = lerobot_files.read_relative(folder)
    if theirs is None and ((folder / RECIPE_FILE).is_file() or not lerobot_files.has_processors(folder)):
        return  # a base policy, or exported before such steps were written: the recipe beside it is what holds
    steps = data_config.data_transforms.outputs
    masks = [step.mask for step in steps if isinstance(step, _transforms.AbsoluteActions) and step.mask is not None]
    width = len(theirs or ()) or max(map(len, masks), default=0)
    theirs = theirs or (False,) * width
    ours = relative_dims(steps, width)
    differing = [place for place in range(width) if ours[place] != theirs[place]]
    if not differing:
        return
    spec = find_spec(data_config.data_transforms.inputs)
    names = spec.actions.names if spec is not None and spec.actions.width == width else numbered("actions", width)

    def named(kind: bool) -> str:
        chosen = [f"'{names[place]}' ({place})" for place in differing if theirs[place] is kind]
        return f"{', '.join(chosen)} {'are changes' if kind else 'are targets'} in the policy" if chosen else ""

    found = "; ".join(filter(None, (named(True), named(False))))
    raise ValueError(
        f"{folder} has other actions relative to the state than this recipe: {found}, and the other way round in the "
        f"recipe. The robot would get changes as targets, or targets as changes. Use a recipe with {_mask_text(theirs)}"
    )


def _mask_text(mask: Sequence[bool]) -> str:
    if not any(mask):
        return "absolute actions (no DeltaActions and AbsoluteActions)"
    return f"with_delta_actions(group, {tuple(mask)})"


def _unknown_steps(data_config: DataHalf) -> list[str]:
    """Steps around the robot's that are of no known kind, and steps of the dataset that do more than rename."""
    around = data_config.model_transforms
    lines = [
        f"{type(step).__name__}, a model transform, is none that LeRobot has"
        for step in (*around.inputs, *around.outputs)
        if not isinstance(step, _KNOWN_MODEL_STEPS)
    ]
    lines += [
        f"{type(step).__name__}, a repack transform, does more than rename"
        for step in data_config.repack_transforms.inputs
        if not isinstance(step, _transforms.RepackTransform)
    ]
    return lines


def _relative_losses(data_config: DataHalf, known: Known) -> list[str]:
    if any(known.mask) and len(known.state_names) < known.actions.width:
        return [
            f"actions relative to a state of {len(known.state_names)} values, fewer than the action's "
            f"{known.actions.width}: LeRobot takes one from the other whole"
        ]
    return []


def _robot_steps(data_config: DataHalf, *, outputs: bool = False) -> str:
    group = data_config.data_transforms
    return _names(group.outputs if outputs else group.inputs)


def _names(steps: Iterable[object]) -> str:
    """Of the transforms that LeRobot has no counterpart of."""
    ours = (_transforms.DeltaActions, _transforms.AbsoluteActions, _transforms.InjectDefaultPrompt)
    names = [getattr(step, "__name__", type(step).__name__) for step in steps if not isinstance(step, ours)]
    return ", ".join(names) or "the recipe's transforms"


# --- names --------------------------------------------------------------------------------------------------------


def _robot(data_config: DataHalf, known: Known, slots: Mapping[str, str | None]) -> LeRobotRobot:
    columns = _columns(data_config)
    found = [columns.get(key, key) if key else slot for slot, key in slots.items()]
    cameras = [
        column if column.startswith(_CAMERA_PREFIX) else f"{_CAMERA_PREFIX}{slot}"
        for slot, column in zip(slots, found, strict=True)
    ]
    state_columns = [columns.get(vector.key, vector.key) for vector in known.state]
    is_renamed = len(state_columns) == 1 and state_columns[0].startswith("observation.") and state_columns != [_STATE]
    return LeRobotRobot(
        cameras=tuple(cameras),
        state_width=len(known.state_names),
        action_names=known.actions.names,
        relative=known.mask,
        use_quantiles=data_config.use_quantile_norm,
        renamed={state_columns[0]: _STATE} if is_renamed else {},
    )


def _columns(data_config: DataHalf) -> dict[str, str]:
    """Client key -> the dataset's feature."""
    columns: dict[str, str] = {}
    for step in data_config.repack_transforms.inputs:
        if isinstance(step, _transforms.RepackTransform):
            columns |= {key: str(column) for key, column in _transforms.flatten_dict(step.structure).items()}
    return columns


def _notes(data_config: DataHalf, known: Known, slots: Mapping[str, str | None], robot: LeRobotRobot) -> Iterator[str]:
    for feature, key in zip(robot.cameras, slots.values(), strict=True):
        if key is None:
            yield f"LeRobot hides a camera that is not sent, this model has learned to see black: send it as {feature}"
        elif feature != key:
            yield f"LeRobot's {feature} is the camera '{key}'"
    if not robot.renamed and [vector.key for vector in known.state] != [_STATE]:
        parts = ", ".join(f"'{vector.key}' ({vector.width})" for vector in known.state)
        yield f"LeRobot's {_STATE} is {parts}, in this order"
    steps = (*data_config.data_transforms.inputs, *data_config.model_transforms.inputs)
    prompts = [step.prompt for step in steps if isinstance(step, _transforms.InjectDefaultPrompt) and step.prompt]
    if prompts:
        yield f"LeRobot has no default prompt and refuses observations without a task; here it is {prompts[0]!r}"
