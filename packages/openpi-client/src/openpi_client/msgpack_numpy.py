"""MessagePack with NumPy arrays: the encoding of every message between a robot and a policy server.

    array         -> map  b"__ndarray__": true, b"data": bin (C order), b"dtype": str, b"shape": [int, ...]
    NumPy scalar  -> map  b"__npgeneric__": true, b"data": native value, b"dtype": str

The marker keys are bytes, so a map with text keys of the same spelling stays an ordinary map. dtype text is
NumPy's `dtype.str` ('<f4', '|u1'). The format carries data only: object, structured and complex arrays are
refused in both directions. Tuples arrive as lists. `float64` and `str_` scalars are Python floats and
strings, and travel as such. Mappings of any kind travel as maps.

Messages of the index's package `msgpack-numpy` are read, too (`foreign_arrays`), and never written.
"""

import contextlib
import functools
import math
import re
from typing import Any, Dict, Iterator, Mapping

import msgpack
import numpy as np

from openpi_client.foreign_arrays import foreign_array
from openpi_client.message_budget import check_budget

_NDARRAY = b"__ndarray__"
_SCALAR = b"__npgeneric__"

# Kinds of dtype whose bytes mean nothing outside the process (object, variable-width string), or that the
# format does not define. NumPy reports bfloat16 as void ('V').
_REFUSED_KINDS = "OTcV"

# Plain type names only: NumPy would also parse structured types out of "f4,f4" or "(3,)f4", and warns of "a".
_DTYPE_TEXT = re.compile(r"[<>|=]?(?!a\d*$)[A-Za-z]\w*(\[\w+\])?")

# Up to this size one copy into `bytes` is cheaper than setting up a view of the array's memory.
_SMALL_NBYTES = 4096


def c_bytes(array: np.ndarray) -> object:
    """The array's bytes in C order; a view of its memory when that is large and already in C order."""
    if array.nbytes <= _SMALL_NBYTES:
        return array.tobytes()
    # The detour over uint8 lets dtypes that have no buffer format (datetime64) share their memory too.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def pack_array(obj: object) -> object:
    """What MessagePack packs in place of an object it does not know.

    Raises:
        ValueError: an array or scalar of object, complex or void (structured, bfloat16) dtype.
    """
    if isinstance(obj, np.ndarray):
        _check_kind(obj.dtype)
        return {_NDARRAY: True, b"data": c_bytes(obj), b"dtype": obj.dtype.str, b"shape": obj.shape}
    if isinstance(obj, np.generic):
        _check_kind(obj.dtype)
        return {_SCALAR: True, b"data": obj.item(), b"dtype": obj.dtype.str}
    if isinstance(obj, Mapping):
        return dict(obj)
    return obj  # MessagePack then raises its TypeError, which names the type.


@contextlib.contextmanager
def named_place(content: object) -> Iterator[None]:
    """Errors of packing `content` within the block stay what they are, and say where in it the value is.

    Raises:
        TypeError, ValueError, OverflowError: the wire cannot carry a value.
    """
    try:
        yield
    except (TypeError, ValueError, OverflowError) as error:
        place = _unpackable(content, "")
        if not place:
            raise
        kind = type(error) if type(error) in (TypeError, OverflowError) else ValueError
        raise kind(f"'{place}' cannot be sent: {error}; send numbers, text, NumPy arrays, or maps and lists") from error


def _unpackable(content: object, path: str) -> str:
    """Where the first value is that cannot be packed: its keys and positions, joined with '/'."""
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    for key, value in items:
        try:
            packb({key: value} if isinstance(content, Mapping) else value)
        except (TypeError, ValueError, OverflowError):
            inner = f"{path}/{key}" if path else str(key)
            return _unpackable(value, inner)
    return path


def unpack_array(obj: Dict[object, Any]) -> Any:
    """Inverse of `pack_array` for one decoded map; maps without a marker pass through.

    Arrays are read-only views of the received bytes.
    """
    if _NDARRAY in obj:
        return _array(obj[b"data"], _dtype(obj[b"dtype"]), obj[b"shape"])
    if _SCALAR in obj:
        return _scalar(obj[b"data"], _dtype(obj[b"dtype"]))
    foreign = foreign_array(obj)
    if foreign is None:
        return obj
    dtype, shape, data = foreign
    return _array(data, _dtype(dtype), () if shape is None else shape)[() if shape is None else ...]


def _array(data: bytes, dtype: np.dtype, shape: object) -> np.ndarray:
    if not isinstance(shape, (list, tuple)) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"array of shape {shape!r:.100}; expected a list of whole numbers")
    if len(data) != dtype.itemsize * math.prod(shape) or dtype.itemsize == 0:
        raise ValueError(
            f"array of shape {shape!r:.100} and dtype {dtype.str} takes {dtype.itemsize} bytes for each value, but the "
            f"message holds {len(data)} in all"
        )
    return np.ndarray(buffer=data, dtype=dtype, shape=shape)


# What a scalar of each kind of dtype may hold: bytes_(2**40), say, would be a terabyte of zeros.
_SCALAR_TYPES = {"b": bool, "i": int, "u": int, "f": (int, float), "S": bytes, "U": str, "m": int, "M": int}


def _scalar(data: object, dtype: np.dtype) -> np.generic:
    if not isinstance(data, _SCALAR_TYPES[dtype.kind]):
        raise TypeError(f"scalar of dtype {dtype.str} cannot hold a {type(data).__name__}")
    if dtype.kind in "mM":  # The unit is part of the dtype, not of the scalar type.
        return np.array([data], dtype)[0]
    return dtype.type(data)


@functools.lru_cache(maxsize=256)
def _dtype(text: str) -> np.dtype:
    if not isinstance(text, str) or not _DTYPE_TEXT.fullmatch(text):
        raise TypeError(f"dtype {text!r} is not the text of a NumPy dtype, such as '<f4'")
    dtype = np.dtype(text)
    _check_kind(dtype)
    return dtype


def _check_kind(dtype: np.dtype) -> None:
    if dtype.kind in _REFUSED_KINDS:
        hint = "; convert it to float32 first" if dtype.name == "bfloat16" else ""
        raise ValueError(f"Unsupported dtype: {dtype}{hint}")


# The names of the msgpack package, with arrays.
# Bad input raises ValueError, TypeError, KeyError or OverflowError.
Packer = functools.partial(msgpack.Packer, default=pack_array)
Unpacker = functools.partial(msgpack.Unpacker, object_hook=unpack_array)


def packb(value: object, **options: object) -> bytes:
    """As `msgpack.packb`, with arrays."""
    packed = msgpack.packb(value, **{"default": pack_array, **options})
    assert packed is not None  # only a packer that is told to keep what it has gives nothing
    return packed


def unpackb(packed: object, **options: object) -> Any:
    """As `msgpack.unpackb`, with arrays.

    Raises:
        ValueError: the message also would unpack to more than `message_budget` allows.
    """
    check_budget(packed)
    return msgpack.unpackb(packed, **{"object_hook": unpack_array, **options})
