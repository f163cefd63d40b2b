"""DROID as it was recorded: a folder per episode.

    metadata_<episode id>.json
    trajectory.h5                       action/*, observation/robot_state/*, observation/camera_type/<camera id>
    recordings/MP4/<camera id>.mp4      and <camera id>-stereo.mp4, which is not read
    aggregated-annotations-<date>.json  in the folder above all: episode id -> language_instruction1 .. 3

Source: the training specification, section 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.formats.mp4 import count_frames, video
from openpi.convert.source import EpisodeRef, Numbers, RawColumn, RawEpisode, found, joined, relative
from openpi.policies.droid_policy import DROID_SPEC
from openpi.shared import strict_json

_RATE_HZ = 15
_SIZE_HW = (180, 320)
_WRIST = 0  # a camera's type; all others stand beside the robot
_VIDEOS = "recordings/MP4"
_NAMES = tuple(DROID_SPEC.actions.names)  # the joints and the gripper; the state has the same
_NO_INSTRUCTION = "Do something"
_LEAST_FILMED = 0.9  # of the frames; less is no camera that was stopped a moment early


@dataclass(frozen=True)
class DroidRaw:
    """DROID's raw episodes.

    Attributes:
        root: folder of the episodes, at any depth.
        untold: instruction of episodes that the annotations do not have.
    """

    root: Path
    untold: str = _NO_INSTRUCTION

    def episodes(self) -> Sequence[EpisodeRef]:
        paths = found(self.root, ["**/trajectory.h5"], "DROID's episodes: trajectory.h5 with recordings/MP4 beside it")
        told = _instructions(self.root)
        refs = []
        for path in paths:
            folder = path.parent
            about = sorted(folder.glob("metadata_*.json"))
            number = about[0].stem.rpartition("_")[2] if about else ""
            videos = [file for file in sorted((folder / _VIDEOS).glob("*.mp4")) if "stereo" not in file.name]
            name = relative(folder, self.root) if folder != self.root else folder.name
            refs.append(EpisodeRef(name, (path, *about[:1], *videos), (told.get(number, ""),)))
        return refs

    def read(self, ref: EpisodeRef) -> RawEpisode:
        path, instruction = ref.files[0], str(ref.place[0])
        videos = {file.stem: file for file in ref.files if file.suffix == ".mp4"}
        with Hdf5File(path) as file:
            columns = _vectors(file)
            cameras = _cameras(file, videos)
        length = len(columns["actions"].values)
        filmed = {name: count_frames(video_path) for name, video_path in cameras.items()}
        used = min(length, *filmed.values())
        if used < _LEAST_FILMED * length:
            raise ValueError(f"{path.parent}: {length} steps were recorded, and its videos have {filmed} frames")
        remarks = [] if instruction else [f"the annotations do not have it; its task is {self.untold!r}"]
        if used < length:
            remarks.append(f"its last {length - used} of {length} steps have no picture, and are left out")
        cut: dict[str, RawColumn] = {
            name: video(cameras[name], used, _SIZE_HW, f"{_VIDEOS}/{cameras[name].name}") for name in cameras
        }
        cut |= {key: Numbers(column.values[:used], column.origin, column.names) for key, column in columns.items()}
        left_out = [f"{_VIDEOS}/{file.name}" for file in videos.values() if file not in cameras.values()]
        task = instruction or self.untold
        return RawEpisode(cut, _RATE_HZ, task, "panda", tuple(left_out), tuple(remarks))


def _vectors(file: Hdf5File) -> dict[str, Numbers]:
    robot = "observation/robot_state"
    actions = {name: file.numbers(f"action/{name}") for name in ("joint_velocity", "gripper_position")}
    joints = file.numbers(f"{robot}/joint_positions")
    gripper = file.numbers(f"{robot}/gripper_position")
    return {
        "joint_position": _wide({"joint_positions": joints}, f"/{robot}/joint_positions", _NAMES[:7], file.path),
        "gripper_position": _wide({"gripper_position": gripper}, f"/{robot}/gripper_position", _NAMES[7:], file.path),
        "actions": _wide(actions, "/action/{joint_velocity, gripper_position}", _NAMES, file.path),
    }


def _wide(parts: Mapping[str, np.ndarray], origin: str, names: tuple[str, ...], path: Path) -> Numbers:
    values = joined(parts, f"{path} {origin}")
    if values.shape[1] != len(names):
        raise ValueError(f"{path} {origin} has {values.shape[1]} dimensions; expected {len(names)}")
    return Numbers(values, origin, names)


def _cameras(file: Hdf5File, videos: Mapping[str, Path]) -> dict[str, Path]:
    """Column -> its video: the wrist's, and the first two others in the order of their ids."""
    filmed = [name for name in file.names("observation/camera_type") if name in videos]
    kinds = {name: file.numbers(f"observation/camera_type/{name}").ravel()[:1].tolist() for name in filmed}
    wrist = [name for name, kind in kinds.items() if kind == [_WRIST]]
    others = [name for name, kind in kinds.items() if kind != [_WRIST]]
    if len(wrist) != 1 or len(others) < 2:
        raise ValueError(
            f"{file.path}: expected a video of one wrist camera and of two others, found {len(wrist)} and "
            f"{len(others)} (cameras {file.names('observation/camera_type')}, videos {sorted(videos)} in {_VIDEOS})"
        )
    columns = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    return {column: videos[name] for column, name in zip(columns, (*others[:2], wrist[0]), strict=True)}


def _instructions(root: Path) -> dict[str, str]:
    """Episode id -> what the robot was told."""
    told: dict[str, str] = {}
    for path in sorted(root.glob("aggregated-annotations-*.json")):
        try:
            content = strict_json.read(path)
            told |= {number: str(entry["language_instruction1"]).strip() for number, entry in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no list of instructions by episode id ({error!r})") from error
    return told
