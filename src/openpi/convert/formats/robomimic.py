"""robomimic's HDF5 files, and those of the tools that follow it (MimicGen, RoboCasa, robosuite).

    data                        attribute env_args: JSON with env_kwargs.control_freq and .robots
    data/demo_<n>/actions       [n, d]
    data/demo_<n>/obs/<name>    [n, k], or pictures [n, h, w, 3] upright, called <camera>_image
    mask/<list>                 names of episodes, such as `train` and `valid`

Source: robomimic's documentation of its datasets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpi.convert.formats.demos import control_hz, environment, json_attribute, list_demos, side_by_side
from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.source import EpisodeRef, RawColumn, RawEpisode
from openpi.shared.errors import listed

_PROPRIOCEPTION = ("eef_pos", "eef_quat", "gripper_qpos")


@dataclass(frozen=True)
class RobomimicHdf5:
    """robomimic's demonstrations.

    Attributes:
        root: a file, or a folder of files.
        state: observations that make up the state, comma-separated; default: position and quaternion of every end
            effector, and its gripper.
        action: the array of actions, such as actions_abs.
        subset: only the episodes of this list in the file, such as train.
    """

    root: Path
    state: tuple[str, ...] = ()
    action: str = "actions"
    subset: str | None = None

    def episodes(self) -> Sequence[EpisodeRef]:
        return list_demos(self.root, self.subset)

    def read(self, ref: EpisodeRef) -> RawEpisode:
        group = f"data/{ref.place[0]}"
        with Hdf5File(ref.files[0]) as file:
            there = file.names(f"{group}/obs")
            state = self.state or _proprioception(there, file)
            columns: dict[str, RawColumn] = {
                "observation.state": side_by_side(file, f"{group}/obs", state),
                "action": side_by_side(file, group, (self.action,)),
            }
            cameras = [name for name in there if name.endswith("_image")]
            for name in cameras:
                columns[f"observation.images.{name.removesuffix('_image')}"] = file.camera(f"{group}/obs/{name}")
            left_out = [f"obs/{name}" for name in there if name not in (*state, *cameras)]
            left_out += [name for name in file.names(group) if name not in ("obs", self.action)]
            task = json_attribute(file, group, "ep_meta").get("lang")
            return RawEpisode(columns, control_hz(file), str(task) if task else None, _robot(file), tuple(left_out))


def _proprioception(there: Sequence[str], file: Hdf5File) -> tuple[str, ...]:
    robots = sorted({match[1] for name in there if (match := re.fullmatch(r"(robot\d+)_eef_pos", name))})
    state = tuple(f"{robot}_{part}" for robot in robots for part in _PROPRIOCEPTION if f"{robot}_{part}" in there)
    if not state:
        raise ValueError(
            f"{file.path} has no observation robot0_eef_pos; name those that make up the state with state (--state): "
            f"it has {listed(there)}. A file without any is raw: run robomimic's dataset_states_to_obs first"
        )
    return state


def _robot(file: Hdf5File) -> str | None:
    robots = environment(file).get("robots")
    names = robots if isinstance(robots, list) else [robots]
    return "+".join(str(name).lower() for name in names if name) or None
