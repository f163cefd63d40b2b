"""Recordings that are more than data, as a pickle can say it."""

import pickle
import struct

import numpy as np


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

_TIMES = b"(K\x04" + _text("<") + b"NNNK\x08K\x08K\0N(C\x04ns],K\x01K\x01K\x01t\x86tb"

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
    "times of a unit that there is not": _array(_dtype("M8", _TIMES), b"\0" * 8),
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
