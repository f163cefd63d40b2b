"""Arrays as the index's package `msgpack-numpy` marks them, read as data only:

    array          -> map  nd: true, type: dtype text, kind: "", shape: [int, ...], data: bin (C order)
    NumPy scalar   -> map  nd: false, type: dtype text, data: bin
    complex        -> map  complex: true, data: text

Its keys are bytes, or text when it packed for the old MessagePack. It also pickles arrays of objects (kind "O") and
describes structured ones (kind "V"): those are refused.
"""

from typing import Any, Dict, Optional, Tuple

_ARRAY_KEYS = frozenset(("nd", "type", "data"))
_COMPLEX_KEYS = frozenset(("complex", "data"))
_ALL_KEYS = frozenset(("nd", "type", "kind", "shape", "data"))


def foreign_array(item: Dict[object, object]) -> Optional[Tuple[str, object, Any]]:
    """(dtype text, shape, bytes) of a map that is such an array; a scalar's shape is None. None for any other map.

    Raises:
        ValueError, TypeError: such a map whose value this format does not carry.
    """
    if b"nd" not in item and b"complex" not in item and "nd" not in item and "complex" not in item:
        return None
    named = {_text(key): value for key, value in item.items()}
    if named.keys() == _COMPLEX_KEYS and named["complex"] is True:
        raise ValueError("the message holds a complex number; policies take real ones")
    if not _ARRAY_KEYS <= named.keys() <= _ALL_KEYS or len(named) != len(item):
        return None
    kind, text = _text(named.get("kind", "")), _text(named["type"])
    if kind != "" or not isinstance(text, str):
        what = {"O": "an array of objects (a pickle)", "V": "a structured array"}.get(kind, "an array of unknown kind")
        raise ValueError(f"the message holds {what}; only arrays of numbers and of text are taken")
    if not isinstance(named["data"], (bytes, memoryview)):
        raise TypeError(f"the data of an array are a {type(named['data']).__name__}; expected bytes")
    if named["nd"] is True:
        return text, named.get("shape", ()), named["data"]
    return text, None, named["data"]


def _text(value: object) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
