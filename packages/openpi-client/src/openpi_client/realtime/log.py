"""What happened in an episode: `events.jsonl` as it happens; `ticks.npz`, `summary.json`, `timeline.svg` at its end.

events.jsonl   an object a line: time_s, tick, kind ("ask", "chunk", "hold", "stale", "warning" ...), its fields
ticks.npz      per tick: number, late_s, kind, chunk, age_s (of the observation), command [n, width]
"""

import contextlib
import datetime
import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, TextIO

import numpy as np

from openpi_client.realtime.clock import Clock, Tick
from openpi_client.realtime.controller import Command
from openpi_client.realtime.picture import timeline

logger = logging.getLogger(__name__)

KINDS = ("none", "hold", "blend", "row")

_TICK = np.dtype(
    [
        *(("number", np.int64), ("late_s", np.float64), ("skipped", np.int32), ("kind", np.int8)),
        *(("chunk", np.int64), ("age_s", np.float64), ("is_seam", np.bool_), ("jump", np.float64)),
    ]
)
# 5 minutes at 50 Hz, before more is allocated.
_FIRST_TICKS = 2**14
# What counts as one of the parts of an answer's time.
_PARTS = ("handover_ms", "resize_ms", "round_trip_ms", "server_ms", "merge_ms")


Event = Mapping[str, Any]


class EpisodeLog:
    """One episode."""

    def __init__(self, folder: Optional[Path], clock: Clock, width: int) -> None:
        """
        Args:
            folder: where to write; made if need be. None = the summary only, in memory.
        """
        self._folder, self._clock = folder, clock
        self._start_s = clock.now_s()
        self._started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._ticks = np.zeros(_FIRST_TICKS, _TICK)
        self._commands = np.full((_FIRST_TICKS, width), np.nan)
        self._count = 0
        self._tick = 0
        self.events: List[Dict[str, Any]] = []
        self._file: Optional[TextIO] = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            # A line at a time: what a robot's library has crashed in shall be there.
            self._file = (folder / "events.jsonl").open("w", buffering=1, encoding="utf-8")

    def event(self, kind: str, **fields: object) -> None:
        entry = {"time_s": round(self._clock.now_s() - self._start_s, 6), "tick": self._tick, "kind": kind, **fields}
        self.events.append(entry)
        with self._writing() as folder:
            if folder is not None and self._file is not None:
                self._file.write(json.dumps(entry, default=float) + "\n")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Optional[Path]]:
        """The folder; None = there is none. A full disk stops no robot: the rest of the log is in memory only."""
        try:
            yield self._folder
        except OSError as error:
            text = f"the log in {self._folder} is not written any further: {error.strerror or error}"
            self._folder = None
            self.event("warning", text=text)
            logger.error("%s", text)

    def begin_tick(self, tick: Tick) -> None:
        self._tick = tick.number
        if tick.skipped:
            self.event("skipped", ticks=tick.skipped)

    def end_tick(self, tick: Tick, command: Command, applied_s: float) -> None:
        """
        Args:
            applied_s: when the command was given to the robot.
        """
        if self._count == len(self._ticks):
            self._ticks = np.concatenate([self._ticks, np.zeros_like(self._ticks)])
            self._commands = np.concatenate([self._commands, np.full_like(self._commands, np.nan)])
        row = command.row
        age_s = math.nan if row is None else applied_s - row.observed_s
        chunk, kind = -1 if row is None else row.chunk, KINDS.index(command.kind)
        self._ticks[self._count] = (
            *(tick.number, tick.late_s, tick.skipped, kind),
            *(chunk, age_s, command.is_seam, command.jump),
        )
        if command.values is not None:
            self._commands[self._count] = command.values
        self._count += 1

    @property
    def ticks(self) -> np.ndarray:
        """Structured array [n], of all ticks so far."""
        return self._ticks[: self._count]

    @property
    def commands(self) -> np.ndarray:
        """float64[n, width]; NaN where nothing was commanded."""
        return self._commands[: self._count]

    def close(self, end: str, **facts: object) -> Dict[str, object]:
        """Writes the rest, and returns the summary."""
        self.event("end", reason=end)
        with self._writing() as folder:
            if folder is not None:
                np.savez(str(folder / "ticks.npz"), ticks=self.ticks, commands=self.commands)
        summary = {"end": end, "started": self._started, **facts, **summarize(self.ticks, self.commands, self.events)}
        with self._writing() as folder:
            if folder is not None:
                (folder / "summary.json").write_text(json.dumps(summary, indent=2, default=float) + "\n")
                picture = timeline(self.ticks, self.commands, self.events, summary)
                (folder / "timeline.svg").write_text(picture, encoding="utf-8")
        if self._file is not None:
            with contextlib.suppress(OSError):  # told already
                self._file.close()
        return summary


def summarize(ticks: np.ndarray, commands: np.ndarray, events: Sequence[Event]) -> Dict[str, object]:
    """The numbers of an episode. Times in ms, delays in ticks, jumps in the units of the actions."""
    kinds = Counter(event["kind"] for event in events)
    rows = ticks["kind"] == KINDS.index("row")
    first = int(np.argmax(rows)) if rows.any() else len(ticks)
    answered = [event for event in events if event["kind"] in ("chunk", "blend", "stale", "discarded", "too late")]
    return {
        "ticks": len(ticks),
        "rows_played": int(rows.sum()),
        "ticks_skipped": int(ticks["skipped"].sum()),
        "ticks_skipped_after_start": int(ticks["skipped"][first:].sum()),
        "ticks_without_row_after_start": int((~rows[first:]).sum()),
        "tick_error_ms": quantiles(1e3 * ticks["late_s"]),
        "oldest_row_s": float(np.nanmax(ticks["age_s"])) if rows.any() else None,
        "holds": kinds["hold"],
        "prompts": list(dict.fromkeys(event["prompt"] for event in events if "prompt" in event)),
        "stops": kinds["stop"],
        "asked": kinds["ask"],
        **{kind.replace(" ", "_"): kinds[kind] for kind in ("chunk", "failed", "stale", "discarded", "too late")},
        "clamped": kinds["clamped"],
        "delay_ticks": dict(sorted(Counter(event["delay_ticks"] for event in answered).items())),
        "latency_ms": {
            "whole": quantiles([1e3 * event["age_s"] for event in answered]),
            **{part: quantiles([e[part] for e in answered if part in e]) for part in _PARTS},
        },
        "seams": _seams(ticks, commands),
        "warnings": [event["text"] for event in events if event["kind"] == "warning"],
    }


def quantiles(values: object) -> Optional[Dict[str, float]]:
    values = np.asarray(values, np.float64)
    if len(values) == 0:
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(values.max())}


def _seams(ticks: np.ndarray, commands: np.ndarray) -> Dict[str, object]:
    """Jumps from chunk to chunk while playing, and how large they are beside the steps within chunks."""
    if len(ticks) < 2:
        return {"count": 0, "jump": None, "jump_over_step": None}
    played = ticks["kind"] == KINDS.index("row")
    goes_on = played[1:] & played[:-1]
    seams = goes_on & ticks["is_seam"][1:]
    steps = np.abs(np.diff(commands, axis=0)).max(axis=1)[goes_on & ~ticks["is_seam"][1:]]
    jumps = ticks["jump"][1:][seams]
    step = float(steps.mean()) if len(steps) else 0.0
    ratio = float(jumps.mean() / step) if len(jumps) and step > 0 else None
    return {"count": len(jumps), "jump": quantiles(jumps), "jump_over_step": ratio}
