"""LIBERO's own demonstrations: a file per task, `<task>_demo.hdf5`, with 50 episodes.

    data                    attributes: problem_info (JSON with the instruction), env_args, macros_image_convention
    data/demo_<n>/actions   [n, 7]   changes of the end effector's pose, in [-1, 1], and the gripper
    data/demo_<n>/obs/      ee_states [n, 6] position in m and axis-angle in rad, gripper_states [n, 2], joint_states,
                            agentview_rgb, eye_in_hand_rgb [n, 128, 128, 3], as OpenGL draws them

The columns are those of the published LIBERO dataset. Its pictures are turned by 180 degrees, so these are, too.

LIBERO's own script (`create_dataset.py`) keeps with an action what a step by it led to, so that a policy would learn to
repeat what it did last. Such observations go with the action of the next frame, as in the published dataset. Files that
were made anew from them, without idle steps, have what went before. `states`, MuJoCo's before each action, tell which.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.formats.demos import control_hz, json_attribute, list_demos, side_by_side
from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode
from openpi.policies.libero_policy import LIBERO_SPEC

_CAMERAS = {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}
_STATE = ("ee_states", "gripper_states")
_CONVENTION = "opengl"
_SAME_JOINTS = 0.01  # rad; LIBERO's script plays recordings back, and warns from such a difference on


@dataclass(frozen=True)
class LiberoHdf5:
    """LIBERO's demonstrations.

    Attributes:
        root: folder of the files, of one suite or several, or one of them.
        as_stored: do not turn the pictures by 180 degrees.
    """

    root: Path
    as_stored: bool = False

    def episodes(self) -> Sequence[EpisodeRef]:
        return list_demos(self.root)

    def read(self, ref: EpisodeRef) -> RawEpisode:
        group = f"data/{ref.place[0]}"
        with Hdf5File(ref.files[0]) as file:
            state = side_by_side(file, f"{group}/obs", _STATE)
            columns: dict[str, RawColumn] = {
                "state": _named(state, LIBERO_SPEC.state_names),
                "actions": _named(side_by_side(file, group, ("actions",)), LIBERO_SPEC.actions.names),
            }
            turned = not self.as_stored
            if (
                turned
                and (convention := file.attribute("data", "macros_image_convention") or _CONVENTION) != _CONVENTION
            ):
                raise ValueError(
                    f"its pictures are in the convention {convention!r}; expected {_CONVENTION!r}, whose pictures are "
                    "turned here. Take them as they are with as_stored (--as-stored)"
                )
            for column, name in _CAMERAS.items():
                columns[column] = file.camera(f"{group}/obs/{name}", turned=turned)
            is_late, remarks = _is_seen_after(file, group), ()
            if is_late:
                columns = {key: _paired_with_next(key, column) for key, column in columns.items()}
            if is_late is None:
                remarks = ("whether its observations are of before or after their actions, its states do not tell",)
            used = {*_CAMERAS.values(), *_STATE}
            left_out = [f"obs/{name}" for name in file.names(f"{group}/obs") if name not in used]
            left_out += [name for name in file.names(group) if name not in ("obs", "actions")]
            return RawEpisode(columns, control_hz(file), _instruction(file), "panda", tuple(left_out), remarks)


def _is_seen_after(file: Hdf5File, group: str) -> bool | None:
    """Whether the observations of a frame were made after its action; None where nothing tells."""
    names = (f"{group}/states", f"{group}/obs/joint_states")
    if not all(map(file.has, names)):
        return None
    states, joints = (file.numbers(name) for name in names)
    if states.ndim != 2 or joints.ndim != 2 or len(states) != len(joints) or len(states) < 2:
        return None
    arm = states[:, 1 : 1 + joints.shape[1]]  # behind the time; the arm is the first of the positions
    if arm.shape != joints.shape:
        return None
    before, after = (float(np.median(np.abs(a - b).max(1))) for a, b in ((joints, arm), (joints[:-1], arm[1:])))
    return None if min(before, after) > _SAME_JOINTS or before == after else after < before


def _paired_with_next(key: str, column: RawColumn) -> RawColumn:
    """Observations but the last, or actions but the first."""
    if isinstance(column, Camera):
        length = column.length - 1
        return dataclasses.replace(column, length=length, frames=itertools.islice(column.frames, length))
    assert isinstance(column, Numbers)
    if key == "actions":
        return dataclasses.replace(column, values=column.values[1:], origin=f"{column.origin}, the next frame's")
    return dataclasses.replace(column, values=column.values[:-1])


def _named(column: Numbers, names: Sequence[str]) -> Numbers:
    if column.values.shape[1] != len(names):
        raise ValueError(f"{column.origin} has {column.values.shape[1]} dimensions; expected {len(names)}")
    return Numbers(column.values, column.origin, tuple(names))


def _instruction(file: Hdf5File) -> str | None:
    text = json_attribute(file, "data", "problem_info").get("language_instruction")
    text = "".join(map(str, text)) if isinstance(text, list) else text  # a list of characters, in some
    return str(text).strip('"') if text else None
