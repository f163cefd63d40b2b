"""The message encoding, byte for byte against the recordings, and safe against anything else."""

import base64
import collections
import contextlib
import hashlib
import json
import types

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import msgpack
import numpy as np
import pytest

from openpi_client import msgpack_numpy
from openpi_client.message_budget import check_budget
from plain_values import LEAVES, TREES

ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, OverflowError)}

# Objects behind `refused_on_encode`, by name.
REFUSED = {
    "array_object": np.array([object()]),
    "array_complex64": np.zeros(2, np.complex64),
    "scalar_complex128": np.complex128(1j),
    "array_structured": np.zeros(2, [("a", "<i4")]),
    "array_void": np.zeros(2, "V4"),
    "array_bfloat16": np.zeros(2, ml_dtypes.bfloat16),
    "python_set": {1, 2},
    "python_complex": 1j,
    "int_too_big": 2**64,
    "custom_object": object(),
}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "wire" / "openpi"


@pytest.fixture(scope="module")
def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def built(node: dict):
    """The object that a description tree of the manifest stands for; None where the data is only a hash."""
    kind = node["kind"]
    if kind == "nil":
        return None
    if kind == "array":
        return [built(item) for item in node["items"]]
    if kind == "map":
        return {built(key): built(value) for key, value in node["items"]}
    if kind == "float64":
        return float.fromhex(node["hex"])
    if kind == "bin":
        return base64.b64decode(node["b64"])
    if kind == "ndarray":
        data = base64.b64decode(node["data_b64"])
        return np.frombuffer(data, node["dtype"]).reshape(node["shape"])
    if kind == "npscalar":
        return np.dtype(node["dtype"]).type(_literal(node["value"]))
    return {"bool": bool, "int": int, "str": str}[kind](node["value"])


def _literal(text: str):
    return {"True": True, "False": False}.get(text) if text in ("True", "False") else float(text)


def has_all_data(node: dict) -> bool:
    if node["kind"] == "ndarray":
        return node.get("data_b64") is not None
    if node["kind"] == "map":
        return all(has_all_data(value) for _, value in node["items"])
    return all(has_all_data(item) for item in node.get("items", []))


def assert_is(value, node: dict) -> None:
    """The decoded `value` is what the tree says: type, dtype with byte order, shape, bytes, key order."""
    kind = node["kind"]
    if kind == "ndarray":
        assert type(value) is np.ndarray and value.dtype.str == node["dtype"] and list(value.shape) == node["shape"]
        assert hashlib.sha256(value.tobytes()).hexdigest() == node["sha256"]
        assert not value.flags.writeable
    elif kind == "npscalar":
        assert isinstance(value, np.generic) and value.dtype.str == node["dtype"]
        assert value.item() == _literal(node["value"])
    elif kind == "array":
        assert type(value) is list and len(value) == len(node["items"])
        for item, child in zip(value, node["items"], strict=True):
            assert_is(item, child)
    elif kind == "map":
        assert type(value) is dict and len(value) == len(node["items"])
        for (key, item), (key_node, child) in zip(value.items(), node["items"], strict=True):
            assert_is(key, key_node)
            assert_is(item, child)
    else:
        expected = built(node)
        assert type(value) is type(expected)
        assert value == expected or (value != value and expected != expected)


def test_recorded_messages_decode_to_what_was_sent(folder, manifest):
    assert len(manifest["cases"]) > 50
    for case in manifest["cases"]:
        assert_is(msgpack_numpy.unpackb((folder / case["file"]).read_bytes()), case["decoded"])


def test_messages_are_encoded_to_the_recorded_bytes(folder, manifest):
    rebuilt = [case for case in manifest["cases"] if has_all_data(case["decoded"])]
    assert len(rebuilt) > 50
    for case in rebuilt:
        packed = msgpack_numpy.packb(built(case["decoded"]))
        assert packed == (folder / case["file"]).read_bytes(), case["name"]


def test_decoding_and_encoding_again_gives_the_same_bytes(folder, manifest):
    for case in manifest["cases"]:
        recorded = (folder / case["file"]).read_bytes()
        assert msgpack_numpy.packb(msgpack_numpy.unpackb(recorded)) == recorded, case["name"]


def test_recorded_refusals_on_encode_are_refused_with_the_same_type(manifest):
    for case in manifest["refused_on_encode"]:
        with pytest.raises(
            {"ValueError": ValueError, "TypeError": TypeError, "OverflowError": OverflowError}[case["result"]["error"]]
        ):
            msgpack_numpy.packb({"value": REFUSED[case["name"]]})


def test_recorded_refusals_on_decode_are_refused(folder, manifest):
    for case in manifest["refused_on_decode"]:
        with pytest.raises((ValueError, TypeError, KeyError)):
            msgpack_numpy.unpackb((folder / case["file"]).read_bytes())


def test_bfloat16_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="bfloat16; convert it to float32"):
        msgpack_numpy.packb(np.zeros(3, ml_dtypes.bfloat16))


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[::-1, ::2], lambda a: a.T])
@pytest.mark.parametrize("side", [4, 200])
def test_any_memory_order_travels_in_c_order(make, side):
    array = make(np.arange(side * side * 2, dtype=np.float32).reshape(side, -1))
    decoded = msgpack_numpy.unpackb(msgpack_numpy.packb(array))
    np.testing.assert_array_equal(decoded, array)
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize(
    ("name", "data", "dtype", "shape"),
    [
        ("object pointers", bytes(8), "|O", [1]),
        ("structured", bytes(8), "<f4,<f4", [1]),
        ("subarray", bytes(12), "(3,)f4", [1]),
        ("complex", bytes(8), "<c8", [1]),
        ("not text", bytes(8), 4, [1]),
        ("negative shape", bytes(8), "<f4", [-2]),
        ("overflowing shape", bytes(8), "<f4", [2**62, 2**62]),
        ("longer than the shape", bytes(8), "<f4", [1]),
        ("text data", "abcd", "<f4", [1]),
        ("float shape", bytes(8), "<f4", [2.0]),
    ],
)
def test_damaged_array_maps_are_refused(name, data, dtype, shape):
    message = msgpack_numpy.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})
    with pytest.raises((ValueError, TypeError)):
        msgpack_numpy.unpackb(message)


def test_a_scalar_map_cannot_smuggle_in_an_array():
    message = msgpack_numpy.packb({b"__npgeneric__": True, b"data": [1.0, 2.0], b"dtype": "<f4"})
    with pytest.raises(TypeError, match="list"):
        msgpack_numpy.unpackb(message)


@pytest.mark.parametrize("unit", ["ns", "s"])
def test_datetime_arrays_keep_their_unit(unit):
    times = np.arange(3).astype(f"M8[{unit}]")
    np.testing.assert_array_equal(msgpack_numpy.unpackb(msgpack_numpy.packb(times)), times)


@hypothesis.given(TREES)
def test_every_tree_of_arrays_and_values_survives_the_wire(tree):
    decoded = msgpack_numpy.unpackb(msgpack_numpy.packb(tree))
    np.testing.assert_equal(decoded, tree)
    assert msgpack_numpy.packb(decoded) == msgpack_numpy.packb(tree)


@hypothesis.given(data=st.data())
def test_damaged_messages_raise_ordinary_errors_only(folder, data):
    files = sorted(folder.glob("*.bin"))
    message = bytearray(data.draw(st.sampled_from(files)).read_bytes()[:600])
    for _ in range(data.draw(st.integers(1, 4))):
        if message:
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        msgpack_numpy.unpackb(bytes(message))


def test_the_hooks_work_with_plain_msgpack(folder):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = msgpack.packb({"a": array}, default=msgpack_numpy.pack_array)
    assert packed == msgpack_numpy.packb({"a": array})
    np.testing.assert_equal(msgpack.unpackb(packed, object_hook=msgpack_numpy.unpack_array), {"a": array})


def test_the_packer_and_unpacker_classes_stream_messages():
    packer, unpacker = msgpack_numpy.Packer(), msgpack_numpy.Unpacker()
    messages = [{"a": np.arange(3)}, {"b": np.float32(0.5)}]
    for message in messages:
        unpacker.feed(packer.pack(message))
    np.testing.assert_equal(list(unpacker), messages)


# What other programs pack


def foreign(array, key=lambda name: name.encode(), kind=b"") -> dict:
    """As the package `msgpack-numpy` marks it."""
    data = {"nd": True, "type": array.dtype.str, "kind": kind, "shape": array.shape, "data": array.tobytes()}
    return {key(name): value for name, value in data.items()}


@pytest.mark.parametrize("key", [str.encode, str])
@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.zeros((0, 3), np.uint8), np.array(True)])
def test_arrays_of_the_package_msgpack_numpy_are_read(array, key):
    decoded = msgpack_numpy.unpackb(msgpack.packb({"a": foreign(array, key)}))["a"]
    np.testing.assert_array_equal(decoded, array)
    assert decoded.dtype == array.dtype and decoded.shape == array.shape and not decoded.flags.writeable


def test_scalars_of_the_package_msgpack_numpy_are_read():
    item = {b"nd": False, b"type": "<f4", b"data": np.float32(0.5).tobytes()}
    decoded = msgpack_numpy.unpackb(msgpack.packb(item))
    assert type(decoded) is np.float32 and decoded == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({b"kind": b"O", b"data": b"\x80\x04."}, "an array of objects"),
        ({b"kind": b"V", b"type": [["a", "<f4"]]}, "a structured array"),
        ({b"kind": b"?"}, "an array of unknown kind"),
        ({b"type": [["a", "<f4"]]}, "an array of unknown kind"),
        ({b"type": "|O"}, "Unsupported dtype"),
        ({b"type": "<c8", b"shape": [1]}, "Unsupported dtype"),
        ({b"type": "<f4,<f4", b"shape": [1]}, "is not the text of a NumPy dtype"),
        ({b"shape": [-2]}, r"of shape \[-2\]"),
        ({b"shape": [2**62, 2**62]}, "the message holds 8 in all"),
        ({b"shape": [3]}, "the message holds 8 in all"),
        ({b"shape": [True, 2]}, "expected a list of whole numbers"),
        ({b"data": "12345678"}, "data of an array are a str"),
    ],
)
def test_what_of_them_is_no_plain_data_is_refused(changes, message):
    item = {**foreign(np.zeros(2, np.float32)), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        msgpack_numpy.unpackb(msgpack.packb(item))


def test_complex_numbers_are_refused_and_maps_that_only_look_like_arrays_stay_maps():
    with pytest.raises(ValueError, match="complex number"):
        msgpack_numpy.unpackb(msgpack.packb({b"complex": True, b"data": "(1+2j)"}))
    for item in ({"nd": 1}, {"complex": True}, {"nd": True, "type": "x", "data": b"", "more": 1}):
        assert msgpack_numpy.unpackb(msgpack.packb(item)) == item


@pytest.mark.parametrize(
    ("dtype", "data"), [("|S1", 2**40), ("<U1", 2**40), ("<f4", "1.0"), ("|b1", "yes"), ("<i4", 0.5), ("|O", 1)]
)
def test_a_scalar_holds_what_its_dtype_holds(dtype, data):
    """NumPy would make as many zero bytes of a number as it says."""
    message = msgpack_numpy.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})
    with pytest.raises((TypeError, ValueError)):
        msgpack_numpy.unpackb(message)


def test_an_array_without_bytes_cannot_claim_a_shape():
    item = {b"__ndarray__": True, b"data": b"", b"dtype": "|S0", b"shape": [2**40]}
    with pytest.raises(ValueError, match="holds 0 in all"):
        msgpack_numpy.unpackb(msgpack.packb(item))


def test_mappings_of_any_kind_travel_as_maps():
    inner = types.MappingProxyType({"b": np.arange(3), "c": collections.ChainMap({"d": 1}, {"e": 2})})
    packed = msgpack_numpy.packb(types.MappingProxyType({"a": inner}))
    np.testing.assert_equal(msgpack_numpy.unpackb(packed), {"a": {"b": np.arange(3), "c": {"d": 1, "e": 2}}})
    with pytest.raises(TypeError, match="'a/x' cannot be sent"), msgpack_numpy.named_place({"a": {"x": {1}}}):
        msgpack_numpy.packb({"a": types.MappingProxyType({"x": {1}})})


# Budgets


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xdc\xff\xff" + b"\x80" * 65535, "more than 1000 values"),
        (b"\xc0" * 1001, "more than 1000 values"),
        (b"\xdd\xff\xff\xff\xff", "claims 4294967295 values, and has 5 bytes"),
        (b"\x92\xdf\x00\x00\x00\x08" + b"\x80" * 8, "claims 18 values, and has 14 bytes"),
        (b"\x91" * 33, "nested more than 32 deep"),
        (b"\x81\xa1a" * 33 + b"\x80", "nested more than 32 deep"),
    ],
)
def test_what_a_message_unpacks_to_is_counted_before(message, text):
    with pytest.raises(ValueError, match=text):
        check_budget(message, max_values=1000, max_depth=32)


@hypothesis.given(TREES | st.recursive(LEAVES, st.lists, max_leaves=50))
def test_a_message_within_its_budget_passes_and_one_value_less_does_not(tree):
    message = msgpack_numpy.packb(tree)
    num_values = count(msgpack.unpackb(message, strict_map_key=False))
    check_budget(message, max_values=num_values)
    with pytest.raises(ValueError, match="values"):
        check_budget(message, max_values=num_values - 1)


def count(value) -> int:
    if isinstance(value, dict):
        return 1 + sum(count(key) + count(item) for key, item in value.items())
    return 1 + sum(map(count, value)) if isinstance(value, list) else 1


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.binary(max_size=60))
def test_counting_anything_for_bytes_ends_and_raises_ordinary_errors_only(message):
    with contextlib.suppress(ValueError):
        check_budget(message, max_values=20, max_depth=2)
