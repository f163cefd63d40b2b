"""Cameras stored as encoded images inside the tables, read where they are asked for.

Nothing is decoded or copied ahead of time: datasets of this kind are tens of GB of PNG.
"""

import io
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from openpi.data.lerobot.metadata import open_parquet

MAX_CACHED_BYTES = 256 * 2**20  # encoded row groups kept per thread


class ImageColumns:
    """Random access to image columns of the data files of one dataset. Pickles as empty."""

    def __init__(self, root: Path):
        self._root = root
        self._local = threading.local()

    def image_at(self, path: Path, column: str, row: int) -> np.ndarray:
        """The image in `row` of the file's `column`, as uint8 RGB [h, w, 3].

        Raises:
            ValueError: the cell is empty or does not hold an image.
            FileNotFoundError: the cell names a file that is not there.
        """
        where = f"{path}, column '{column}', row {row}"
        content, name = self._cell(path, column, row)
        if content is None and name is None:
            raise ValueError(f"{where}: no image")
        if content is None:
            return decode_image(self._read_external(Path(name or ""), where), where)
        return decode_image(content, where)

    def _read_external(self, name: Path, where: str) -> bytes:
        path = self._root / name
        if not path.is_file():
            raise FileNotFoundError(f"{where} names the image file {path}, which does not exist")
        return path.read_bytes()

    def _cell(self, path: Path, column: str, row: int) -> tuple[bytes | None, str | None]:
        cells, first_row = self._groups().cells(path, column, row)
        cell = cells[row - first_row].as_py()
        return (None, None) if cell is None else (cell["bytes"], cell["path"])

    def _groups(self) -> "_RowGroups":
        if not hasattr(self._local, "groups"):
            self._local.groups = _RowGroups()
        return self._local.groups

    def __getstate__(self) -> Path:
        return self._root

    def __setstate__(self, root: Path) -> None:
        self.__init__(root)


class _RowGroups:
    """The row groups read last, encoded as they are in the file."""

    def __init__(self):
        self._bounds: dict[Path, np.ndarray] = {}
        self._cells: OrderedDict[tuple[Path, str, int], pa.StructArray] = OrderedDict()
        self._bytes = 0

    def cells(self, path: Path, column: str, row: int) -> tuple[pa.StructArray, int]:
        """The row group of `row`, and the row that it begins with."""
        bounds = self._bounds_of(path)
        group = int(np.searchsorted(bounds, row, side="right")) - 1
        key = (path, column, group)
        if key in self._cells:
            self._cells.move_to_end(key)
        else:
            self._keep(key, self._read(path, column, group))
        return self._cells[key], int(bounds[group])

    def _keep(self, key: tuple[Path, str, int], cells: pa.StructArray) -> None:
        self._cells[key] = cells
        self._bytes += cells.nbytes
        while self._bytes > MAX_CACHED_BYTES and len(self._cells) > 1:
            self._bytes -= self._cells.popitem(last=False)[1].nbytes

    def _bounds_of(self, path: Path) -> np.ndarray:
        if path not in self._bounds:
            with open_parquet(path) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self._bounds[path] = np.cumsum([0, *sizes])
        return self._bounds[path]

    @staticmethod
    def _read(path: Path, column: str, group: int) -> pa.StructArray:
        with open_parquet(path) as file:
            cells = file.read_row_group(group, columns=[column])[column].combine_chunks()
        return pa.concat_arrays(cells.chunks) if isinstance(cells, pa.ChunkedArray) else cells


def decode_image(content: bytes, where: str) -> np.ndarray:
    """PNG, JPEG, ... -> uint8 RGB [h, w, 3]. `where` names the image in errors."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise ValueError(f"{where}: not a readable image ({error})") from error
