"""What a robot sent, as a server recorded it, beside its dataset."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi import transforms
from openpi.cli.debugging._doctor_view import Diagnosis
from openpi.evaluation import robot_differences
from openpi.evaluation.robot_differences import Recorded, Sent
from openpi.policies import stages
from openpi.policies.guards import GUARDS
from openpi.policies.policy_config import Pipeline
from openpi.serving.recording import find_sessions, origin_of, read_session
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.training.config import TrainConfig
from openpi.training.data import holdout
from openpi.training.data import seen as _seen
from openpi.training.data.moments import Moment, Moments
from openpi.training.data.recipe_data import open_lerobot

_MOST_REQUESTS = 200
_EPISODES, _PLACES = 8, 3


def diagnose(config: TrainConfig, around: Pipeline, recording: Path) -> Diagnosis:
    """
    Raises:
        FileNotFoundError, OSError, ValueError: the recording or the dataset is missing, damaged or of another kind.
        ImportError: a form of recording needs an extra that is not installed; it is named.
    """
    session = find_sessions(recording)[-1]  # the newest
    if (protocol := origin_of(session).protocol) != "openpi":
        raise ValueError(
            f"{session} was recorded with the protocol '{protocol}'; only that of openpi sends observations"
        )
    sent = requests_of(session)
    if not sent:
        raise ValueError(f"{session} holds no request of one robot")
    data_config = around.data_config
    dataset = open_lerobot(data_config, config.model)
    numbers, _ = holdout.split_dataset(config, data_config, dataset)
    episodes = evenly_spaced(numbers, _EPISODES)
    recordings = Moments(config, data_config, episodes, dataset)
    before, normalize, _ = stages.split(around.inputs)
    assert normalize is not None  # made of statistics
    to_state = [step for step in before if not isinstance(step, GUARDS)]
    fps = float(recordings.dataset.metadata.fps)
    some, steps = frames_of(recordings, _interval_s(sent), fps, to_state)
    recorded = Recorded(
        [moment.observation for moment in some],
        np.stack([moment.recorded for moment in some]),
        _seen.look(config, data_config, dataset, numbers),
        fps,
        steps,
    )
    found = robot_differences.find(sent, recorded, to_state, normalize)
    rate = "" if steps is not None else "; the recording does not say when they came, so no rate is compared"
    return Diagnosis(
        f"{len(sent)} requests of {session} beside {len(some)} frames of {data_config.repo_id}{rate}", found
    )


def requests_of(session: Path) -> list[Sent]:
    """The first ones; lists come from several robots, and are left out."""
    exchanges = (exchange for exchange in read_session(session) if isinstance(exchange.inputs, Mapping))
    return [
        Sent(
            exchange.inputs,
            None if exchange.received_ns is None else exchange.received_ns / 1e9,
            np.asarray(exchange.outputs["actions"], np.float64) if "actions" in exchange.outputs else None,
        )
        for exchange in itertools.islice(exchanges, _MOST_REQUESTS)
    ]


def frames_of(
    recordings: Moments, interval_s: float | None, fps: float, to_state: Sequence[transforms.DataTransformFn]
) -> tuple[list[Moment], np.ndarray | None]:
    """Frames from all over, and how far the state moves within the interval from some of them on: float[n s]."""
    apart = None if interval_s is None else max(1, round(interval_s * fps))
    chain = transforms.compose(to_state)
    some, steps = [], []
    for episode, length in recordings.lengths.items():
        for step in evenly_spaced(range(max(1, length - (apart or 1))), _PLACES):
            some.append(moment := recordings.at(episode, step))
            if apart is not None and step + apart < length:
                pair = [chain(dict(at.observation))["state"] for at in (moment, recordings.at(episode, step + apart))]
                steps.append(np.abs(np.subtract(*(np.asarray(state, np.float64) for state in pair))))
    return some, np.stack(steps) if steps else None


def _interval_s(sent: Sequence[Sent]) -> float | None:
    """From one request to the next, in the median."""
    times = [each.time_s for each in sent if each.time_s is not None]
    return float(np.median(np.diff(times))) if len(times) == len(sent) > 1 else None
