"""Recorded frames through a running server and through the training path."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.debugging._doctor_view import Diagnosis
from openpi.evaluation import contract_differences, differences, model_differences
from openpi.evaluation.difference import (
    CHUNK,
    IMAGES,
    KEYS,
    NORMALIZED,
    STAGES,
    STATE,
    TOKENS,
    Difference,
    Frame,
    TrainingPath,
)
from openpi.models.model_config import ModelType
from openpi.policies import stages
from openpi.policies.policy_config import Pipeline
from openpi.policies.request import SEED, TRACE
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import moments as _moments
from openpi.training.data.moments import Moment, Moments
from openpi_client.base_policy import Observation, Reply
from openpi_client.connection import api_key_of, usual_port
from openpi_client.websocket_client_policy import WebsocketClientPolicy

_INNER: tuple[str, ...] = (IMAGES, STATE, NORMALIZED, TOKENS)
_SAMPLES = 4  # chunks per frame, of a server that takes no noise


def diagnose(
    config: TrainConfig, checkpoint: Checkpoint | None, around: Pipeline, args: argparse.Namespace
) -> Diagnosis:
    """Raises ValueError, FileNotFoundError, KeyError for the dataset; TimeoutError, ConnectionError for the server."""
    if args.model and checkpoint is None:
        raise ValueError("--model compares what the models answer; name a checkpoint instead of a recipe")
    episodes, _ = _moments.chosen(config, around.data_config, None, args.frames)
    recordings = Moments(config, around.data_config, episodes)
    some = frames_of(recordings, args.frames)
    # What was recorded is old.
    port = usual_port(args.host, args.port)
    with WebsocketClientPolicy(
        args.host, port, api_key_of(args.api_key), connect_timeout_s=args.timeout, max_age_s=None
    ) as client:
        return _Asking(config, checkpoint, around, recordings, some, client, args).diagnosis()


def frames_of(recordings: Moments, at_most: int) -> list[Moment]:
    """From all over the episodes."""
    each = -(-at_most // len(recordings.lengths))
    places = [(e, step) for e, n in recordings.lengths.items() for step in evenly_spaced(range(n), max(2, each))]
    rows = evenly_spaced(range(len(places)), at_most)
    return [recordings.at(*places[row]) for row in rows]


class _RefusedError(Exception):
    """The server's own words about an observation."""


@dataclasses.dataclass(frozen=True)
class _Asking:
    """A server, and what it is asked."""

    config: TrainConfig
    checkpoint: Checkpoint | None
    around: Pipeline
    recordings: Moments
    some: Sequence[Moment]
    client: WebsocketClientPolicy
    args: argparse.Namespace

    def diagnosis(self) -> Diagnosis:
        found = list(self._of_the_contract())
        try:
            more, not_compared = (
                self._of_the_stages() if TRACE in self.client.server_features else self._of_the_chunks()
            )
        except _RefusedError as refused:
            cause, fix = "the server does not take what the dataset holds", "see its message; it names the field"
            more = [Difference(KEYS, "observation", f"refused: {refused}", cause, fix)]
            not_compared = dict.fromkeys((*_INNER, CHUNK), "the server refused the observation")
        ordered = sorted([*found, *more], key=lambda each: STAGES.index(each.stage))
        name, place = self.around.data_config.repo_id, f"{self.args.host}:{self.args.port}"
        return Diagnosis(
            f"{len(self.some)} frames of {name} through {place} and through training", ordered, not_compared
        )

    def _of_the_contract(self) -> Iterator[Difference]:
        told = self.client.get_server_metadata().get("contract")
        if told is None:
            return
        contract = self.around.contract
        if contract is not None:
            yield from contract_differences.find(contract.as_metadata(), told)
        yield from contract_differences.rate(float(self.recordings.dataset.metadata.fps), told.get("control_hz"))
        yield from contract_differences.observation(told, self.some[0].observation)

    def _of_the_stages(self) -> tuple[list[Difference], dict[str, str]]:
        answers = [
            self._ask({**moment.observation, TRACE: True, **self._seed(i)}) for i, moment in enumerate(self.some)
        ]
        if any(TRACE not in answer for answer in answers):
            return self._of_the_chunks()
        chain = data_loader.input_transforms(self.around.data_config, self.recordings.dataset)
        frames = [
            Frame(stages.walk(chain, self.recordings.sample(m.episode, m.step))[1], a[TRACE], np.asarray(a["actions"]))
            for m, a in zip(self.some, answers, strict=True)
            if not a.get("held")
        ]
        if not frames:
            return [], dict.fromkeys((*_INNER, CHUNK), "the model wrote no action chunk for any frame")
        found = differences.find(frames, self._path(chain))
        if not self.args.model:
            return found, {}
        if found:
            return found, {"models": "they have other inputs"}
        ours = self._local([{**moment.observation, TRACE: True} for moment in self.some], samples=1)
        mine, theirs = (
            np.stack([np.asarray(answer[TRACE][stages.ACTIONS], np.float64) for answer in way])
            for way in ([first for [first] in ours], answers)
        )
        return list(model_differences.same_noise(mine, theirs)), {}

    def _path(self, chain: Sequence[transforms.DataTransformFn]) -> TrainingPath:
        _, normalize, after = stages.split(chain)
        contract = self.around.contract
        names = ((), ()) if contract is None else (contract.state_names, contract.actions.names)
        return TrainingPath(normalize, after, self.around.outputs, *names)

    def _of_the_chunks(self) -> tuple[list[Difference], dict[str, str]]:
        """All there is of a server that tells no stages."""
        why = "the server does not tell its stages: it is not of this version of openpi, or has a policy of its own"
        not_compared = dict.fromkeys(_INNER, why)
        samples = _SAMPLES if self.args.model else 1
        answers = [[self._ask(dict(moment.observation)) for _ in range(samples)] for moment in self.some]
        theirs = np.stack([[np.asarray(answer["actions"], np.float64) for answer in each] for each in answers])
        if theirs.shape[-1] != (width := self.some[0].recorded.shape[-1]):
            found = f"{theirs.shape[-1]} dimensions; recorded were {width}"
            cause, fix = "the policy is that of another robot or recipe", "serve the checkpoint of this robot"
            return [Difference(CHUNK, "actions", found, cause, fix)], not_compared
        if not self.args.model:
            return [], {**not_compared, CHUNK: "only its width; --model compares with what the checkpoint answers here"}
        local = self._local([moment.observation for moment in self.some], samples)
        ours = np.stack([[np.asarray(answer["actions"], np.float64) for answer in each] for each in local])
        return list(model_differences.other_noise(ours, theirs)), not_compared

    def _ask(self, observation: Observation) -> Reply:
        try:
            return self.client.infer(observation)
        except RuntimeError as error:
            raise _RefusedError((str(error).strip().splitlines() or [type(error).__name__])[-1]) from error

    def _local(self, observations: Sequence[Mapping[str, object]], samples: int) -> list[list[Reply]]:
        """Answers of the checkpoint in this process; a single one of each is from the noise that the server has."""
        from openpi.cli.debugging.infer import load_policy

        steps = self.args.num_steps
        policy = load_policy(self.config, self.checkpoint, {} if steps is None else {"num_steps": steps}, None)
        seeds = [self._seed(i) if samples == 1 else {} for i in range(len(observations))]
        return [
            [policy.infer({**observation, **seed}) for _ in range(samples)]
            for observation, seed in zip(observations, seeds, strict=True)
        ]

    def _seed(self, number: int) -> dict[str, int]:
        """pi0-FAST takes none."""
        return {} if self.config.model.model_type is ModelType.PI0_FAST else {SEED: number}
