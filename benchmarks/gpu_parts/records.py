"""Results: figures with their spread, appended to a file as they come."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = "records.jsonl"


def figure(values: float | Sequence[float], unit: str) -> dict[str, Any]:
    """A measured number with its spread; one value has none."""
    found = np.atleast_1d(np.asarray(values, np.float64))
    low, p50, p99, high = np.percentile(found, [0, 50, 99, 100])
    return {"unit": unit, "n": len(found), "min": low, "p50": p50, "p99": p99, "max": high}


def times_ms(
    call: Callable[[], Any],
    *,
    seconds: float,
    at_most: int = 300,
    at_least: int = 5,
    before: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Of calls that return when they are done; the first one is not counted, nor is what comes `before` each."""
    before()
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < at_least or (time.perf_counter() - started < seconds and len(times) < at_most):
        before()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


class Records:
    """The file of a run's results, one JSON object a line, written by one process at a time.

    Attributes:
        folder: where else a part may leave what is too much for a line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / RECORDS

    def write(self, part: str, case: str = "", **fields: Any) -> None:
        """Appends a record; of two with the same part and case the later one counts."""
        line = json.dumps({"part": part, "case": case, **fields})
        with self._file.open("a") as file:
            file.write(line + "\n")
        print(line[:2000], flush=True)

    def read(self) -> list[dict[str, Any]]:
        """The records that count, in the order in which their parts first came; a line cut short is left out."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self._file.read_text().splitlines() if self._file.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # whoever wrote it was killed
                continue
            found[record["part"], record["case"]] = record
        return list(found.values())
