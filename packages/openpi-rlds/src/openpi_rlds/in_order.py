"""Episodes in the order of their files, columns without images, and single frames: for statistics and for looking."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from openpi.data.dataset import Sample
from openpi_rlds.episode import (
    WRIST_CAMERA,
    ArmAction,
    Episode,
    column_names,
    draw_visit,
    feature_names,
    images_of,
    kept_frames,
    make_episode,
)
from openpi_rlds.example import parse_example, read_features
from openpi_rlds.stream import MAX_BARREN, Mixture, MixturePart
from openpi_rlds.tfrecord import Span, TFRecordFile

_SEED = 0


def episodes(
    shard: Path, kind: ArmAction, num_records: int | None = None
) -> Iterator[tuple[TFRecordFile, Span, Episode]]:
    """The columns of every episode of a file, which has `num_records` of them; of its images nothing is read."""
    with TFRecordFile(shard, num_records) as file:
        while (span := file.next()) is not None:
            features = read_features(file, span, column_names(kind))
            yield file, span, make_episode(features, kind, f"{file.path}, record {span.number}")


class FramesInOrder:
    """The frames that training uses, one dataset of the mixture after the other."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture

    def __getitem__(self, index: int) -> Sample:
        """Frame `index`; what lies before it is walked through.

        Raises:
            IndexError: there are fewer.
        """
        left = index
        for part in self.mixture.parts:
            for file, span, episode, kept in self._walk(part, part.folder.filled):
                if 0 <= left < len(kept):
                    return self._load(file, span, episode, int(kept[left]))
                left -= len(kept)
        raise IndexError(f"frame {index} of a mixture with {index - left} frames")

    def spread(self, num_samples: int) -> list[Sample]:
        """A frame from each of `num_samples` places, spread evenly over the files of every dataset.

        Raises:
            ValueError: a dataset has no frames, as far as we looked.
        """
        samples = []
        for part in self.mixture.parts:
            shards = part.folder.filled
            places = np.unique(np.linspace(0, len(shards) - 1, -(-num_samples // len(self.mixture.parts))).astype(int))
            for place in places:
                for file, span, episode, kept in self._walk(part, [*shards[place:], *shards[:place]]):
                    samples.append(self._load(file, span, episode, int(kept[len(kept) // 2])))
                    break
                else:
                    raise ValueError(
                        f"no frame of {part.folder.root} can be used: no episode is a success by its path and named in "
                        f"{part.ranges.source}. Is that file of this dataset and version?"
                    )
        return samples

    def _walk(
        self, part: MixturePart, shards: Iterable[tuple[Path, int]]
    ) -> Iterator[tuple[TFRecordFile, Span, Episode, np.ndarray]]:
        """Episodes with frames; ends early where there seem to be none."""
        barren = 0
        for shard, num_records in shards:
            for file, span, episode in episodes(shard, self.mixture.arm_action, num_records):
                kept = kept_frames(episode, part.ranges)
                barren = 0 if len(kept) else barren + 1
                if barren == MAX_BARREN:
                    return
                if len(kept):
                    yield file, span, episode, kept

    def _load(self, file: TFRecordFile, span: Span, episode: Episode, t: int) -> Sample:
        where = f"{file.path}, record {span.number}"
        features = parse_example(file.load(span), feature_names(self.mixture.arm_action))
        visit = draw_visit(episode, np.random.default_rng((_SEED, span.number)))
        image, wrist_image = (
            bytes(images_of(features, camera, len(episode), where)[t]) for camera in (visit.camera, WRIST_CAMERA)
        )
        return visit.frame(t, image, wrist_image, self.mixture.horizon).decode()
