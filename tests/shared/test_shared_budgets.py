"""What is small on disk and large in memory is refused before the memory is taken."""

import contextlib
import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openpi.shared import budgets
from openpi.shared.budgets import Budget, BudgetError, read_npy, read_npz
from plain_values import PLAIN


def _npz(**arrays: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stub takes the arrays for its own options
    return file


def _npy(header: str, content: bytes = b"") -> io.BytesIO:
    text = header.encode("latin1")
    return io.BytesIO(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content)


@given(hnp.arrays(PLAIN, hnp.array_shapes(min_dims=0, min_side=0, max_side=4)))
def test_arrays_of_plain_dtypes_come_back_as_they_were_written(array):
    (read,) = read_npz(_npz(a=array), Budget(10**6)).values()
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_the_order_in_memory_does_not_matter():
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(read_npz(_npz(a=array), Budget(1000))["a"], array)


def test_a_small_archive_of_large_arrays_is_refused_before_it_is_unpacked():
    file = _npz(**{f"a{i}": np.zeros(2**20) for i in range(3)})
    assert len(file.getvalue()) < 100_000
    tracemalloc.start()
    with pytest.raises(BudgetError, match=r"'a2' of shape \(1048576,\).* would take 8,388,608 bytes"):
        read_npz(file, Budget(2**24 + 2**20))
    assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "9" * 300 + ",)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (" + "0," * 40 + ")}",
        "{'descr': '|O', 'fortran_order': False, 'shape': ()}",
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': ()}",
        "{'descr': '<U500000000', 'fortran_order': False, 'shape': ()}",
        "{'descr': '|V16', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<M8[x]', 'fortran_order': False, 'shape': ()}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}",
        "__import__('os').system('false')",
        "[" * 9000,
        "",
    ],
)
def test_a_header_that_lies_is_refused(header):
    with pytest.raises(ValueError):
        read_npy(_npy(header, b"\0" * 8), Budget(10**9), "it")


def test_an_archive_of_very_many_members_is_refused_before_its_directory_is_read():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(budgets.MAX_ARCHIVE_MEMBERS + 1):
            archive.writestr(str(i), b"")
    with pytest.raises(BudgetError, match="has 4097 members"):
        read_npz(file, Budget(1000))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused():
    file = _npz(a=np.zeros(1))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ValueError, match="two members of one name"):
        read_npz(file, Budget(1000))


@given(st.data())
def test_a_damaged_archive_is_a_value_error(data):
    content = bytearray(_npz(a=np.arange(100.0), b=np.array("text")).getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read_npz(io.BytesIO(bytes(content)), Budget(10**6))
