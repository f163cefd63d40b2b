"""Cameras stored as encoded images inside the tables, read where they are asked for.

Nothing is decoded or copied ahead of time: datasets of this kind are tens of GB of PNG.
"""

import enum
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openpi.data.images import decode_image
from openpi.data.lerobot.files import check_inside, open_parquet
from openpi.data.lerobot.parquet_pages import BinaryColumn, UnsupportedLayoutError
from openpi.data.path_template import inside
from openpi.shared.errors import first_line

# What reading pages of a damaged file comes to.
_DAMAGE = (pa.ArrowException, OSError, struct.error, IndexError, KeyError, OverflowError, MemoryError)

MAX_KNOWN_COLUMNS = 16384  # what is kept of one is where its pages and values lie: some KB


class ImageColumns:
    """Random access to image columns of the data files of one dataset. Threads may share it. Pickles as empty."""

    def __init__(self, root: Path):
        self._root = root
        self._columns: OrderedDict[tuple[Path, str], BinaryColumn | _WholeColumn] = OrderedDict()
        self._kinds: dict[tuple[Path, str], _Kind] = {}
        self._lock = threading.Lock()  # of the dict

    def image_at(self, path: Path, column: str, row: int) -> np.ndarray:
        """The image in `row` of the file's `column`, as uint8 RGB [h, w, 3].

        A cell is a struct of `bytes`, an encoded image, and `path`, relative to the dataset; or one of the two alone.

        Raises:
            ValueError: the cell is empty or does not hold an image, or the column has cells of another kind.
            FileNotFoundError: the cell names a file that is not there.
        """
        return decode_image(self.encoded_at(path, column, row), f"{path}, column '{column}', row {row}")

    def encoded_at(self, path: Path, column: str, row: int) -> bytes:
        """The same as it is stored."""
        content, name = self._cell(path, column, row)
        return self._read_external(name, f"{path}, column '{column}', row {row}") if content is None else content

    def _cell(self, path: Path, column: str, row: int) -> tuple[bytes | None, object]:
        """The encoded image, or else the name of a file."""
        kind = self._kind(path, column)
        if kind is _Kind.PATH:
            return None, self._value(path, column, None, row)
        if kind is _Kind.BYTES:
            return self._value(path, column, None, row), None
        content = self._value(path, column, "bytes", row)
        return content, None if content is not None else _WholeColumn(path, column, "path").value(row)

    def _value(self, path: Path, column: str, field: str | None, row: int) -> Any:
        try:
            return self._column(path, column, field).value(row)
        except UnsupportedLayoutError:
            return self._remember(path, column, _WholeColumn(path, column, field)).value(row)
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise ValueError(
                f"{path}, column '{column}', row {row}: it is damaged ({first_line(error)}). Bring the file again, "
                "or leave out its episodes"
            ) from error

    def _kind(self, path: Path, column: str) -> "_Kind":
        if (path, column) not in self._kinds:
            self._kinds[path, column] = _kind_of(path, column)
        return self._kinds[path, column]

    def _read_external(self, name: object, where: str) -> bytes:
        """An image that the table only names, relative to the dataset."""
        if not isinstance(name, str | bytes):
            raise ValueError(f"{where}: no image. Leave out its episode, or write the frame again")
        text = name if isinstance(name, str) else name.decode(errors="replace")
        file = inside(self._root, text, where)
        if not file.is_file():
            raise FileNotFoundError(
                f"{where} names the image file {file}, which does not exist; names are relative to the dataset's folder"
            )
        check_inside(self._root, file)
        return file.read_bytes()

    def _column(self, path: Path, column: str, field: str | None) -> "BinaryColumn | _WholeColumn":
        with self._lock:
            if (path, column) in self._columns:
                self._columns.move_to_end((path, column))
                return self._columns[path, column]
        return self._remember(path, column, BinaryColumn(path, column if field is None else f"{column}.{field}"))

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


class _Kind(enum.Enum):
    """What the cells of an image column are."""

    STRUCT = enum.auto()
    BYTES = enum.auto()
    PATH = enum.auto()


def _kind_of(path: Path, column: str) -> _Kind:
    with open_parquet(path) as file:
        schema = file.schema_arrow
    if column not in schema.names:
        raise ValueError(f"{path} lacks the column '{column}' that meta/info.json lists as a feature of images")
    kind = schema.field(column).type
    if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes"}:
        return _Kind.STRUCT
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _Kind.BYTES
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _Kind.PATH
    raise ValueError(
        f"{path}: the cells of the image column '{column}' are {kind}; expected a struct of 'bytes' (an encoded image) "
        "and 'path', or bytes or a path alone. Write the column so, as LeRobotWriter does of uint8 arrays"
    )


class _WholeColumn:
    """An image column, or a field of it, by PyArrow, the last row group kept: slow, but it reads every layout."""

    def __init__(self, path: Path, column: str, field: str | None):
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
        return cell if cell is None or self._field is None else cell.get(self._field)
