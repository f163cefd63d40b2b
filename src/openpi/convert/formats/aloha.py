"""ALOHA's recordings: a file `episode_<n>.hdf5` per episode.

    /action               [n, 14]   what the leaders said: left arm 6 joints and gripper, then right arm
    /observations/qpos    [n, 14]   measured, in the same order; also qvel, effort
    /observations/images/<camera>   [n, h, w, 3] RGB, or a JPEG per frame
    /base_action          [n, 2]    of a mobile base: forward in m/s, turn in rad/s

Source: the training specification, section 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, found, relative
from openpi.policies.aloha_policy import ALOHA_SPEC
from openpi.shared.errors import missing_key

_MOTORS = tuple(ALOHA_SPEC.actions.names)
_VECTORS = {
    # in the file: (column, whether an episode may lack it)
    "observations/qpos": ("observation.state", False),
    "action": ("action", False),
    "observations/qvel": ("observation.velocity", True),
    "observations/effort": ("observation.effort", True),
}
_BASE = ("base_action", "action.base", ("forward", "turn"))
_RATE_HZ = 50
_CAMERAS = "observations/images"
_BOOKKEEPING = ("compress_len",)


@dataclass(frozen=True)
class AlohaHdf5:
    """Recordings of ALOHA.

    Attributes:
        root: folder of the episodes, or one of them.
        mobile: call the robot mobile_aloha in the dataset.
    """

    root: Path
    mobile: bool = False

    def episodes(self) -> Sequence[EpisodeRef]:
        paths = found(self.root, ["episode_*.hdf5", "episode_*.h5"], "ALOHA's episode_<n>.hdf5")
        return [EpisodeRef(relative(path, self.root), (path,)) for path in paths]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        with Hdf5File(ref.files[0]) as file:
            columns: dict[str, RawColumn] = {}
            for name, (column, may_lack) in _VECTORS.items():
                if file.has(name) or not may_lack:
                    columns[column] = _vector(file, name)
            name, column, dimensions = _BASE
            if file.has(name):
                values = file.numbers(name)
                columns[column] = Numbers(values, f"/{name}", dimensions if values.shape[1:] == (2,) else ())
            cameras, left_out = _cameras(file)
            known = {name.split("/")[0] for name in (*_VECTORS, _BASE[0], *_BOOKKEEPING)}
            left_out += [f"/{name}" for name in file.names() if name not in known]
        robot = "mobile_aloha" if self.mobile else "aloha"
        return RawEpisode({**columns, **cameras}, _RATE_HZ, None, robot, tuple(left_out))


def _vector(file: Hdf5File, name: str) -> Numbers:
    values = file.numbers(name)
    if values.ndim != 2:
        raise ValueError(f"{file.path} /{name} has the shape {values.shape}; expected a vector per frame")
    names = _MOTORS if values.shape[1] == len(_MOTORS) else ()
    return Numbers(values.astype("float64"), f"/{name}", names)


def _cameras(file: Hdf5File) -> tuple[dict[str, Camera], list[str]]:
    """Those of color, and the others' names."""
    names = file.names(_CAMERAS) if file.has(_CAMERAS) else []
    depth = [name for name in names if "depth" in name]
    colored = [name for name in names if name not in depth]
    if not colored:
        raise missing_key(_CAMERAS, file.names("observations"), wanted_by=f"{file.path}", fix="It has no camera.")
    cameras = {f"observation.images.{name}": file.camera(f"{_CAMERAS}/{name}", is_chw=True) for name in colored}
    return cameras, [f"/{_CAMERAS}/{name}" for name in depth]
