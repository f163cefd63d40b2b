"""Values that are data and nothing else, drawn by hypothesis; and what damaged ones may raise."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

# What a session answers with an error; anything else would end its thread.
ORDINARY = (ValueError, TypeError, KeyError, OverflowError)

PLAIN = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes()
    | hnp.unsigned_integer_dtypes()
    | hnp.floating_dtypes(sizes=(16, 32, 64))
    | hnp.unicode_string_dtypes(max_len=9)
    | hnp.byte_string_dtypes(max_len=9)
)

DTYPES = [
    np.dtype(text)
    for text in "<f2 <f4 >f8 |u1 |i1 <i2 >i4 <i8 <u2 <u8 |b1 <U3 |S2 <M8[ns]".split()  # noqa: SIM905
]
ARRAYS = hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary() | ARRAYS,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)
