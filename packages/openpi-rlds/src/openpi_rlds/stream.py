"""From the records of one or more datasets to shuffled frames, without end, in an order that a seed decides.

Files of records are read from front to back, which is what 1.8 TB on a network disk allow; random order is made in
memory. The usual buffer, out of which random frames are drawn, cannot be restored without reading everything again: a
frame may stay in it for ever. Here every frame is delayed by a random time instead:

    frame i comes in at time i and goes out at time i + U(0, 2 N)

At any time N frames wait, as in a buffer of size N, and two frames of one episode are as likely to meet in a batch; but
what waits at time t has come in after t - 2 N. To continue a run, the last 2 N frames are read once more.

Work is divided into lanes. The endless row of files (a new permutation in each pass) is dealt to them like cards, a
batch has the same number of frames from each, and a process has whole lanes. So the batches of a run do not depend on
the number of its processes, as long as it divides the number of lanes. Decision: `docs/decisions/0006`.
"""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from openpi.data.batch_order import State, check_divisible
from openpi.shared.tree import Tree
from openpi_rlds.episode import (
    WRIST_CAMERA,
    ArmAction,
    Frame,
    Visit,
    draw_visit,
    feature_names,
    images_of,
    kept_frames,
    make_episode,
)
from openpi_rlds.example import MalformedError, not_an_example, parse_example
from openpi_rlds.folder import TfdsFolder
from openpi_rlds.frame_ranges import FrameRanges
from openpi_rlds.tfrecord import TFRecordFile

MAX_LANES = 48  # divided by 3 and 6 processes, too
MAX_READERS = 8
MAX_BARREN = 1000  # episodes in a row without a frame, after which we give up

_ORDER, _VISIT, _MIXTURE = range(3)  # what a generator is for; part of its seed


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """A dataset, its share of all frames, and which of its frames are used."""

    folder: TfdsFolder
    weight: float
    ranges: FrameRanges


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What frames are made of.

    Attributes:
        arm_action: which action the arm's is.
        horizon: steps of an action chunk.
    """

    parts: Sequence[MixturePart]
    arm_action: ArmAction
    horizon: int

    def __post_init__(self) -> None:
        weights = [part.weight for part in self.parts]
        if not weights or min(weights) <= 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
            raise ValueError(f"the weights of the datasets are {weights}; expected positive ones that add up to 1")


class MixtureSource:
    """Batches of `Frame`, for a `SourceLoader`.

    Args:
        batch_size: of all processes together.
        buffer_size: frames that wait, of all processes together; images stay encoded, some 25 KB a frame.
        shuffle: False: files and frames in their order, lane by lane.
        part: (process, number of processes).
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        buffer_size: int = 250_000,
        part: tuple[int, int] = (0, 1),
    ):
        check_divisible(batch_size, part)
        if buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size is {buffer_size}; expected a number of frames, such as 250000")
        self._mixture = mixture
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._buffer_size = buffer_size
        self._num_lanes = math.lcm(math.gcd(batch_size, MAX_LANES), part[1])
        per_process = self._num_lanes // part[1]
        self._lanes = range(part[0] * per_process, (part[0] + 1) * per_process)
        rows = batch_size // part[1]
        self._rows = range(part[0] * rows, (part[0] + 1) * rows)
        self.identity: Mapping[str, Any] = {
            "datasets": [[p.folder.name, p.folder.num_episodes, p.weight, p.ranges.digest] for p in mixture.parts],
            "arm_action": mixture.arm_action,
            "batch_size": batch_size,
            "lanes": self._num_lanes,
            "seed": seed,
            "shuffle": shuffle,
            "buffer_size": buffer_size,
        }

    def start(self) -> State:
        return {"next_batch": 0, "streams": {}, "order": 0}

    def start_after(self, state: Tree) -> State:
        """From the beginning, shuffled in a way of its own."""
        return {**self.start(), "order": int(state.get("order", 0)) + 1}

    def describe(self, item: Frame) -> str:
        return f"frame {item.step_id}"

    def batches(self, state: Tree) -> Generator[tuple[Sequence[Frame], State], None, None]:
        batch, order = int(state["next_batch"]), int(state.get("order", 0))
        seed = (self._seed, order) if order else (self._seed,)
        with ThreadPoolExecutor(MAX_READERS, thread_name_prefix="records") as readers:
            streams = {
                (lane, i): self._stream(lane, i, seed, readers)
                for lane in self._lanes
                for i in range(len(self._mixture.parts))
            }
            try:
                for key, stream in streams.items():
                    if (position := state["streams"].get(_name(*key))) is not None:
                        stream.restore(position)
                with ThreadPoolExecutor(MAX_READERS, thread_name_prefix="fill") as fillers:
                    list(fillers.map(FrameStream.fill, streams.values()))
                while True:
                    frames = [streams[key].take() for key in self._origins(batch, seed)]
                    batch += 1
                    positions = {_name(*key): stream.state() for key, stream in streams.items()}
                    yield frames, {"next_batch": batch, "streams": positions, "order": order}
            finally:
                for stream in streams.values():
                    stream.close()

    def _origins(self, batch: int, seed: tuple[int, ...]) -> list[tuple[int, int]]:
        """(lane, dataset) of each of this process's rows."""
        rng = np.random.default_rng((*seed, _MIXTURE, batch))
        weights = np.array([part.weight for part in self._mixture.parts])
        datasets = rng.choice(len(weights), size=self._batch_size, p=weights / weights.sum())
        return [(row * self._num_lanes // self._batch_size, int(datasets[row])) for row in self._rows]

    def _stream(self, lane: int, i: int, seed: tuple[int, ...], readers: Executor) -> "FrameStream":
        part = self._mixture.parts[i]
        order = (*seed, _ORDER, i) if self._shuffle else None
        reader = LaneReader(part.folder, lane, self._num_lanes, order)
        waiting = math.ceil(self._buffer_size * part.weight / self._num_lanes) if self._shuffle else 0
        return FrameStream(self._mixture, part, reader, waiting, (*seed, _VISIT, i), readers)


def _name(lane: int, dataset: int) -> str:
    return f"{lane}/{dataset}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a lane: `position` is (file of the lane, from 0 on; record of the file), `where` for errors."""

    position: tuple[int, int]
    card: int
    data: bytes
    where: str


class LaneReader:
    """The records of one lane of a dataset, without end.

    Args:
        order: seed of the permutations; None = the order of the files.
    """

    def __init__(self, folder: TfdsFolder, lane: int, num_lanes: int, order: tuple[int, ...] | None):
        self._shards = folder.filled
        self._lane = lane
        self._num_lanes = num_lanes
        self._order = order
        self._ordinal = 0
        self._file: TFRecordFile | None = None

    def next(self) -> Record:
        """The next record, checked.

        Raises:
            ValueError, OSError: it cannot be read.
        """
        while True:
            self._file = self._file or TFRecordFile(*self._shard())
            span = self._file.next()
            if span is not None:
                where = f"{self._file.path}, record {span.number}"
                return Record((self._ordinal, span.number), self._card(), self._file.load(span), where)
            self._file.close()
            self._file, self._ordinal = None, self._ordinal + 1

    def seek(self, position: tuple[int, int]) -> None:
        """Makes the record there the next one."""
        self.close()
        self._ordinal, number = position
        self._file = TFRecordFile(*self._shard())
        for _ in range(number):
            self._file.next()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _card(self) -> int:
        """Place of the file in the row from which all lanes are dealt."""
        return self._lane + self._ordinal * self._num_lanes

    def _shard(self) -> tuple[Path, int]:
        """The file, and how many records it has."""
        turn, place = divmod(self._card(), len(self._shards))
        if self._order is None:
            return self._shards[place]
        return self._shards[np.random.default_rng((*self._order, turn)).permutation(len(self._shards))[place]]


class FrameStream:
    """The frames of one lane of a dataset, each delayed by a random time; see the head of this file.

    Args:
        waiting: N, how many frames wait; 0 = no delay.
        seed: of the delays and of what is drawn per visit.
        readers: where records are read ahead, one at a time.
    """

    def __init__(
        self,
        mixture: Mixture,
        part: MixturePart,
        reader: LaneReader,
        waiting: int,
        seed: tuple[int, ...],
        readers: Executor,
    ):
        self._mixture = mixture
        self._ranges = part.ranges
        self._reader = reader
        self._waiting = waiting
        self._seed = seed
        self._readers = readers
        self._names = feature_names(mixture.arm_action)
        self._ahead: Future[Record] | None = None
        # (time to leave, number of the frame, t, images, visit)
        self._heap: list[tuple[float, int, int, bytes, bytes, Visit]] = []
        self._num_in = 0
        self._left: tuple[float, int] = (-1.0, -1)  # of the frame that left last
        self._starts: deque[tuple[int, tuple[int, int]]] = deque()  # of episodes with frames that may still wait
        self._num_barren = 0

    def state(self) -> list[float]:
        """Where to read again, the number of the first frame there, and which frame left last."""
        first, position = self._starts[0] if self._starts else (0, (0, 0))
        return [*position, first, *self._left]

    def restore(self, state: tuple[int, int, int, float, int]) -> None:
        """Before the first frame is taken."""
        ordinal, record, first, time, number = state
        self._reader.seek((ordinal, record))
        self._num_in = first
        self._left = (time, number)

    def fill(self) -> None:
        """Reads until a frame can be taken."""
        while not (self._heap and self._heap[0][0] <= max(self._num_in, self._waiting)):
            self._read()

    def take(self) -> Frame:
        """The next frame.

        Raises:
            ValueError, KeyError, OSError: a record cannot be read; it is named.
        """
        self.fill()
        time, number, t, image, wrist_image, visit = heapq.heappop(self._heap)
        self._left = (time, number)
        oldest = time - 2 * self._waiting if time > 3 * self._waiting else 0
        while len(self._starts) > 1 and self._starts[1][0] <= oldest:
            self._starts.popleft()
        return visit.frame(t, image, wrist_image, self._mixture.horizon)

    def close(self) -> None:
        if self._ahead is not None and not self._ahead.cancel():
            self._ahead.exception()  # waits: the file is in use
        self._reader.close()

    def _read(self) -> None:
        """One more episode: its frames begin to wait, but for those that had left when the state was taken."""
        ahead = self._ahead or self._readers.submit(self._reader.next)
        record = ahead.result()
        self._ahead = self._readers.submit(self._reader.next)
        try:
            features = parse_example(record.data, self._names)
        except MalformedError as error:
            raise not_an_example(record.where, error) from error
        episode = make_episode(features, self._mixture.arm_action, record.where)
        kept = kept_frames(episode, self._ranges)
        self._check_barren(len(kept), record.where)
        if not len(kept):
            return
        rng = np.random.default_rng((*self._seed, record.card, record.position[1]))
        visit = draw_visit(episode, rng)
        images, wrist_images = (
            images_of(features, camera, len(episode), record.where) for camera in (visit.camera, WRIST_CAMERA)
        )
        self._starts.append((self._num_in, record.position))
        numbers = np.arange(self._num_in, self._num_in + len(kept))
        for time, number, t in zip(self._times(numbers, rng).tolist(), numbers.tolist(), kept.tolist(), strict=True):
            if (time, number) > self._left:
                # Copies: views would keep the whole episode in memory.
                heapq.heappush(self._heap, (time, number, t, bytes(images[t]), bytes(wrist_images[t]), visit))
        self._num_in += len(kept)

    def _times(self, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float64[n]: when the frames leave.

        The first N are those that would be waiting, had the stream been running for ever: nothing leaves before they
        are in, and from then on one frame leaves for each that comes.
        """
        drawn = rng.random(len(numbers))
        longest = 2 * self._waiting
        settled = self._waiting + longest * (1 - np.sqrt(drawn))
        return np.where(numbers < self._waiting, settled, numbers + longest * drawn)

    def _check_barren(self, num_kept: int, where: str) -> None:
        self._num_barren = 0 if num_kept else self._num_barren + 1
        if self._num_barren == MAX_BARREN:
            raise ValueError(
                f"{MAX_BARREN} episodes in a row, up to {where}, have no frame to train on: they are no successes "
                f"by their paths, or not named in {self._ranges.source}. Is that file of this dataset and version?"
            )
