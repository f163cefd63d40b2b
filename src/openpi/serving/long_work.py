"""Long work of the sessions' threads, one at a time in the whole process.

The interpreter runs one thread at a time, and decoding images takes a processor each: a robot's short message must not
compete with every long one that others have sent at the same time. These wait for each other.
"""

import threading

_ONE_AT_A_TIME = threading.Lock()


class LongWork:
    """Work that may turn out to be long. Use as a context manager, in one thread."""

    def __init__(self) -> None:
        self._has_begun = False

    def begin(self) -> None:
        """It is long: waits for that of other sessions. More than once is no harm."""
        if not self._has_begun:
            _ONE_AT_A_TIME.acquire()
            self._has_begun = True

    def __enter__(self) -> "LongWork":
        return self

    def __exit__(self, *_: object) -> None:
        if self._has_begun:
            self._has_begun = False
            _ONE_AT_A_TIME.release()
