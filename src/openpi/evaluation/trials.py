"""Two policies on a real robot, in an order that nobody in the room knows: the plan, the notes, what comes of them.

Trials come in pairs: both policies do one task from one arrangement of the scene, who begins is drawn by lot. The
file of results is written after each trial and names the policies only when the last one is done.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from openpi.evaluation.stats import Paired, Tally, mean_interval
from openpi.shared import whole_file

Measure = Literal["success", "score"]
BETTER = ("first", "second", "tie")
_FEWEST_ALIKE = 6  # by chance all on one side in 2 of 64 cases


@dataclasses.dataclass(frozen=True)
class Form:
    """What is asked after a trial.

    Attributes:
        measure: `success`, yes or no, or `score`, 0 to 100.
        asks_video: the name of the film is asked.
        asks_better: after the second of a pair, which was better.
    """

    measure: Measure = "success"
    asks_video: bool = False
    asks_better: bool = False


PRESETS: Mapping[str, Form] = {
    "success": Form(),
    "score": Form("score"),
    # The columns of DROID's evaluation program (success, duration, video_filename), and a preference for each pair.
    "droid": Form("score", asks_video=True, asks_better=True),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial of the plan.

    Attributes:
        number: from 1.
        pair: from 1.
        turn: 1 or 2, of the pair.
        policy: 0 or 1, which is not to be told.
    """

    number: int
    pair: int
    turn: int
    task: str
    policy: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row of the file.

    Attributes:
        success: 0 to 1.
        duration: seconds.
        better: `first`, `second` or `tie`, on the second row of a pair; empty = not asked.
        seed: of the lots.
        plan: of the policies in their order and the form, in a digest, so that a run that goes on has the same.
        policy: its name; empty before the end.
    """

    trial: int
    pair: int
    turn: int
    task: str
    success: float
    duration: float
    notes: str = ""
    video_filename: str = ""
    better: str = ""
    when: str = ""
    seed: int = 0
    plan: str = ""
    policy: str = ""


def plan(pairs: int, tasks: Sequence[str], seed: int) -> list[Trial]:
    """Pairs go through the tasks in turn; each begins with either policy equally often, within one.

    Fewer pairs are the beginning of more: what was played stays what it was if somebody asks for another number.
    """
    rng = np.random.default_rng(seed)
    firsts = np.stack([(lots := rng.integers(2, size=(pairs + 1) // 2)), 1 - lots], axis=1).ravel()[:pairs]
    trials = []
    for pair, first in enumerate(firsts):
        for turn, policy in enumerate((int(first), 1 - int(first))):
            trials.append(Trial(2 * pair + turn + 1, pair + 1, turn + 1, tasks[pair % len(tasks)], policy))
    return trials


def digest_of(names: Sequence[str], form: str) -> str:
    """Tells policies, their order and the form from others, and does not name them."""
    return hashlib.sha256(json.dumps([*names, form]).encode()).hexdigest()[:12]


def parse_outcome(text: str, measure: Measure) -> float | None:
    """0 to 1 of what was typed: `y`, `n`, or 0 to 100; None where it is none of them."""
    word = text.strip().lower()
    if word in ("y", "yes", "n", "no"):
        return float(word[0] == "y")
    if measure == "success":
        return None
    try:
        value = float(word)
    except ValueError:
        return None
    return value / 100 if 0 <= value <= 100 else None


def read(file: Path) -> list[Outcome]:
    """The rows of a file of results.

    Raises:
        ValueError: it is no such file.
    """
    kinds = {"int": int, "float": float, "str": str}
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(Outcome)}
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        return [Outcome(**{name: kind(row[name]) for name, kind in fields.items()}) for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{file} is no file of `openpi trials` ({error!r}); name another file") from error


def check_goes_on(done: Sequence[Outcome], trials: Sequence[Trial], digest: str, file: Path) -> None:
    """Raises ValueError unless the rows are the beginning of the plan, by the same policies."""
    if any(row.plan != digest for row in done):
        raise ValueError(
            f"{file} was begun with another --a or --b, or the two the other way round, or with another --form; go on "
            "with what it was begun with, or name another file"
        )
    for row, trial in zip(done, trials, strict=False):
        if (row.trial, row.pair, row.turn, row.task) != (trial.number, trial.pair, trial.turn, trial.task):
            raise ValueError(
                f"{file} has trial {row.trial} of '{row.task}' where these flags have trial {trial.number} of "
                f"'{trial.task}'; go on with the flags that it was begun with, or name another file"
            )
    if len(done) > len(trials):
        raise ValueError(f"{file} has {len(done)} trials, more than the {len(trials)} of these flags; raise --pairs")


def write(file: Path, rows: Sequence[Outcome]) -> None:
    """All rows, complete or not at all."""
    with whole_file.replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [field.name for field in dataclasses.fields(Outcome)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
        out.flush()
        os.fsync(out.fileno())


def named(rows: Sequence[Outcome], trials: Sequence[Trial], names: Sequence[str]) -> list[Outcome]:
    """The rows with the names of the policies."""
    return [dataclasses.replace(row, policy=names[trial.policy]) for row, trial in zip(rows, trials, strict=False)]


def summary(rows: Sequence[Outcome], trials: Sequence[Trial], names: Sequence[str], measure: Measure) -> list[str]:
    """Lines for people, of complete pairs: each policy, the difference with its 95 % interval, preferences."""
    pairs = len(rows) // 2
    if not pairs:
        return ["no pair is complete; nothing can be said"]
    values = np.zeros((2, pairs))
    for row, trial in zip(rows[: 2 * pairs], trials, strict=False):
        values[trial.policy, trial.pair - 1] = row.success
    a, b = values
    lines = [f"{pairs} pairs"]
    if measure == "success":
        found = Paired.of([value > 0.5 for value in a], [value > 0.5 for value in b])
        for name, tally in zip(names, (found.a, found.b), strict=True):
            lines.append(f"{name}: {Tally(tally.successes, tally.trials)}")
        difference, low, high = found.difference
        extra = f", exact p = {found.p_value:.2g}"
    else:
        lines += [f"{name}: mean score {100 * each.mean():.0f}" for name, each in zip(names, values, strict=True)]
        difference, (low, high) = float((b - a).mean()), _interval(b - a)
        extra = ""
    lines.append(
        f"{names[1]} less {names[0]}: {100 * difference:+.0f} points, "
        f"95 % interval {100 * low:+.0f} to {100 * high:+.0f}{extra}"
    )
    lines += _preferences(rows[: 2 * pairs], trials, names)
    if low <= 0 <= high:
        lines.append("no difference is shown; more pairs make the interval narrower, as their square root")
    return lines


def _interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over pairs; all there can be where equal differences say nothing of how they vary."""
    n = len(differences)
    if n < 2 or (n < _FEWEST_ALIKE and math.isclose(float(np.ptp(differences)), 0.0)):
        return -1.0, 1.0
    low, high = mean_interval(differences, np.ones(n))
    return max(-1.0, low), min(1.0, high)


def _preferences(rows: Sequence[Outcome], trials: Sequence[Trial], names: Sequence[str]) -> list[str]:
    counts, ties = [0, 0], 0
    for row, trial in zip(rows, trials, strict=False):
        if row.turn == 2 and row.better == "tie":
            ties += 1
        elif row.turn == 2 and row.better:
            counts[trial.policy if row.better == "second" else 1 - trial.policy] += 1
    if not (sum(counts) or ties):
        return []
    return [f"preferred: {names[0]} {counts[0]} times, {names[1]} {counts[1]} times, neither {ties} times"]
