"""What a run says while it runs: a bar on terminals, a line per log interval everywhere."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openpi.training.backend import STEPS_IN_FLIGHT, Metric

logger = logging.getLogger(__name__)

_REPORTS_FOR_TIME_LEFT = 20
_SHOWN = ("loss", "grad_norm", "param_norm", "learning_rate", "samples_per_s", "data_wait")


class Progress:
    """Counts steps; `with` it around the loop.

    Args:
        is_shown: of several processes one has the bar.
    """

    def __init__(self, *, num_steps: int, start: int, is_shown: bool = True) -> None:
        import rich
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[rate]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=rich.get_console(),
            disable=not (is_shown and rich.get_console().is_terminal),
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=start, rate="")
        self._num_steps, self._times = num_steps, deque[tuple[int, float]](maxlen=_REPORTS_FOR_TIME_LEFT)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            self._bar.stop()

    def step_done(self) -> None:
        self._bar.advance(self._task)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._bar.update(self._task, rate=f"{metrics.get('samples_per_s', 0):.1f} samples/s")
        shown = {name: metrics[name] for name in _SHOWN if name in metrics} or metrics
        text = ", ".join(f"{name}={value:.4g}" for name, value in shown.items())
        logger.info("Step %d: %s%s", step, text, self._time_left(step))

    def _time_left(self, step: int) -> str:
        """By the last reports, validations and checkpoints between them included; nothing before there are two."""
        if not self._times or self._times[-1][0] < step:
            self._times.append((step, time.perf_counter()))
        (first, since), (last, now) = self._times[0], self._times[-1]
        left = self._num_steps - 1 - last
        if last == first or left <= 0:
            return ""
        seconds = round(left * (now - since) / (last - first))
        return f", {datetime.timedelta(seconds=seconds)} left"


class Stopwatch:
    """Throughput since the last reading."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def read(self, *, samples: int, waited_s: float) -> dict[str, float]:
        """Samples per second, and the share of the time spent waiting for data; both since the last call.

        Args:
            waited_s: total waiting time so far.
        """
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        rates = {"samples_per_s": samples / elapsed, "data_wait": (waited_s - self._waited_s) / elapsed}
        self._since, self._waited_s = now, waited_s
        return rates

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


class Window:
    """Metrics of the steps since the last report, not read until they are asked for.

    Args:
        wait: as of `Backend`.
    """

    def __init__(self, wait: Callable[[Mapping[str, Metric]], None]) -> None:
        self._wait = wait
        self._steps: list[Mapping[str, Any]] = []
        self._in_flight: deque[Mapping[str, Any]] = deque()

    def add(self, metrics: Mapping[str, object]) -> None:
        """Also keeps the host from running ahead of the device by more than `STEPS_IN_FLIGHT`, so that times measured
        between reports are those of the device, and a request to stop, or an error, is noticed within these steps.
        """
        self._steps.append(metrics)
        self._in_flight.append(metrics)
        if len(self._in_flight) > STEPS_IN_FLIGHT:
            self._wait(self._in_flight.popleft())

    def values(self) -> list[dict[str, float]]:
        """Per step, as plain numbers; waits for the device."""
        self._steps = [{name: float(value) for name, value in metrics.items()} for metrics in self._steps]
        return [dict(metrics) for metrics in self._steps]

    def means(self) -> dict[str, float]:
        """Means since the last call, which start the next window; empty without steps."""
        steps, self._steps = self.values(), []
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]} if steps else {}

    def restore(self, values: list[dict[str, float]]) -> None:
        """Inverse of `values`: a resumed run reports the same means as one that never stopped."""
        self._steps = list(values)

    def __len__(self) -> int:
        return len(self._steps)
