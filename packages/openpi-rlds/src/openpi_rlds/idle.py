"""Frame ranges in which the robot moves, from its joint velocities: how the published filter files are made.

Source: the training specification, section 9.
"""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from openpi.shared import whole_file
from openpi_rlds.episode import FILE_PATH, NUM_JOINTS, RECORDING_FOLDER, column_of, text_of
from openpi_rlds.example import read_features
from openpi_rlds.folder import TfdsFolder
from openpi_rlds.frame_ranges import episode_key
from openpi_rlds.tfrecord import Span, TFRecordFile

logger = logging.getLogger(__name__)

SAME_VELOCITY = 1e-3  # rad/s
MIN_IDLE_FRAMES = 7
MIN_KEPT_FRAMES = 16
# Chunks that start in the last frames of a range would run into the idling after it.
FRAMES_CUT = 10
SAVE_EVERY = 1000

_VELOCITY = "steps/action_dict/joint_velocity"
_NAMES = frozenset({FILE_PATH, RECORDING_FOLDER, _VELOCITY})


def moving_ranges(velocities: np.ndarray) -> list[list[int]]:
    """[start, end) of the frames worth training on.

    A frame idles when its velocities are those of the frame before. Long runs of them are left out, and what is long
    enough between them is kept, without its end.

    Args:
        velocities: float[t 7], commanded.
    """
    idles = np.zeros(len(velocities), bool)
    idles[1:] = np.all(np.abs(np.diff(velocities, axis=0)) < SAME_VELOCITY, axis=1)
    moves = np.ones(len(velocities), bool)
    for start, end in _runs(idles):
        if end - start >= MIN_IDLE_FRAMES:
            moves[start:end] = False
    return [[start, end - FRAMES_CUT] for start, end in _runs(moves) if end - start >= MIN_KEPT_FRAMES]


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the runs of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


@dataclasses.dataclass
class Counts:
    """What `write_moving_ranges` did with the episodes."""

    computed: int = 0
    known: int = 0
    failed: int = 0


def write_moving_ranges(folder: TfdsFolder, path: Path) -> Counts:
    """Writes the ranges of every episode, adding to a file that is there; saves from time to time.

    Reads a few KB of each record. What cannot be read is logged, counted and left out.
    """
    table: dict[str, list[list[int]]] = json.loads(path.read_text()) if path.is_file() else {}
    counts = Counts()
    for shard, num_records in folder.filled:
        try:
            _add_shard(shard, num_records, table, counts, path)
        except (OSError, ValueError) as error:  # its framing: where the next record begins is lost
            counts.failed += 1
            logger.warning("the rest of the file is skipped: %s", error)
    whole_file.write_text(path, json.dumps(table))
    return counts


def _add_shard(shard: Path, num_records: int, table: dict[str, list[list[int]]], counts: Counts, path: Path) -> None:
    with TFRecordFile(shard, num_records) as file:
        while (span := file.next()) is not None:
            try:
                key, velocities = _read(file, span, table)
            except (KeyError, ValueError, OSError) as error:
                counts.failed += 1
                logger.warning("skipped: %s", error)
                continue
            if key in table:
                counts.known += 1
                continue
            table[key] = moving_ranges(velocities)
            counts.computed += 1
            if counts.computed % SAVE_EVERY == 0:
                whole_file.write_text(path, json.dumps(table))
                logger.info("%d episodes", len(table))


def _read(file: TFRecordFile, span: Span, table: dict[str, list[list[int]]]) -> tuple[str, np.ndarray]:
    where = f"{file.path}, record {span.number}"
    features = read_features(file, span, _NAMES)
    folder, name = (text_of(features, key, where) for key in (RECORDING_FOLDER, FILE_PATH))
    return episode_key(folder, name), column_of(features, _VELOCITY, NUM_JOINTS, where)
