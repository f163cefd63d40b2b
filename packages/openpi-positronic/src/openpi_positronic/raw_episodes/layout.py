"""Where things lie in a raw dataset. Source: the serving specification, section 6.1.

<root>/<block>/<episode>/       12 digits each; block = episode rounded down to a multiple of 1000
    meta.json  static.json      about the recording; constants of the episode
    <signal>.parquet            numbers: `timestamp`, `value`, `ts_ns.<timeline>`
    <signal>.mp4                RGB images, frame number = row of
    <signal>.frames.parquet     their times: `ts_ns`, `ts_ns.<timeline>`
    .unfinished                 while it is being recorded
"""

import re
from pathlib import Path

UNFINISHED = ".unfinished"
META_FILE, STATIC_FILE = "meta.json", "static.json"
TABLE, VIDEO, VIDEO_INDEX = ".parquet", ".mp4", ".frames.parquet"
TIMESTAMP, VALUE, FRAME_TIMESTAMP = "timestamp", "value", "ts_ns"
TIMELINE_PREFIX = "ts_ns."
SCHEMA_VERSION = 1
EPISODES_PER_BLOCK = 1000
VIDEO_FPS = 100  # nominal: the real times are in the index
KEY_FRAME_INTERVAL = 30

_NUMBER = re.compile(r"\d{12}")


def numbered_folders(folder: Path) -> list[Path]:
    """Sub-folders whose names are 12 digits, in order."""
    return sorted(path for path in folder.iterdir() if _NUMBER.fullmatch(path.name) and path.is_dir())


def episode_path(root: Path, number: int) -> Path:
    block = number - number % EPISODES_PER_BLOCK
    return root / f"{block:012d}" / f"{number:012d}"


def is_finished(episode: Path) -> bool:
    return not (episode / UNFINISHED).exists()
