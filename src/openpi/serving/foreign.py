"""Maps of other programs, as ours would have sent them: arrays of the package `msgpack-numpy`, arrays whose keys are
text (in JavaScript and C++ maps have no others; to published servers they are maps, which no policy takes), and keys
that are bytes.

Data only; what cannot be read is the client's to correct, and its session lives on.
"""

from openpi.policies.guards import ObservationError
from openpi_client import msgpack_numpy

_MARKERS = ("__ndarray__", "__npgeneric__", "__jpeg__")


def with_byte_marker(item: dict) -> dict:
    """The map; one that is marked in text as an array, with the keys that mark it among ours."""
    if any(item.get(marker) is True for marker in _MARKERS) and ("data" in item or "frames" in item):
        return {key.encode() if isinstance(key, str) else key: value for key, value in item.items()}
    return item


def read_map(item: dict) -> object:
    """The array or scalar that a map stands for, or the map with text keys.

    Raises:
        ObservationError: it is damaged, or holds something else than data.
    """
    try:
        value = msgpack_numpy.unpack_array(item)
    except (ValueError, TypeError, OverflowError) as error:
        raise ObservationError(f"a message cannot be read: {error}") from error
    except KeyError as error:
        raise ObservationError(f"a message cannot be read: an array lacks its {error}") from error
    return _with_text_keys(value) if isinstance(value, dict) else value


def _with_text_keys(item: dict) -> dict:
    """MessagePack of old, and programs that pack `bytes`, have names that are bytes."""
    if all(isinstance(key, str) for key in item):
        return item
    named = {_text(key): value for key, value in item.items()}
    if len(named) != len(item):
        raise ObservationError(f"a map has a key twice, as text and as bytes: {list(item)!r:.200}")
    return named


def _text(key: object) -> object:
    try:
        return key.decode() if isinstance(key, bytes) else key
    except UnicodeDecodeError:
        raise ObservationError(f"the key {key!r:.100} is no text; name values in UTF-8") from None
