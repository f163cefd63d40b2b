"""A folder beside a dataset for what is prepared for it, used by one conversion at a time."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger("openpi")

_PLAN, _LOCK = "plan.json", "lock"


class WorkFolder:
    """`.<name>.converting` beside `output`. A context manager: while it is entered, nobody else has it.

    Args:
        plan: what the work depends on. Work of another plan is thrown away.
    Raises:
        ValueError: another conversion is using it.
    """

    def __init__(self, output: Path, plan: Mapping[str, Any]):
        self._folder = output.with_name(f".{output.name}.converting")
        self._output = output
        self._plan = json.dumps(plan, indent=2, sort_keys=True)

    def place(self, name: str) -> Path:
        """Where something of that name is, or goes."""
        return self._folder / name

    def remove(self) -> None:
        shutil.rmtree(self._folder)

    def __enter__(self) -> WorkFolder:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self._folder / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ValueError(
                f"another conversion is writing {self._output}; wait for it, or choose another folder"
            ) from None
        self._forget_other_plans()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()
        if kind is not None and self._folder.exists():
            logger.info("what is prepared is kept in %s: the same command goes on from there", self._folder)

    def _forget_other_plans(self) -> None:
        plan = self._folder / _PLAN
        prepared = [path for path in self._folder.iterdir() if path.is_dir()]
        if plan.is_file() and plan.read_text(encoding="utf-8") == self._plan:
            logger.info("going on with %d prepared episodes", len([p for p in prepared if not p.suffix]))
            return
        for path in prepared:
            shutil.rmtree(path)
        plan.write_text(self._plan, encoding="utf-8")
