"""`<run>/report.html`: a run on one page, which needs nothing beside it; written anew while the run goes on."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openpi.shared import page, whole_file
from openpi.shared.charts import Line, line_chart, smooth
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.training.run.run_directory import FIRST_BATCH, METRICS_FILE, VALIDATION

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig

REPORT_FILE = "report.html"
_EVERY_S = 60.0  # at most so often, but for validations and the end
_MOST_POINTS, _MOST_PICTURES = 400, 3
_WAITS_LONG = 0.1
_STYLES = ("after", "before", "other")

Row = Mapping[str, float]


class RunReport:
    """An observer that writes the page."""

    def __init__(self, config: TrainConfig, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._written_s = -float("inf")

    def __str__(self) -> str:
        return REPORT_FILE

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if time.monotonic() - self._written_s > _EVERY_S:
            self._write()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        self._written_s = time.monotonic()
        whole_file.write_text(self._directory / REPORT_FILE, render(self._config, self._directory))


def render(config: TrainConfig, directory: Path) -> str:
    """The page of the run in a folder, from its `metrics.jsonl` and its pictures."""
    rows = read_metrics(directory)
    sections = [_head(config, rows), _curves(rows), _validation(rows, directory), _speed(config, rows)]
    return page.document(f"{config.name}, {config.exp_name}", [*sections, _first_batch(directory)])


def read_metrics(directory: Path) -> list[Row]:
    """By ascending step; a line that is being written is left out."""
    merged: dict[int, dict[str, float]] = {}
    file = directory / METRICS_FILE
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
            merged.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            continue
    return [merged[step] for step in sorted(merged)]


def advice(wait: float, num_workers: int) -> str:
    """What to do about a share of time that is spent waiting for data."""
    if wait < _WAITS_LONG:
        return "The data keep up with the model."
    more = f"--num-workers={max(4, 2 * num_workers)} (now {num_workers})"
    return (
        f"The model waits for data {wait:.0%} of the time. Try {more}, as long as there are idle cores; videos with a "
        "key frame every few frames (`openpi dataset check` names those that are slow to seek in); or a dataset whose "
        "pictures have the size of the model."
    )


def _head(config: TrainConfig, rows: Sequence[Row]) -> str:
    last = int(rows[-1]["step"]) if rows else 0
    tiles = [page.tile("", "step", f"{last + 1:,}", f"of {config.num_train_steps:,}")]
    if losses := _points(rows, "loss"):
        tiles.append(page.tile("after", "loss", f"{smooth(losses)[-1][1]:.4g}", "smoothed"))
    if errors := _points(rows, "action_error"):
        best = min(errors, key=lambda point: point[1])
        words = f"best {best[1]:.4g} at step {best[0]:,.0f}"
        if (known := min(_baselines(rows).values(), default=0.0)) > 0:
            words += f"; {errors[-1][1] / known:.0%} of the best baseline"
        tiles.append(page.tile("after", "action error", f"{errors[-1][1]:.4g}", words))
    note = f"<p>{escape(config.note)}</p>" if config.note else ""
    return f'<h1>{escape(config.name)}, {escape(config.exp_name)}</h1>{note}<div class="tiles">{"".join(tiles)}</div>'


def _curves(rows: Sequence[Row]) -> str:
    losses = _points(rows, "loss")
    drawn = [Line("each step", losses, "faint"), Line("loss", smooth(losses), "after")]
    if held := _points(rows, "validation_loss"):
        drawn.append(Line("held-out episodes", held, "other"))
    charts = [_card("Loss", line_chart(drawn, x_label="step", y_label="loss", log_y=True))]
    for name, title in (("grad_norm", "Norm of the gradient"), ("learning_rate", "Learning rate")):
        if points := _points(rows, name):
            charts.append(_card(title, line_chart([Line(title, points)], x_label="step", y_label=title)))
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


def _validation(rows: Sequence[Row], directory: Path) -> str:
    errors = _points(rows, "action_error")
    if not errors:
        return '<h2>Validation</h2><p class="note">Nothing was validated yet, or no episode is held out.</p>'
    ends = (errors[0][0], errors[-1][0])
    lines = [Line("model", errors, "after")]
    for style, (name, value) in zip(_STYLES[1:], _baselines(rows).items(), strict=False):
        lines.append(Line(name.replace("_", " "), [(end, value) for end in ends], style))
    chart = line_chart(lines, x_label="step", y_label="mean absolute error, robot units")
    joints = [
        [escape(name.removeprefix("action_error/")), f"{value:.4g}"]
        for name, value in _last_with(rows, "action_error").items()
        if name.startswith("action_error/")
    ]
    table = page.table(["action dimension", "error, in its unit"], joints, numbers_from=1)
    files = sorted(directory.glob(f"{VALIDATION}_*.png"), key=lambda file: int(file.stem.rpartition("_")[2]))
    pictures = "".join(
        _picture(file, f"step {file.stem.rpartition('_')[2]}: recorded in grey, predicted in green")
        for file in reversed(files[-_MOST_PICTURES:])
    )
    note = "<p>A model that has learned something is below the baselines: standing still, and the mean action.</p>"
    cards = _card("Mean absolute error, in robot units", chart) + _card("The last, by joint", table)
    return f'<h2>Validation on held-out episodes</h2>{note}<div class="charts">{cards}</div>{pictures}'


def _speed(config: TrainConfig, rows: Sequence[Row]) -> str:
    rates, waits = _points(rows, "samples_per_s"), _points(rows, "data_wait")
    if not rates:
        return ""
    charts = [
        _card("Samples per second", line_chart([Line("rate", rates)], x_label="step", y_label="samples per second")),
        _card(
            "Share of the time that waits for data", line_chart([Line("wait", waits)], x_label="step", y_label="wait")
        ),
    ]
    usual = float(np.median([value for _, value in waits[len(waits) // 2 :]]))
    return f'<h2>Speed</h2><p>{advice(usual, config.num_workers)}</p><div class="charts">{"".join(charts)}</div>'


def _first_batch(directory: Path) -> str:
    file = directory / f"{FIRST_BATCH}.png"
    return f"<h2>First batch</h2>{_picture(file, 'what the model was fed first')}" if file.is_file() else ""


def _baselines(rows: Sequence[Row]) -> dict[str, float]:
    last = _last_with(rows, "action_error")
    return {name.removeprefix("baseline/"): value for name, value in last.items() if name.startswith("baseline/")}


def _last_with(rows: Sequence[Row], name: str) -> Row:
    return next((row for row in reversed(rows) if name in row), {})


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    """Of a metric, thinned to what a chart can show; numbers that are not finite are left out."""
    points = [(float(row["step"]), float(row[name])) for row in rows if name in row and np.isfinite(row[name])]
    return evenly_spaced(points, _MOST_POINTS)


def _card(title: str, content: str) -> str:
    return f'<div class="card"><h3>{escape(title)}</h3>{content}</div>'


def _picture(file: Path, words: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<div class="card"><img src="data:image/png;base64,{data}" alt="{escape(words)}" style="max-width:100%">'
        f'<p class="note">{escape(words)}</p></div>'
    )
