"""Single values of binary Parquet columns against PyArrow, for the layouts that writers produce."""

import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openpi.data.images import decode_image
from openpi.data.lerobot import parquet_pages
from openpi.data.lerobot.images import ImageColumns
from openpi.data.lerobot.parquet_pages import BinaryColumn, UnsupportedLayoutError
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared.budgets import BudgetError

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image_cells(num_rows: int, *, with_nulls: bool, seed: int = 0) -> list[dict | None]:
    """Values of all sizes, some repeated (so that dictionaries are used), some null on either level."""
    rng = np.random.default_rng(seed)
    contents = [rng.bytes(int(size)) for size in rng.integers(0, 3000, num_rows // 2 + 1)]
    cells: list[dict | None] = [
        {"bytes": contents[i], "path": f"frame-{row}.png"}
        for row, i in enumerate(rng.integers(0, len(contents), num_rows))
    ]
    if with_nulls:
        for row in np.flatnonzero(rng.random(num_rows) < 0.3):
            cells[row] = None if rng.random() < 0.5 else {"bytes": None, "path": "elsewhere.png"}
    return cells


@pytest.mark.parametrize(
    ("compression", "use_dictionary", "version", "with_nulls"),
    list(
        itertools.product(
            ["none", "snappy", "zstd", "gzip", "lz4", "brotli"], [True, False], ["1.0", "2.0"], [True, False]
        )
    ),
)
def test_values_equal_those_of_pyarrow(tmp_path, compression, use_dictionary, version, with_nulls):
    cells = image_cells(300, with_nulls=with_nulls)
    table = pa.table({"index": pa.array(range(300)), "image": pa.array(cells, IMAGE_TYPE)})
    path = tmp_path / "data.parquet"
    pq.write_table(
        table,
        path,
        compression=compression,
        use_dictionary=use_dictionary,
        data_page_version=version,
        row_group_size=170,
        data_page_size=8000,
        dictionary_pagesize_limit=100_000,  # so that a chunk starts with a dictionary and goes on without
        write_batch_size=7,
    )
    column = BinaryColumn(path, "image.bytes")
    for row in np.random.default_rng(1).permutation(300):
        cell = cells[row]
        assert column.value(int(row)) == (None if cell is None else cell["bytes"])


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_value_in_a_large_snappy_page_is_read_without_the_rest_of_the_page(tmp_path, monkeypatch, use_dictionary):
    rng = np.random.default_rng(0)
    values = [rng.bytes(int(size)) if size % 3 else b"repeat" * int(size) for size in rng.integers(0, 60_000, 80)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": values}), path, use_dictionary=use_dictionary)
    column = BinaryColumn(path, "x")
    column.value(0)  # finds out where the values lie
    bytes_read = []
    read = parquet_pages._File.read

    def counting_read(self, begin: int, size: int) -> memoryview:
        bytes_read.append(size)
        return read(self, begin, size)

    monkeypatch.setattr(parquet_pages._File, "read", counting_read)
    for row in rng.permutation(80):
        assert column.value(int(row)) == values[row]
    assert path.stat().st_size > 1_000_000
    assert max(bytes_read) < 150_000


def test_columns_without_nulls_are_read(tmp_path):
    values = [b"a" * i for i in range(50)]
    schema = pa.schema([pa.field("x", pa.binary(), nullable=False)])
    pq.write_table(pa.table({"x": values}, schema=schema), tmp_path / "x.parquet")
    column = BinaryColumn(tmp_path / "x.parquet", "x")
    assert [column.value(row) for row in range(50)] == values


def test_repeated_columns_and_rare_encodings_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": [[b"a"], [b"b", b"c"]], "n": [1, 2]}), path)
    for column in ("x.list.element", "n", "y"):
        with pytest.raises(UnsupportedLayoutError):
            BinaryColumn(path, column)
    delta = {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}
    cells = image_cells(10, with_nulls=False)
    table = pa.table({"image": pa.array(cells, IMAGE_TYPE)})
    pq.write_table(table, path, use_dictionary=False, column_encoding=delta)
    with pytest.raises(UnsupportedLayoutError):
        BinaryColumn(path, "image.bytes").value(0)


def test_images_in_rare_encodings_and_images_outside_the_table_are_found(golden, tmp_path):
    dataset = LeRobotDataset(golden / "lerobot_v30/image")
    cells = pq.read_table(dataset.episodes[0].data_path, columns=["image"])["image"].to_pylist()[:6]
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/3.png").write_bytes(cells[3]["bytes"])
    expected = [decode_image(cell["bytes"], "") for cell in cells]
    cells[3] = {"bytes": None, "path": "frames/3.png"}
    cells[4] = {"bytes": None, "path": "frames/4.png"}
    cells[5] = None
    table = pa.table({"image": pa.array(cells, IMAGE_TYPE)})
    for name, options in [
        ("plain", {}),
        ("rare", {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}),
    ]:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, **options)
        images = ImageColumns(tmp_path)
        for row in (2, 0, 3, 1):
            np.testing.assert_array_equal(images.image_at(path, "image", row), expected[row])
        with pytest.raises(FileNotFoundError, match=r"row 4 names the image file .*frames/4\.png"):
            images.image_at(path, "image", 4)
        with pytest.raises(ValueError, match=r"row 5: no image"):
            images.image_at(path, "image", 5)


def _png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a", b"\x89PNG but not really", _png(64, 64)[:50], b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_bytes_that_are_no_image_are_named(content):
    with pytest.raises(ValueError, match=r"row 7: not a readable image"):
        decode_image(content, "row 7")


def test_an_image_is_measured_before_it_is_decoded():
    with pytest.raises(BudgetError, match=r"row 7 would take 25,000,000 pixels"):
        decode_image(_png(5000, 5000), "row 7")
