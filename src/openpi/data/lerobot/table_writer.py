"""Data files of a new dataset: episodes as Parquet row groups, images as PNG inside."""

import io
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openpi.data.lerobot.annotations import is_annotation, to_language
from openpi.data.lerobot.columns import to_arrow
from openpi.data.lerobot.features import Feature

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
FILES_PER_CHUNK = 1000
_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_PNG_THREADS = 4
_ROWS_PER_CHECK = 16  # after so many rows Parquet asks whether a page is full (1 MB); by default after 1024


class TableFiles:
    """Data files, rolled over by size; one row group per episode."""

    def __init__(self, root: Path, max_bytes: float, first_file: int = 0):
        self._root = root
        self._max_bytes = max_bytes
        self._writer: pq.ParquetWriter | None = None
        self._number = first_file - 1
        self._bytes = 0

    def append(self, table: pa.Table) -> dict[str, int]:
        """Writes the table; says in which file it lies."""
        if self._writer is None or self._bytes + table.nbytes > self._max_bytes:
            self._next_file(table.schema)
        assert self._writer is not None
        self._writer.write_table(table, row_group_size=len(table))
        self._bytes += table.nbytes
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        return {"data/chunk_index": chunk, "data/file_index": file}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _next_file(self, schema: pa.Schema) -> None:
        self.close()
        self._number += 1
        self._bytes = 0
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        path = self._root / DATA_PATH.format(chunk_index=chunk, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Frames rarely repeat exactly, and without dictionaries single images can be found inside a file.
        self._writer = pq.ParquetWriter(
            path, schema, compression="snappy", use_dictionary=False, write_batch_size=_ROWS_PER_CHECK
        )


def to_table(columns: Mapping[str, np.ndarray], features: Mapping[str, Feature]) -> pa.Table:
    arrays = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            arrays[key] = _encode_images(columns[key])
        elif is_annotation(feature):
            arrays[key] = to_language(columns[key].tolist(), key)
        elif feature["dtype"] != "video":
            arrays[key] = to_arrow(columns[key], feature)
    table = pa.table(arrays)
    # Columns without an entry are what their own type says.
    kinds = {key: _hub_type(features[key]) for key in arrays if not is_annotation(features[key])}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})


def _encode_images(frames_hwc: np.ndarray) -> pa.StructArray:
    """Pictures, or objects [n] that are encoded ones already."""
    if frames_hwc.dtype == object:
        return _image_cells(frames_hwc.tolist())
    with ThreadPoolExecutor(_PNG_THREADS) as pool:
        return _image_cells(list(pool.map(_encode_png, frames_hwc)))


def _image_cells(encoded: list[bytes]) -> pa.StructArray:
    paths = [f"frame-{i:06d}.png" for i in range(len(encoded))]
    return pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], fields=list(_IMAGE_TYPE)
    )


def _encode_png(frame_hwc: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame_hwc).save(buffer, "png", compress_level=1)  # level 6 is 4x slower and 10% smaller
    return buffer.getvalue()


def _hub_type(feature: Feature) -> dict[str, object]:
    """How the `datasets` library and the hub's viewer name this column's type."""
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    shape = list(feature["shape"])
    if feature["dtype"] == "string" or shape == [1]:
        return value
    if len(shape) == 1:
        return {"feature": value, "length": shape[0], "_type": "List"}
    return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
