"""What the features of a dataset say about a robot, and what they leave open.

Names decide or nobody does: a position in a list, a shape or a guess by content never counts. What stays open is a
`Question`, for a person at the terminal or for a marked line in the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.data.lerobot.dimension_words import ORIENTATION_WORDS, is_gripper, words
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature, dimension_names
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.shared.errors import listed


@dataclasses.dataclass(frozen=True)
class Decision:
    """One constant of the recipe, and why it has this value."""

    name: str
    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class Question:
    """One constant of the recipe that the dataset does not decide.

    Attributes:
        hint: what an answer means.
        choices: what it may be; with `is_list` the parts of a tuple; empty = any text.
    """

    name: str
    question: str
    hint: str = ""
    choices: tuple[Any, ...] = ()
    is_list: bool = False


Choice = Decision | Question

# Words of a camera's name. A name with words of both kinds decides nothing.
_WRIST_WORDS = frozenset({"wrist", "gripper", "hand", "handeye", "eef"})
_SCENE_WORDS = frozenset(
    {"agentview", "back", "base", "bottom", "ceiling", "exterior", "external", "front", "global", "head", "high", "low"}
    | {"overhead", "scene", "side", "static", "third", "top", "workspace"}
)
_POSITION_WORDS = frozenset({"pos", "position"})
_POSE_WORDS = frozenset({"x", "y", "z"})
_JOINT_WORDS = frozenset({"elbow", "forearm", "joint", "shoulder", "waist", "wrist"})
_CHANGE_WORDS = frozenset({"delta", "rel", "relative", "vel", "velocity", "velocities"})


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of a dataset that a policy could read.

    Attributes:
        cameras: colour cameras.
        vectors: dimension names of every vector of floats; numbered where the dataset names none.
        named: vectors whose dimensions the dataset names.
    """

    cameras: tuple[str, ...]
    vectors: Mapping[str, tuple[str, ...]]
    named: frozenset[str]


def read_features(metadata: LeRobotMetadata) -> Features:
    """Sorts out what is camera, vector, or neither.

    Raises:
        ValueError: no camera or no vector.
    """
    vectors, named = {}, set()
    for key, feature in metadata.features.items():
        if not _is_vector(key, feature):
            continue
        names = _dimension_names(feature)
        if names:
            named.add(key)
        short = key.rsplit(".", 1)[-1]
        vectors[key] = names or tuple(f"{short}_{i}" for i in range(feature["shape"][0]))
    if not metadata.camera_keys or len(vectors) < 2:
        others = "".join(f". '{key}' {reason}" for key, reason in metadata.unreadable.items())
        raise ValueError(
            f"{metadata.root} has the cameras {listed(metadata.camera_keys)} and the vectors {listed(vectors)}; a "
            f"policy needs at least a camera, a state and an action{others}"
        )
    return Features(tuple(metadata.camera_keys), vectors, frozenset(named))


def choose(features: Features, settle: Callable[[Choice], Choice] = lambda choice: choice) -> list[Choice]:
    """Every constant that describes the robot, in the order of the recipe.

    Args:
        settle: may decide what is open; later choices build on its answers.
    """
    cameras = [settle(choice) for choice in _choose_cameras(features.cameras)]
    action = settle(_choose_action(features))
    state = settle(_choose_state(features, action))
    relative = settle(_choose_relative(features, state, action))
    grippers = settle(_choose_grippers(features, action, relative))
    return [*cameras, state, action, relative, grippers]


def _is_vector(key: str, feature: Feature) -> bool:
    if key in INDEX_FEATURES or key.startswith("next.") or feature["dtype"] in (*CAMERA_DTYPES, "string"):
        return False
    try:
        is_float = np.dtype(feature["dtype"]).kind == "f"
    except TypeError:
        return False
    return is_float and len(feature["shape"]) == 1


def _dimension_names(feature: Feature) -> tuple[str, ...]:
    """One per dimension; empty where the dataset has another number of names, or one name twice."""
    names = dimension_names(feature)
    width = feature["shape"][0]
    # A vector of several dimensions may carry just its own name.
    return names if len(names) == width == len(set(names)) else ()


# --- cameras --------------------------------------------------------------------------------------------------


def _choose_cameras(cameras: Sequence[str]) -> list[Choice]:
    kinds = {camera: _kind_of_camera(camera) for camera in cameras}
    scene, wrist, unclear = (
        [camera for camera in cameras if kinds[camera] == kind] for kind in ("scene", "wrist", "unclear")
    )
    scene_choice = _choose_scene(scene, wrist, unclear)
    if isinstance(scene_choice, Decision):
        unclear = [camera for camera in unclear if camera != scene_choice.value]
    return [scene_choice, *_choose_wrists(wrist, unclear)]


def _kind_of_camera(name: str) -> str:
    found = set(words(name.removeprefix("observation.images.")))
    # `wristcam` is one word.
    is_wrist = bool(found & _WRIST_WORDS) or any("wrist" in word for word in found)
    is_scene = bool(found & _SCENE_WORDS)
    return "unclear" if is_wrist == is_scene else "wrist" if is_wrist else "scene"


def _choose_scene(scene: list[str], wrist: list[str], unclear: list[str]) -> Choice:
    name = "SCENE_CAMERA"
    if len(scene) == 1:
        word = next(word for word in words(scene[0]) if word in _SCENE_WORDS)
        return Decision(name, scene[0], f"'{word}' is in its name, and in no other camera's a word like it")
    if scene:
        return Question(name, "which camera shows the scene best?", choices=tuple(scene))
    if not unclear:
        return Decision(name, None, "the name of every camera says wrist")
    if len(unclear) == 1 and wrist:
        return Decision(name, unclear[0], "the only camera whose name does not say wrist")
    return Question(name, "which camera shows the scene?", "None: none does.", (*unclear, None))


def _choose_wrists(wrist: list[str], unclear: list[str]) -> list[Choice]:
    left, right = "LEFT_WRIST_CAMERA", "RIGHT_WRIST_CAMERA"
    sides = [{"left", "right"} & set(words(camera)) for camera in wrist]
    if len(wrist) == 1 and sides[0] != {"right"}:
        only = "its name says wrist, and no other camera's does; robots with one arm use the left slot"
        return [Decision(left, wrist[0], only), Decision(right, None, "no other camera's name says wrist")]
    if len(wrist) == 2 and sorted(map(sorted, sides)) == [["left"], ["right"]]:
        by_side = {side.pop(): camera for side, camera in zip(sides, wrist, strict=True)}
        reason = "its name says wrist and {}"
        return [Decision(slot, by_side[s], reason.format(s)) for slot, s in ((left, "left"), (right, "right"))]
    if not wrist and not unclear:
        nothing = "no camera's name says wrist"
        return [Decision(left, None, nothing), Decision(right, None, nothing)]
    candidates = (*(wrist or unclear), None)
    is_left = Question(
        left, "which camera is on the wrist?", "Of the left arm if there are two. None: none is.", candidates
    )
    if not wrist and len(unclear) == 1:
        reason = "there is one camera that it could be, and robots with one wrist camera use the left slot"
        return [is_left, Decision(right, None, reason)]
    hint = "None: none is, or there is one arm."
    return [is_left, Question(right, "which camera is on the wrist of the right arm?", hint, candidates)]


# --- state and actions ----------------------------------------------------------------------------------------


def _choose_action(features: Features) -> Choice:
    called_so = [key for key in features.vectors if {"action", "actions"} & set(words(key))]
    exact = [key for key in called_so if key in ("action", "actions")]
    for candidates in (exact, called_so):
        if len(candidates) == 1:
            return Decision("ACTION", candidates[0], "its name says so, and no other vector's as plainly")
    return Question("ACTION", "which vector holds the actions?", choices=tuple(called_so or features.vectors))


def _choose_state(features: Features, action: Choice) -> Choice:
    taken = {action.value} if isinstance(action, Decision) else set()
    others = [key for key in features.vectors if key not in taken and not {"action", "actions"} & set(words(key))]
    exact = [key for key in others if key in ("observation.state", "state")]
    if len(exact) == 1:
        return Decision("STATE", tuple(exact), "its name says so")
    if len(others) == 1 and isinstance(action, Decision):
        return Decision("STATE", tuple(others), "the only vector besides the actions")
    return Question(
        "STATE",
        "which vectors make up the state, in which order?",
        "A tuple of names.",
        tuple(others or features.vectors),
        is_list=True,
    )


def _choose_relative(features: Features, state: Choice, action: Choice) -> Choice:
    """Whether actions are trained relative to the state."""
    name = "TRAIN_RELATIVE"
    key = action.value if isinstance(action, Decision) else ""
    names = [name for name in _action_names(features, action) if not is_gripper(name)] if key in features.named else []
    if _CHANGE_WORDS & set(words(key)):
        return Decision(name, False, f"the name '{key}' says that the actions are changes already")
    if names and all(_CHANGE_WORDS & set(words(dimension)) for dimension in names):
        return Decision(name, False, "the names of their dimensions say that the actions are changes already")
    if names and isinstance(state, Decision) and len(state.value) == 1 and state.value[0] in features.named:
        same_place = dict(zip(features.vectors[key], features.vectors[state.value[0]], strict=False))
        if all(same_place.get(n) == n for n in names) and _say_position(names):
            reason = (
                "state and actions have the same dimensions, and their names say position: action i is where "
                "dimension i of the state shall go. The released models were trained so"
            )
            return Decision(name, True, reason)
    hint = (
        "True: action i is where dimension i of the state shall go, as with joint targets; trained relative to the "
        "state, as in the released models. False: changes, velocities or anything else; trained as recorded."
    )
    return Question(name, "are the actions absolute targets of the state's own dimensions?", hint, (True, False))


def _choose_grippers(features: Features, action: Choice, relative: Choice) -> Choice:
    """Which dimensions of the actions are never relative."""
    name, names = "GRIPPERS", _action_names(features, action)
    grippers = tuple(dimension for dimension in names if is_gripper(dimension))
    if grippers and isinstance(action, Decision):
        return Decision(name, grippers, "their names say so; they are never relative")
    if isinstance(relative, Decision) and not relative.value:
        return Decision(name, (), "not needed: all actions are trained as recorded")
    hint = "They are never relative. A tuple of names; () if there are none, or TRAIN_RELATIVE is False."
    return Question(name, "which dimensions of the actions are grippers?", hint, names, is_list=True)


def _say_position(dimensions: Sequence[str]) -> bool:
    """Whether all are positions whose differences are motions: `wrist_roll` is a joint, but not beside x, y, z."""
    said = [set(words(dimension)) for dimension in dimensions]
    joints = set() if any(_POSE_WORDS & each for each in said) else _JOINT_WORDS
    return all(_POSITION_WORDS & each and (joints & each or not ORIENTATION_WORDS & each) for each in said)


def _action_names(features: Features, action: Choice) -> tuple[str, ...]:
    """Of all vectors that the actions may be."""
    keys = (action.value,) if isinstance(action, Decision) else action.choices
    return tuple(dict.fromkeys(name for key in keys for name in features.vectors[key]))
