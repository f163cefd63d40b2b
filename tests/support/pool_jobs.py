"""Jobs and a pool that loses a worker, in a file of their own: what workers import to run them should be little."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openpi.shared.pools import Pool


def doubled(number: int) -> int:
    if number < 0:
        raise KeyError(f"{number} has no double")
    return 2 * number


def killed(job: int) -> None:
    del job
    os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Deadly:
    """A pool whose second job is done and then takes its worker with it, once."""

    pool: Pool
    folder: Path

    def threads(self, num_jobs: int) -> int:
        return self.pool.threads(num_jobs)

    def each(self, function: Callable[[Any], Any], jobs: Any) -> Iterator[tuple[Any, Any]]:
        self.folder.mkdir(exist_ok=True)
        yield from self.pool.each(functools.partial(_with_a_death, self.folder, function), jobs)

    @property
    def has_killed(self) -> bool:
        return (self.folder / "second").exists()


def _with_a_death(folder: Path, function: Callable[[Any], Any], job: Any) -> Any:
    is_second = not _is_first(folder / "first") and _is_first(folder / "second")
    result = function(job)
    if is_second:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def _is_first(file: Path) -> bool:
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
