"""What is there of a dataset that episodes are appended to.

Its files are linked into the new one and never opened for writing: new episodes go to files of their own, and only
the description is written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpi.data.lerobot import home
from openpi.data.lerobot.features import CAMERA_DTYPES, Feature, named_alike
from openpi.data.lerobot.files import link_or_copy, mirrored, read_json
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.stats import FeatureStats, along_last_axis, read_stats
from openpi.data.lerobot.table_writer import FILES_PER_CHUNK

APPENDABLE = "v3.0"
REPLACED = ".replaced"
"""End of the name that a dataset has, beside its place, while another takes that."""
_REWRITTEN = ("info.json", "stats.json", "tasks.parquet")


def check_room(root: Path, *, overwrite: bool) -> None:
    """Whether a dataset may be put in a place.

    Raises:
        FileExistsError: another is there that is not to be replaced; or something else is, which never is.
    """
    if not root.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{root} exists; choose another folder, or replace it with overwrite=True (--overwrite)")
    if not (root / home.INFO_FILE).is_file() and not (root.is_dir() and next(root.iterdir(), None) is None):
        raise FileExistsError(
            f"{root} is no dataset (it has no {home.INFO_FILE}), and what it holds would be deleted; choose another "
            "folder"
        )


@dataclass(frozen=True)
class ExistingDataset:
    """A dataset before episodes are appended."""

    metadata: LeRobotMetadata
    info: Mapping[str, Any]
    stats: Mapping[str, FeatureStats]

    @classmethod
    def load(cls, root: Path) -> ExistingDataset:
        """Reads the description of a dataset.

        Raises:
            FileNotFoundError: `root` is no dataset.
            ValueError: a format that cannot be appended to.
        """
        if not (root / "meta/info.json").is_file():
            left = next(root.parent.glob(f".{root.name}.*{REPLACED}"), None)
            what = f"a run that was killed left it as {left}: rename that" if left else "write to a new folder instead"
            raise FileNotFoundError(f"{root} holds no LeRobot dataset to append to; {what}")
        metadata = LeRobotMetadata.load(root)
        if metadata.version != APPENDABLE:
            raise ValueError(
                f"{root} has format {metadata.version}; episodes can be appended to {APPENDABLE} only. Convert the "
                "recordings anew, all together"
            )
        if metadata.empty or any(place != episode.index for place, episode in enumerate(metadata.episodes)):
            raise ValueError(
                f"{root} has numbers of episodes that are left out or empty; expected 0, 1, 2, ..., which new episodes "
                f"go on from. `openpi dataset split {root} whole=rest` numbers them anew"
            )
        stats = read_stats(root / "meta/stats.json")
        numbers = {key: f for key, f in metadata.features.items() if key in stats and f["dtype"] not in CAMERA_DTYPES}
        stats |= {key: along_last_axis(stats[key], feature["shape"]) for key, feature in numbers.items()}
        return cls(metadata, read_json(root / home.INFO_FILE), stats)

    @property
    def video_codec(self) -> str | None:
        """Name of the format of the videos; None without videos."""
        codecs = {self.info["features"][key].get("info", {}).get("video.codec") for key in self.metadata.video_keys}
        return next(iter(codecs), None)

    def next_file(self, below: str) -> int:
        """The number of the first new file in a folder of chunks."""
        numbers = [
            int(path.parent.name.removeprefix("chunk-")) * FILES_PER_CHUNK + int(path.stem.removeprefix("file-"))
            for path in (self.metadata.root / below).glob("chunk-*/file-*")
        ]
        return max(numbers, default=-1) + 1

    def fitting(self, features: Mapping[str, Feature], fps: float) -> dict[str, Feature]:
        """The features of new episodes, cameras stored as they are here.

        Raises:
            ValueError: they are not those of this dataset.
        """
        found = {key: _comparable(feature) for key, feature in self.metadata.features.items()}
        fitted = {key: _stored_as(feature, self.metadata.features.get(key)) for key, feature in features.items()}
        given = {key: _comparable(feature) for key, feature in fitted.items()}
        differing = sorted(key for key in found.keys() | given.keys() if found.get(key) != given.get(key))
        if differing:
            key = differing[0]
            raise ValueError(
                f"{self.metadata.root} has other features than the new episodes: {differing}; '{key}' is "
                f"{found.get(key, 'not there')}, and would be {given.get(key, 'not there')}. Use the codec and the "
                "options that it was made with"
            )
        if fps != self.metadata.fps:
            raise ValueError(
                f"{self.metadata.root} has {self.metadata.fps} frames per second, and the new episodes {fps}; expected "
                "the same"
            )
        return fitted

    def link_into(self, folder: Path) -> None:
        """Puts the files that stay under the same names in `folder`, without copying where the disk allows it."""
        rewritten = {self.metadata.root / "meta" / name for name in _REWRITTEN}
        for source, target in mirrored(self.metadata.root, folder):
            if source not in rewritten:
                link_or_copy(source, target)


def _stored_as(feature: Feature, existing: Feature | None) -> Feature:
    if existing is not None and {feature["dtype"], existing["dtype"]} <= set(CAMERA_DTYPES):
        return {**feature, "dtype": existing["dtype"]}
    return feature


def _comparable(feature: Feature) -> dict[str, object]:
    return {"dtype": feature["dtype"], "shape": list(feature["shape"]), "names": list(named_alike(feature))}
