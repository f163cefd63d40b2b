"""What a training run would make of it: `training.*`."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import Subject

_UNBALANCED = 20
_FLAT = 1e-6


def check(subject: Subject) -> Iterator[Finding]:
    if subject.reading.needs_tasks:
        yield from _texts(subject)
    yield from _balance(subject)
    yield from _constant(subject)


def _texts(subject: Subject) -> Iterator[Finding]:
    texts = subject.metadata.tasks
    by_task = _episodes_by_task(subject)
    alike = defaultdict(list)
    for task, text in texts.items():
        alike[_plain(text)].append(task)
        if task not in by_task:
            continue
        if not text.strip():
            for episode in by_task[task]:
                yield Finding(
                    "training.empty-task",
                    Severity.ERROR,
                    f"its task (task_index {task}) is {text!r}: the policy is told nothing",
                    "what the robot does, in words",
                    "Write the text into the tasks file in meta/, or set a default_prompt in the recipe",
                    episode,
                    column="task_index",
                )
    for same in alike.values():
        if len(same) > 1 and texts[same[0]].strip():
            yield Finding(
                "training.duplicate-task",
                Severity.WARNING,
                f"tasks {', '.join(f'{task} {texts[task]!r}' for task in same[:4])} differ in case, space or points",
                "one text for one task",
                "Keep one of them in the tasks file, and its task_index in the frames",
                column="task_index",
            )


def _balance(subject: Subject) -> Iterator[Finding]:
    counts = Counter({task: len(episodes) for task, episodes in _episodes_by_task(subject).items()})
    if len(counts) < 2:
        return
    typical = float(np.median(list(counts.values())))
    for task, count in counts.items():
        if count * _UNBALANCED <= typical:
            text = subject.metadata.tasks.get(task, "")
            yield Finding(
                "training.unbalanced-task",
                Severity.WARNING,
                f"task {task} {text!r} has {count} of {len(subject.episodes)} episodes",
                f"nearer to the {typical:g} of the others: it will hardly be learnt",
                "Record more of it, or leave it out",
                column="task_index",
            )


def _constant(subject: Subject) -> Iterator[Finding]:
    for vector in subject.vectors:
        if vector.role == "other" or len(subject.episodes) < 2:
            continue
        with np.errstate(invalid="ignore"):
            spread = np.nan_to_num(np.nanmax(vector.values, axis=0) - np.nanmin(vector.values, axis=0), nan=1.0)
        for dim in np.flatnonzero(spread <= _FLAT).tolist():
            yield Finding(
                "training.constant",
                Severity.INFO,
                f"it is {vector.values[0, dim]:.4g} in every frame",
                "something that changes, unless it is so by design",
                "",
                column=vector.key,
                dimension=vector.names[dim],
            )


def _episodes_by_task(subject: Subject) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for position, episode in enumerate(subject.episodes):
        for task in np.unique(subject.columns["task_index"][subject.rows(position)]).tolist():
            found[task].append(episode.index)
    return found


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
