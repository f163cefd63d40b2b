"""All finished episodes below a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from openpi_positronic.raw_episodes import layout
from openpi_positronic.raw_episodes.episode import Episode


class RawDataset(Sequence[Episode]):
    """The episodes of a dataset, or of all datasets below a folder, nearest first.

    Attributes:
        paths: of the episodes.
        unfinished: folders of recordings that were cut, or are going on; they are left out.
    Raises:
        FileNotFoundError: no such folder, or no episode in it.
    """

    def __init__(self, root: Path | str):
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"dataset folder {root} does not exist")
        found = [episode for dataset in _datasets(root) for episode in _episodes(dataset)]
        self.paths = [path for path in found if layout.is_finished(path)]
        self.unfinished = [path for path in found if not layout.is_finished(path)]
        if not self.paths:
            cut = f", and {len(self.unfinished)} that are not finished" if self.unfinished else ""
            raise FileNotFoundError(
                f"{root} has no episode{cut}; expected folders <block>/<episode> with names of 12 digits"
            )

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Episode: ...
    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...
    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [Episode(path) for path in self.paths[index]]
        return Episode(self.paths[index])


def _episodes(dataset: Path) -> list[Path]:
    return [episode for block in layout.numbered_folders(dataset) for episode in layout.numbered_folders(block)]


def _datasets(root: Path) -> Iterator[Path]:
    """Folders that hold blocks, breadth first."""
    waiting, seen = deque([root]), set()
    while waiting:
        folder = waiting.popleft()
        if folder.resolve() in seen:  # links may lead in circles
            continue
        seen.add(folder.resolve())
        if layout.numbered_folders(folder):
            yield folder
            continue
        waiting.extend(sorted(path for path in folder.iterdir() if path.is_dir()))
