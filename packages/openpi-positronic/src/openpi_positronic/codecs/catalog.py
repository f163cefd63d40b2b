"""The codecs by name: those that Positronic's releases have in common, newer ones, and five older ones.

Source: the serving specification, section 6.3, and what moved since. A name that both releases have (`droid`) is the
current one; `older/droid` is the other. A codec of your own is `path/to/file.py:attribute` or
`package.module:attribute`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from openpi.shared import references
from openpi.shared.errors import closest_name, listed
from openpi.shared.strict_json import Json
from openpi_positronic.codecs.action import (
    BinariseGrip,
    CartesianPose,
    ControlMode,
    FlipGrip,
    JointDelta,
    JointPositions,
)
from openpi_positronic.codecs.codec import Codec, Column, Decoded, Given
from openpi_positronic.codecs.libero import STATE, CartesianDelta, LiberoSignals
from openpi_positronic.codecs.observation import TASK, Camera, ObservationCodec, Rename, Vector
from openpi_positronic.codecs.timing import Timing

EE_POSE, JOINTS, GRIP = {"robot_state.ee_pose": 7}, {"robot_state.q": 7}, {"grip": 1}
_WRIST, _EXTERIOR = "image.wrist", "image.exterior"
_CAMERAS = (
    Camera("observation/wrist_image", _WRIST, "observation.images.left"),
    Camera("observation/image", _EXTERIOR, "observation.images.side"),
)
_COMMANDED = CartesianPose({"robot_commands.pose": 7, "target_grip": 1})
_DROID_HORIZON_S = 8 / 15
_LIBERO_FPS, _LIBERO_HORIZON_S = 20.0, 0.25
# Stiffness and damping of joints, then of the pose at a point 0.155 m behind the gripper, as DROID was recorded.
_DROID_IMPEDANCE = {
    "type": "impedance",
    "kq": [40.0, 30.0, 50.0, 25.0, 35.0, 25.0, 10.0],
    "kqd": [4.0, 6.0, 5.0, 5.0, 3.0, 2.0, 1.0],
    "kx": [400.0, 400.0, 400.0, 15.0, 15.0, 15.0],
    "kxd": [37.0, 37.0, 37.0, 2.0, 2.0, 2.0],
    "frame": [0.0, 0.0, -0.155, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0],
}

SLASH_KEYS = {
    "observation.state": "observation/state",
    "observation.images.left": "observation/wrist_image",
    "observation.images.side": "observation/image",
    TASK: "prompt",
}
"""What the older codecs call the observation -> what the recipe `pi05_positronic_lowmem` calls it."""


def ee(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """Pose and gripper -> the commanded pose."""
    return Timing(fps, horizon_s) | (_observation(EE_POSE | GRIP) & _COMMANDED)


def ee_joints(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """Pose, gripper and joints -> the commanded pose."""
    return Timing(fps, horizon_s) | (_observation(EE_POSE | GRIP | JOINTS) & _COMMANDED)


def ee_traj(*, fps: float = 15.0, horizon_s: float | None = 1.0, observed_binary: bool = False) -> Codec:
    """Pose and gripper -> the pose that the arm really had, so that a chunk begins where the arm is."""
    part = _observation(EE_POSE | GRIP) & CartesianPose(EE_POSE | GRIP)
    return Timing(fps, horizon_s) | BinariseGrip(observed=observed_binary) | part


def ee_joints_traj(*, fps: float = 15.0, horizon_s: float | None = 1.0, observed_binary: bool = False) -> Codec:
    """Pose, gripper and joints -> the pose that the arm really had."""
    part = _observation(EE_POSE | GRIP | JOINTS) & CartesianPose(EE_POSE | GRIP)
    return Timing(fps, horizon_s) | BinariseGrip(observed=observed_binary) | part


def joints_traj(*, fps: float = 15.0, horizon_s: float | None = 1.0, observed_binary: bool = False) -> Codec:
    """Joints and gripper -> the joints that the arm really had."""
    part = _observation(JOINTS | GRIP) & JointPositions(JOINTS | GRIP)
    return Timing(fps, horizon_s) | BinariseGrip(observed=observed_binary) | part


def droid(*, fps: float = 15.0, horizon_s: float | None = _DROID_HORIZON_S) -> Codec:
    """For the published DROID policies: joint velocities, eight steps of a chunk; inference only."""
    return Timing(fps, horizon_s) | (_DROID_OBSERVATION & JointDelta())


def ee_flip_grip(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """As `ee`, for a policy that was trained with the other end of the gripper's range open."""
    return Timing(fps, horizon_s) | FlipGrip() | (_observation(EE_POSE | GRIP) & _COMMANDED)


def phail_v1(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """As `ee`, with the arm under position control."""
    return (
        Timing(fps, horizon_s) | ControlMode({"type": "position_control"}) | (_observation(EE_POSE | GRIP) & _COMMANDED)
    )


def joints_ik(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """Joints and gripper -> joint angles, which were found for the commanded poses; inference only."""
    return Timing(fps, horizon_s) | (_observation(JOINTS | GRIP) & JointPositions())


def joints_ik_sim(*, fps: float = 15.0, horizon_s: float | None = 1.0) -> Codec:
    """As `joints_ik`, which differs in how the angles were found for training."""
    return joints_ik(fps=fps, horizon_s=horizon_s)


def droid_jointpos(*, fps: float = 15.0, horizon_s: float | None = None, observed_binary: bool = False) -> Codec:
    """For the published DROID policies that give joint angles: every step of a chunk."""
    part = _DROID_OBSERVATION & JointPositions(JOINTS | GRIP)
    mode, binary = ControlMode(_DROID_IMPEDANCE), BinariseGrip(("grip",), observed_binary)
    return Timing(fps, horizon_s) | mode | binary | part


def libero(*, fps: float = _LIBERO_FPS, horizon_s: float | None = _LIBERO_HORIZON_S) -> Codec:
    """For the published LIBERO policies: steps of the pose; inference only."""
    vectors = (Vector("observation/state", {STATE: 8}, "observation.state"),)
    part = ObservationCodec(vectors, _CAMERAS) & CartesianDelta(arm_width=6)
    return Timing(fps, horizon_s) | LiberoSignals((_WRIST, _EXTERIOR)) | part


def _observation(state: Mapping[str, int]) -> ObservationCodec:
    return ObservationCodec((Vector("observation/state", state, "observation.state"),), _CAMERAS)


def _same_keys(state: Mapping[str, Mapping[str, int]], wrist: str, exterior: str, prompt: str) -> ObservationCodec:
    """Called the same in training data and by the policy."""
    vectors = tuple(Vector(key, signals, key) for key, signals in state.items())
    return ObservationCodec(vectors, (Camera(wrist, _WRIST, wrist), Camera(exterior, _EXTERIOR, exterior)), prompt)


_DROID_OBSERVATION = _same_keys(
    {"observation/joint_position": JOINTS, "observation/gripper_position": GRIP},
    "observation/wrist_image_left",
    "observation/exterior_image_1_left",
    "prompt",
)


@dataclasses.dataclass(frozen=True)
class _OlderRelease(Codec):
    """How codecs of the older release were: no timing, the features told to clients, no task where there is none."""

    inner: Codec
    features: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def training_meta(self) -> Json:
        return {"lerobot_features": self.features or self.inner.training_meta["lerobot_features"]}

    @property
    def served_meta(self) -> dict[str, object]:
        return self.training_meta

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        return self.inner.encode(raw)

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        return self.inner.decode(output, context)

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        return self.inner.training(signals)

    def training_task(self, static: Mapping[str, object]) -> str | None:
        return self.inner.training_task(static) if TASK in static else None

    def dummy_encoded(self) -> dict[str, object]:
        return self.inner.dummy_encoded()


def eepose_absolute() -> Codec:
    """Pose and gripper -> the commanded pose, under dotted keys."""
    return _dotted(EE_POSE | GRIP)


def eepose_q() -> Codec:
    """Pose, gripper and joints -> the commanded pose, under dotted keys."""
    return _dotted(EE_POSE | GRIP | JOINTS)


def joints() -> Codec:
    """Joints and gripper -> the commanded pose, under dotted keys."""
    return _dotted(JOINTS | GRIP)


def openpi_positronic() -> Codec:
    """As `eepose_absolute`, under the keys of the recipe."""
    observation = _same_keys(
        {"observation/state": EE_POSE | GRIP}, "observation/wrist_image", "observation/image", "prompt"
    )
    return _OlderRelease(observation & _COMMANDED)


def older_droid() -> Codec:
    """As `droid`, without times and with every step of a chunk."""
    return _OlderRelease(_DROID_OBSERVATION & JointDelta(), _COMMANDED.training_meta["lerobot_features"])


def _dotted(state: Mapping[str, int]) -> Codec:
    observation = _same_keys({"observation.state": state}, "observation.images.left", "observation.images.side", TASK)
    return _OlderRelease(observation & _COMMANDED)


CURRENT: dict[str, Callable[..., Codec]] = {
    factory.__name__: factory for factory in (ee, ee_joints, ee_traj, ee_joints_traj, joints_traj, droid)
}
NEWER: dict[str, Callable[..., Codec]] = {
    factory.__name__: factory for factory in (ee_flip_grip, phail_v1, joints_ik, joints_ik_sim, droid_jointpos, libero)
}
OLDER: dict[str, Callable[..., Codec]] = {
    "eepose_absolute": eepose_absolute,
    "openpi_positronic": openpi_positronic,
    "droid": older_droid,
    "eepose_q": eepose_q,
    "joints": joints,
}
PUBLISHED = {**OLDER, **CURRENT, **NEWER, "eepose": ee}
_BY_NAME = PUBLISHED | {f"older/{name}": factory for name, factory in OLDER.items()}


def get_codec(name: str, **options: object) -> Codec:
    """A codec by name, with the options of its function, such as `horizon_s`.

    Raises:
        ValueError: no such codec, or an option that it does not have.
        FileNotFoundError, ModuleNotFoundError: no such file or module.
    """
    if references.is_reference(name):
        return _of_reference(name, options)
    if name not in _BY_NAME:
        close = closest_name(name, _BY_NAME)
        hint = f" Did you mean '{close}'?" if close else ""
        raise ValueError(f"no codec '{name}'; there are {listed(_BY_NAME)}.{hint}")
    try:
        return _BY_NAME[name](**options)
    except TypeError as error:
        raise ValueError(f"codec '{name}': {error}") from error


def _of_reference(name: str, options: Mapping[str, object]) -> Codec:
    where, module, attribute = references.resolve(name, "codec")
    if not hasattr(module, attribute or "codec"):
        raise ValueError(f"{where} has no '{attribute or 'codec'}'; name its codec as {where}:NAME")
    codec = getattr(module, attribute or "codec")
    codec = codec(**options) if callable(codec) else codec
    if not isinstance(codec, Codec):
        raise ValueError(f"{name} is a {type(codec).__name__}; expected a Codec, or a function that makes one")
    return codec


def for_slash_keys(codec: Codec) -> Codec:
    """The codec with its observation under the keys of `pi05_positronic_lowmem`, whatever it calls them."""
    return codec | Rename(SLASH_KEYS)
