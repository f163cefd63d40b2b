"""LIBERO's own demonstrations: a file per task, `<task>_demo.hdf5`, with 50 episodes.

    data                    attributes: problem_info (JSON with the instruction), env_args, macros_image_convention
    data/demo_<n>/actions   [n, 7]   changes of the end effector's pose, in [-1, 1], and the gripper
    data/demo_<n>/obs/      ee_states [n, 6] position in m and axis-angle in rad, gripper_states [n, 2], joint_states,
                            agentview_rgb, eye_in_hand_rgb [n, 128, 128, 3], as OpenGL draws them

The columns are those of the published LIBERO dataset. Its pictures are turned by 180 degrees, so these are, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpi.convert.formats.demos import control_hz, json_attribute, list_demos, side_by_side
from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.source import EpisodeRef, Numbers, RawColumn, RawEpisode
from openpi.policies.libero_policy import LIBERO_SPEC

_CAMERAS = {"image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}
_STATE = ("ee_states", "gripper_states")
_CONVENTION = "opengl"


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
            used = {*_CAMERAS.values(), *_STATE}
            left_out = [f"obs/{name}" for name in file.names(f"{group}/obs") if name not in used]
            left_out += [name for name in file.names(group) if name not in ("obs", "actions")]
            return RawEpisode(columns, control_hz(file), _instruction(file), "panda", tuple(left_out))


def _named(column: Numbers, names: Sequence[str]) -> Numbers:
    if column.values.shape[1] != len(names):
        raise ValueError(f"{column.origin} has {column.values.shape[1]} dimensions; expected {len(names)}")
    return Numbers(column.values, column.origin, tuple(names))


def _instruction(file: Hdf5File) -> str | None:
    text = json_attribute(file, "data", "problem_info").get("language_instruction")
    text = "".join(map(str, text)) if isinstance(text, list) else text  # a list of characters, in some
    return str(text).strip('"') if text else None
