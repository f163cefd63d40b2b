"""A folder beside a dataset for what is prepared for it, used by one conversion at a time."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import TracebackType

from openpi.shared.locks import FileLock, HeldElsewhereError

logger = logging.getLogger(__name__)

_LOCK = "lock"


class WorkFolder:
    """`.<name>.converting` beside `output`. A context manager: while it is entered, nobody else has it.

    What is in it stays after an error, for the next run; after a success it is removed.

    Attributes:
        path: the folder.
    Raises:
        ValueError: another conversion is using it.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(f".{output.name}.converting")
        self._output = output

    def __enter__(self) -> WorkFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / _LOCK)
        try:
            self._lock.acquire(wait=False)
        except HeldElsewhereError as error:
            raise ValueError(
                f"another conversion is writing {self._output}; wait for it, or choose another folder "
                f"({error.strerror})"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Hashes alone are no work to go on with.
        is_empty = all(path.name.startswith(_LOCK) or path.suffix == ".json" for path in self.path.iterdir())
        if kind is None or is_empty:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            logger.info("what is prepared is kept in %s: the same command goes on from there", self.path)
        self._lock.release()
