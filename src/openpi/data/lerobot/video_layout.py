"""Which frames of which video file are an episode's, and whether the files bear it out.

    file      |---- episode 3 ----|---- episode 4 ----|-- 5 --|          spans of a file follow one another,
    frames    0                  90                 150     180          and the last ends where the file does

What a table says in seconds is only compared: small errors add up there (LeRobot sums durations of containers), and
frames are found by their number in the file, the sum of the lengths before. A span may be longer than its episode, if
the table says so itself: LeRobot up to 0.6 leaves the end of a take that was discarded behind the one that was recorded
instead (its #4104).
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from openpi.data.lerobot.episode_table import Episode, leave_out, named
from openpi.data.lerobot.video import VideoFile

_TOLERANCE_FRAMES = 0.5  # between spans: beyond it another frame would be meant
_JITTER_FRAMES = 1.0  # of two frames' times, each off by less than half a frame
_WHOLE = 0.3  # of a frame that a number of frames is off, in seconds that a table says
_DRIFT = 0.01  # of a clock: 29.97 for 30

_SAME_RATE = 1e-3
_REWRITE = "Write the table of episodes (meta/episodes) again with the tool that made the dataset"


@dataclass(frozen=True)
class FileLayout:
    """What a video file should hold.

    Attributes:
        spans: (first frame, number of frames) of its episodes, in order.
        episodes: their numbers.
        num_frames: in all; the file may have more of them if it `is_open_ended`, because the episode that
            follows is not in the table.
        surplus: frames by which the spans of some episodes are longer than these, by number. Those of the last are
            `tail`, if the file has them.
    """

    path: Path
    episodes: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    is_open_ended: bool
    surplus: Mapping[int, int]
    tail: int

    @property
    def num_frames(self) -> int:
        first, length = self.spans[-1]
        return first + length


class VideoLayout:
    """The videos of some cameras of a dataset.

    Args:
        episodes: all of the dataset.
        chosen: numbers of those that are read; files without any of them are left alone.
        keys: the cameras.
    Raises:
        ValueError: the spans of a file overlap, or leave a gap; or a chosen episode lacks a camera.
    """

    def __init__(self, episodes: Sequence[Episode], chosen: Iterable[int], keys: Iterable[str], fps: float):
        self._fps = fps
        self._files: dict[Path, FileLayout] = {}
        self._first_frames: dict[str, dict[int, int]] = {}
        self._checked: dict[Path, tuple[int, Mapping[int, int]]] = {}
        chosen = set(chosen)
        for key in keys:
            self._first_frames[key] = first_frames = {}
            _check_present(key, episodes, chosen)
            placed = {episode.index for episode in episodes if key in episode.videos}
            last = episodes[-1].index
            for path, members in _by_file(key, episodes).items():
                if chosen.isdisjoint(episode.index for episode in members):
                    continue
                layout = _lay_out(key, path, members, placed, last, fps)
                self._files[path] = layout
                first_frames |= {i: first for i, (first, _) in zip(layout.episodes, layout.spans, strict=True)}

    @property
    def paths(self) -> Sequence[Path]:
        return list(self._files)

    def layout(self, path: Path) -> FileLayout:
        return self._files[path]

    def first_frame(self, key: str, episode: int) -> int:
        """The number of an episode's first frame in its file."""
        return self._first_frames[key][episode]

    def check(self, video: VideoFile) -> Mapping[int, int]:
        """Compares a file with what it should hold, once as long as it is the same; of the file only its index is read.

        Returns:
            by episode, how many frames there are beyond its own, which nobody reads.
        Raises:
            ValueError: another number of frames, another clock, or pixels that are not 8-bit.
        """
        # Files of hundreds of episodes are opened for nearly each sample.
        modified_ns = video.path.stat().st_mtime_ns
        checked_ns, surplus = self._checked.get(video.path, (0, {}))
        if checked_ns != modified_ns:
            surplus = self._check(video)
            self._checked[video.path] = modified_ns, surplus
        return surplus

    def _check(self, video: VideoFile) -> Mapping[int, int]:
        layout = self._files[video.path]
        out = f"Bring the file again, correct the dataset, or {leave_out(layout.episodes)}"
        if video.bits > 8:
            raise ValueError(
                f"{video.path} has pixels of {video.bits} bits ({video.pixel_format}); expected 8-bit RGB or yuv420p. "
                "Encode it again, or take the camera out of the recipe"
            )
        found, expected = video.num_frames, layout.num_frames
        slack = 0 if video.is_counted else 1  # a duration is rounded
        more = found - expected
        # Of several episodes, rows are probably missing of one of the first.
        is_surplus = more > slack and (more == layout.tail or len(layout.spans) == 1)
        if more < -slack or (more > slack and not layout.is_open_ended and not is_surplus):
            gaps = sum(layout.surplus.values())
            between = f", {gaps} of them in gaps between spans" if gaps else ""
            what = "truncated" if found < expected else "too long"
            raise ValueError(
                f"{video.path} holds {found} frames ({found / self._fps:.3f} s), the table expects {expected} "
                f"({expected / self._fps:.3f} s) of {named(layout.episodes)}{between}: the last span has to end "
                f"where the file ends. The file is {what}, or belongs to another recording. {out}"
            )
        rate = video.rate
        if not video.is_counted and rate is not None and abs(rate / self._fps - 1) > _DRIFT:  # times are not told
            raise ValueError(
                f"{video.path} runs at {rate:.4g} frames per second; expected {self._fps:g}, the fps in meta/info.json"
                f". {out}"
            )
        self._check_clock(video, layout, out)
        return {**layout.surplus, layout.episodes[-1]: more} if is_surplus else layout.surplus

    def _check_clock(self, video: VideoFile, layout: FileLayout, out: str) -> None:
        for episode, (first, length) in zip(layout.episodes, layout.spans, strict=True):
            for frame in (first + length // 2, first + length - 1):
                expected_s = (frame - first) / self._fps
                found_s = video.time_of(frame) - video.time_of(first)
                if abs(found_s - expected_s) > _JITTER_FRAMES / self._fps + _DRIFT * expected_s:
                    rate = f", {(frame - first) / found_s:.4g} frames per second" if found_s > 0 else ""
                    raise ValueError(
                        f"{video.path} shows frame {frame - first} of episode {episode} {found_s:.3f} s after its "
                        f"first{rate}; expected {expected_s:.3f} s, since meta/info.json says fps {self._fps:g}. "
                        f"Correct 'fps', or encode the video again at {self._fps:g} frames per second; or "
                        f"{leave_out(layout.episodes)}"
                    )


def _check_present(key: str, episodes: Sequence[Episode], chosen: set[int]) -> None:
    lacking = [e.index for e in episodes if e.index in chosen and key not in e.videos]
    if lacking:
        raise ValueError(
            f"{named(lacking)} of {len(chosen)} {'has' if len(lacking) == 1 else 'have'} no video of camera '{key}' "
            f"(meta/episodes, 'videos/{key}/file_index' is empty); {leave_out(lacking)}, or take the camera out of the "
            "recipe: its image slot is then masked"
        )


def _by_file(key: str, episodes: Iterable[Episode]) -> Mapping[Path, list[Episode]]:
    files: dict[Path, list[Episode]] = {}
    for episode in episodes:
        if key in episode.videos:
            files.setdefault(episode.videos[key].path, []).append(episode)
    return files


def _lay_out(
    key: str, path: Path, members: Sequence[Episode], placed: Set[int], last_of_all: int, fps: float
) -> FileLayout:
    """Numbers the frames of a file.

    Args:
        placed: episodes of the dataset that have the camera. A gap is as long as it says only where one is missing.
        last_of_all: episode of the dataset.
    """
    spans: list[tuple[int, int]] = []
    surplus: dict[int, int] = {}
    end, end_s, before = 0, 0.0, None
    for episode in members:
        start_s = episode.videos[key].start_s
        shift = (start_s - end_s) * fps
        before_end_s = 0.0 if before is None else before.videos[key].end_s or 0.0
        is_told = any(abs(before_end_s - told_s) * fps <= _TOLERANCE_FRAMES for told_s in (start_s, end_s))
        if shift > _TOLERANCE_FRAMES and episode.index - 1 not in placed and episode.index > 0:
            end += round(shift)
        elif before is not None and is_told and _is_whole(shift) and _other_rate(key, members, fps) is None:
            surplus[before.index] = round(shift)
            end += round(shift)
        elif abs(shift) > _TOLERANCE_FRAMES:
            all_of_it = [member.index for member in members]
            torn = _torn(path, before, episode, end_s, start_s, fps)
            fix = _other_rate(key, members, fps) or f"{_REWRITE}; or {leave_out(all_of_it)}, which is all of the file"
            raise ValueError(f"{torn}. {fix}")
        spans.append((end, episode.length))
        end += episode.length
        end_s, before = start_s + episode.length / fps, episode
    last = members[-1]
    is_open_ended = last.index + 1 not in placed and last.index < last_of_all
    tail = ((last.videos[key].end_s or 0.0) - end_s) * fps
    indices = tuple(episode.index for episode in members)
    return FileLayout(path, indices, tuple(spans), is_open_ended, surplus, round(tail) if _is_whole(tail) else 0)


def _is_whole(frames: float) -> bool:
    return frames > _TOLERANCE_FRAMES and abs(frames - round(frames)) <= _WHOLE


def _torn(path: Path, before: Episode | None, episode: Episode, end_s: float, start_s: float, fps: float) -> str:
    what = "a gap" if start_s > end_s else "an overlap"
    where = f"episode {before.index} before it ends" if before else "the file begins"
    return (
        f"{path}: episode {episode.index} starts at {start_s:.3f} s (from_timestamp), and {where} at {end_s:.3f} s, "
        f"{what} of {abs(start_s - end_s) * fps:.1f} frames; expected {end_s:.3f} s"
    )


def _other_rate(key: str, members: Sequence[Episode], fps: float) -> str | None:
    """What to do where all spans of a file run at one rate that is not `fps` but as round a number."""
    before, rates = 0, []
    for episode in members:
        if start_s := episode.videos[key].start_s:
            rates.append(before / start_s)
        before += episode.length
    rate = round(rates[0]) if rates else 0
    if rate and rate != fps and all(abs(found / rate - 1) < _SAME_RATE for found in rates):
        return f"All of its spans run at {rate} frames per second, and meta/info.json says fps {fps:g}: correct 'fps'"
    return None
