"""Formats of recordings, a file each; `FORMATS` has them by the word of the command line."""

from __future__ import annotations

import importlib
from typing import Any

from openpi.shared import plugins

ENTRY_POINTS = "openpi.formats"

# word -> module, class, what it is. Modules are imported when they are asked for: some need a library of their own.
FORMATS: dict[str, tuple[str, str, str]] = {
    "aloha": ("aloha", "AlohaHdf5", "ALOHA's episode_*.hdf5: JPEG or raw pictures, mobile or not, any set of cameras"),
    "libero": ("libero_hdf5", "LiberoHdf5", "LIBERO's own demonstrations, <task>_demo.hdf5, as the published dataset"),
    "robomimic": ("robomimic", "RobomimicHdf5", "HDF5 of robomimic, MimicGen, RoboCasa: data/demo_<n>"),
    "droid": ("droid_raw", "DroidRaw", "DROID's raw episodes: trajectory.h5 and recordings/MP4"),
    "umi": ("umi_zarr", "UmiZarr", "zarr replay buffers of UMI and diffusion policy, as a folder or zipped"),
    "calvin": ("calvin", "CalvinNpz", "CALVIN's splits: episode_<frame>.npz, annotated or play"),
    "session": ("sessions", "Sessions", "sessions that `openpi serve --record --record-format mcap` has kept"),
    "ros": ("rosbag", "RosBags", "bags of ROS 1 and ROS 2, by a mapping file that --draft writes"),
}


def summaries() -> dict[str, str]:
    """Of the formats here and of those that packages bring by the entry point `openpi.formats`, by their words."""
    found = {word: summary for word, (_, _, summary) in FORMATS.items()}
    return found | {word: str(format_class(word).__doc__).splitlines()[0] for word in plugins.names(ENTRY_POINTS)}


def format_class(word: str) -> Any:
    """The dataclass of a format: its fields are its options.

    Raises:
        ImportError: no such format.
    """
    if word not in FORMATS:
        return plugins.load(ENTRY_POINTS, word)
    module, name, _ = FORMATS[word]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
