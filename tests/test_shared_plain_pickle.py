"""A published recording is a pickle: what NumPy writes for arrays is read, and nothing else is carried out."""

import contextlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from openpi.shared import plain_pickle
from openpi.shared.budgets import Budget, BudgetError
from test_shared_budgets import PLAIN

ARRAYS = hnp.arrays(PLAIN, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | ARRAYS,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def read(content: bytes, num_bytes: int = 10**6):
    return plain_pickle.loads(content, Budget(num_bytes))


def _as_text(value) -> str:
    """With dtypes and shapes."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.str}{value.shape}{value.tolist()}"
    if isinstance(value, dict):
        return str({key: _as_text(item) for key, item in value.items()})
    return str([_as_text(item) for item in value]) if isinstance(value, (list, tuple)) else repr(value)


@given(VALUES, st.sampled_from([3, 4, 5]))
def test_plain_values_and_arrays_come_back(value, protocol):
    content = pickle.dumps(np.asarray({"value": value}, dtype=object), protocol=protocol)
    assert _as_text(read(content)) == _as_text({"value": value})


def test_numbers_of_numpy_and_other_orders_come_back():
    values = {
        "scalar": np.float32(2.5),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i2"),
        "strided": np.arange(10)[::2],
        "half": np.float16(1),
    }
    assert _as_text(read(pickle.dumps(values, protocol=4))) == _as_text(values)


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _call(function: bytes, argument: bytes) -> bytes:
    return b"\x80\x04c" + function + b"(" + argument + b"tR."


def _dtype(code: str, state: bytes = b"") -> bytes:
    return b"cnumpy\ndtype\n(" + _text(code) + b"\x89\x88tR" + state


_EMPTY = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btR"


def _array(dtype: bytes, content: bytes, length: bytes = b"K\x01") -> bytes:
    """As NumPy pickles one; `length` and `dtype` are pickled themselves."""
    return _EMPTY + b"(K\x01(" + length + b"t" + dtype + b"\x89C" + bytes([len(content)]) + content + b"tb."


# What NumPy's own reconstruction follows out of the file: a field far beyond its item, objects in place of numbers.
_FAR_FIELD = b"(" + _dtype("f8") + b"J\0\0\0\x40t"
_FIELDS = b"(K\x03" + _text("|") + b"N(" + _text("a") + b"t}" + _text("a") + _FAR_FIELD + b"sK\x08K\x01K\x10tb"
_OBJECTS = b"(K\x03" + _text("|") + b"NNNK\x08K\x08K\x3ftb"

CRAFTED = {
    "a command": _call(b"posix\nsystem\n", _text("false")),
    "another name of NumPy's": _call(b"numpy\nload\n", _text("x")),
    "a module of NumPy's that runs code": _call(b"numpy.testing._private.utils\nrunstring\n", _text("1") + b"}"),
    "an attribute by a path": b"\x80\x04" + _text("numpy") + _text("dtype.__init__.__globals__") + b"\x93.",
    "fields out of the item": _array(_dtype("V8", _FIELDS), b"\xff" * 8),
    "addresses as objects": _array(_dtype("O8", _OBJECTS), b"A" * 8),
    "an address of an object for a number": _array(_dtype("f8", _OBJECTS), b"A" * 4),
    "a shape larger than the bytes": _array(_dtype("f8"), b"\0" * 8, b"J\0\0\0\x7f"),
    "a shape below zero": _array(_dtype("f8"), b"", b"J\xff\xff\xff\xff"),
    "times": _array(_dtype("M8"), b"\0" * 8),
    "an array without content": _EMPTY + b".",
    "objects in an array with axes": pickle.dumps(np.array([1, "x"], dtype=object)),
    "a function whose parts are replaced": b"\x80\x04cnumpy\ndtype\nN}" + _text("__defaults__") + b"K\x01s\x86b.",
    "an object of a class": b"\x80\x04cnumpy\ndtype\n)\x81.",
    "an extension": b"\x80\x04\x82\x01.",
    "something from outside": b"\x80\x04" + _text("x") + b"Q.",
    "a set": pickle.dumps({1, 2}),
    "a number in decimal": b"I" + b"9" * 5000 + b"\n.",
    "room for many values": b"\x80\x04K\x01r\xff\xff\xff\x7f.",
    "a list that holds itself": b"\x80\x04]\x94h\x00a.",
    "an end without a value": b"\x80\x04.",
    "nothing": b"",
    "a text that is cut": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc",
    "bytes that are cut": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc",
    "a key that cannot be one": b"\x80\x04}]K\x01s.",
    "a value that was not remembered": b"\x80\x04h\x07.",
    "a dtype as a value": b"\x80\x04" + _dtype("f8") + b".",
    "a function as a value": b"\x80\x04cnumpy\ndtype\n.",
    "nested deeply": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
    "marks without an end": b"\x80\x04" + b"(" * 1000,
}


@pytest.mark.parametrize("content", CRAFTED.values(), ids=CRAFTED)
def test_what_is_more_than_data_is_refused(content):
    with pytest.raises(ValueError):
        read(content)


def test_few_lists_that_stand_for_millions_are_refused():
    doubled = b"\x80\x04]\x94" + b"".join(b"](" + bytes([ord("h"), i]) * 2 + b"e\x94" for i in range(60)) + b"."
    with pytest.raises(BudgetError, match="values"):
        read(doubled)


def test_one_array_that_is_named_often_counts_often():
    content = pickle.dumps([np.zeros(1000)] * 200, protocol=4)
    assert len(content) < 10_000
    with pytest.raises(BudgetError, match="the arrays would take 8,000 bytes"):
        read(content)


@given(st.data())
def test_a_damaged_pickle_is_a_value_error(data):
    content = bytearray(pickle.dumps({"a": np.arange(5.0), "b": [np.array("text"), (1, None)]}, protocol=4))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read(bytes(content))
