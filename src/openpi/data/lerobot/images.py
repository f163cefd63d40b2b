"""Cameras stored as encoded images inside the tables, read where they are asked for.

Nothing is decoded or copied ahead of time: datasets of this kind are tens of GB of PNG.
"""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa

from openpi.data.images import decode_image
from openpi.data.lerobot.files import open_parquet
from openpi.data.lerobot.parquet_pages import BinaryColumn, UnsupportedLayoutError

MAX_KNOWN_COLUMNS = 16384  # what is kept of one is where its pages and values lie: some KB


class ImageColumns:
    """Random access to image columns of the data files of one dataset. Threads may share it. Pickles as empty."""

    def __init__(self, root: Path):
        self._root = root
        self._columns: OrderedDict[tuple[Path, str], BinaryColumn | _WholeColumn] = OrderedDict()
        self._lock = threading.Lock()  # of the dict

    def image_at(self, path: Path, column: str, row: int) -> np.ndarray:
        """The image in `row` of the file's `column`, as uint8 RGB [h, w, 3].

        Raises:
            ValueError: the cell is empty or does not hold an image.
            FileNotFoundError: the cell names a file that is not there.
        """
        where = f"{path}, column '{column}', row {row}"
        try:
            content = self._column(path, column).value(row)
        except UnsupportedLayoutError:
            content = self._remember(path, column, _WholeColumn(path, column, "bytes")).value(row)
        if content is None:
            content = self._read_external(path, column, row, where)
        return decode_image(content, where)

    def _read_external(self, path: Path, column: str, row: int, where: str) -> bytes:
        """An image that the table only names, relative to the dataset."""
        name = _WholeColumn(path, column, "path").value(row)
        if not isinstance(name, str):
            raise ValueError(f"{where}: no image")
        file = self._root / name
        if not file.is_file():
            raise FileNotFoundError(f"{where} names the image file {file}, which does not exist")
        return file.read_bytes()

    def _column(self, path: Path, column: str) -> "BinaryColumn | _WholeColumn":
        with self._lock:
            if (path, column) in self._columns:
                self._columns.move_to_end((path, column))
                return self._columns[path, column]
        return self._remember(path, column, BinaryColumn(path, f"{column}.bytes"))

    def _remember(
        self, path: Path, column: str, opened: "BinaryColumn | _WholeColumn"
    ) -> "BinaryColumn | _WholeColumn":
        with self._lock:
            while len(self._columns) >= MAX_KNOWN_COLUMNS:
                self._columns.popitem(last=False)
            self._columns[path, column] = opened
        return opened

    def __getstate__(self) -> Path:
        return self._root

    def __setstate__(self, root: Path) -> None:
        self.__init__(root)


class _WholeColumn:
    """A field of an image column by PyArrow, the last row group kept: slow, but it reads every layout."""

    def __init__(self, path: Path, column: str, field: str):
        self._path = path
        self._column = column
        self._field = field
        with open_parquet(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        self._first_rows = np.cumsum([0, *sizes])
        self._group: tuple[int, pa.ChunkedArray] | None = None

    def value(self, row: int) -> bytes | str | None:
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        held = self._group
        if held is None or held[0] != group:
            with open_parquet(self._path) as file:
                held = group, file.read_row_group(group, columns=[self._column])[self._column]
            self._group = held
        cell = held[1][row - int(self._first_rows[group])].as_py()
        return None if cell is None else cell[self._field]
