"""What a MessagePack message would unpack to, counted before anything of it is built.

A megabyte can hold a million empty maps, or claim arrays of any length. What is counted are the first bytes of values,
one after the other; which value lies in which is of interest only where there are many maps and arrays.
"""

from typing import Any, Dict, List, Optional, Tuple

# Far more than any observation or answer holds: a camera image as nested lists is 150,000.
MAX_VALUES = 2**20
MAX_DEPTH = 64

# By first byte: how many bytes the value takes; 0 = it holds values, or its size follows, in one byte for _SHORT.
_SHORT = -1
_TAKES: List[int] = [1] * 0x80 + [0] * 0x20 + [1 + size for size in range(0x20)] + [0] * 0x20 + [1] * 0x20
_TAKES[0xC0:0xC4] = [1, 1, 1, 1]  # nil, never used (msgpack refuses it), false, true
_TAKES[0xCA:0xD9] = [5, 9, 2, 3, 5, 9, 2, 3, 5, 9, 3, 4, 6, 10, 18]  # float, uint, int, ext of fixed size

_TAKES[0xC4] = _TAKES[0xD9] = _SHORT

# By first byte: (bytes of the size that follows, bytes behind it that it does not count, values each unit stands for).
_SIZES: Dict[int, Tuple[int, int, int]] = {
    0xC4: (1, 0, 0),  # bin
    0xC5: (2, 0, 0),
    0xC6: (4, 0, 0),
    0xC7: (1, 1, 0),  # ext
    0xC8: (2, 1, 0),
    0xC9: (4, 1, 0),
    0xD9: (1, 0, 0),  # str
    0xDA: (2, 0, 0),
    0xDB: (4, 0, 0),
    0xDC: (2, 0, 1),  # array
    0xDD: (4, 0, 1),
    0xDE: (2, 0, 2),  # map
    0xDF: (4, 0, 2),
}


def check_budget(message: Any, *, max_values: int = MAX_VALUES, max_depth: int = MAX_DEPTH) -> None:
    """Raises ValueError for a message that holds more, or claims more values than it has bytes.

    Args:
        message: bytes, or any contiguous memory.
        max_values: keys and values, at any depth.
    """
    view = memoryview(message).cast("B")
    size, at, claimed, num_nested = len(view), 0, 0, 0
    for _ in range(max_values):
        if at >= size:
            break
        first = view[at]
        takes = _TAKES[first]
        if takes > 0:
            at += takes
        elif takes == _SHORT and at + 1 < size:
            at += 2 + view[at + 1]
        elif first < 0xA0:
            claimed += first & 0x0F if first >= 0x90 else 2 * (first & 0x0F)
            num_nested += 1
            at += 1
        else:
            num_bytes, count, at = _header(view, at)
            at += num_bytes
            if count is not None:
                claimed += count
                num_nested += 1
    if claimed > size:
        raise ValueError(f"the message claims {claimed} values, and has {size} bytes")
    if at < size:
        raise ValueError(f"the message holds more than {max_values} values")
    if num_nested > max_depth:
        _check_depth(view, max_depth)


def _header(view: memoryview, at: int) -> Tuple[int, Optional[int], int]:
    """(bytes behind the header, values in it or None, where the header ends), of what `_TAKES` does not know."""
    first = view[at]
    if first < 0xA0:
        return 0, first & 0x0F if first >= 0x90 else 2 * (first & 0x0F), at + 1
    size_bytes, beside, per_unit = _SIZES[first]
    end = at + 1 + size_bytes
    size = int.from_bytes(view[at + 1 : end], "big")
    return (0, size * per_unit, end) if per_unit else (size + beside, None, end)


def _check_depth(view: memoryview, max_depth: int) -> None:
    size, at, left = len(view), 0, 1
    outer: List[int] = []  # values that are still to come, of each map or array around this one
    while at < size:
        while left == 0:
            if not outer:
                return  # msgpack refuses what comes behind
            left = outer.pop()
        left -= 1
        takes = _TAKES[view[at]]
        if takes > 0:
            at += takes
            continue
        num_bytes, count, at = _header(view, at)
        at += num_bytes
        if count:
            if len(outer) >= max_depth:
                raise ValueError(f"the message is nested more than {max_depth} deep")
            outer.append(left)
            left = count
