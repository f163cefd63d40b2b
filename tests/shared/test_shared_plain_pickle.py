"""A published recording is a pickle: what NumPy writes for arrays is read, and nothing else is carried out."""

import contextlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crafted_pickles import CRAFTED
from openpi.shared import plain_pickle
from openpi.shared.budgets import Budget, BudgetError
from plain_values import PLAIN

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
