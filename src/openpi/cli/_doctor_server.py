"""Recorded frames through a running server and through the training path."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli._doctor_view import Diagnosis
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
from openpi.policies.contract import Contract
from openpi.policies.policy_config import Pipeline
from openpi.policies.request import SEED, TRACE
from openpi.policies.robot_spec import find_spec
from openpi.training import data_loader
from openpi.training import moments as _moments
from openpi.training.config import TrainConfig
from openpi.training.moments import Moment, Moments
from openpi_client.websocket_client_policy import WebsocketClientPolicy

_INNER: tuple[str, ...] = (IMAGES, STATE, NORMALIZED, TOKENS)
_SAMPLES = 4  # chunks per frame, of a server that takes no noise


def diagnose(
    config: TrainConfig, checkpoint: Checkpoint | None, around: Pipeline, args: argparse.Namespace
) -> Diagnosis:
    """Raises ValueError, FileNotFoundError, KeyError for the dataset; TimeoutError, ConnectionError for the server."""
    if args.model and checkpoint is None:
        raise ValueError("--model compares what the models answer; name a checkpoint instead of a recipe")
    data_config = around.data_config
    episodes, _ = _moments.chosen(config, data_config, None, args.frames)
    recordings = Moments(config, data_config, episodes)
    some = frames_of(recordings, args.frames)
    contract = _contract(config, around)
    fps = float(recordings.dataset.metadata.fps)
    # What was recorded is old.
    with WebsocketClientPolicy(
        args.host, args.port, args.api_key, connect_timeout_s=args.timeout, max_age_s=None
    ) as client:
        told = client.get_server_metadata().get("contract")
        about = f"{len(some)} frames of {data_config.repo_id} through {args.host}:{args.port} and through training"
        found: list[Difference] = []
        if told is not None:
            found += contract_differences.find(told if contract is None else contract.as_metadata(), told)
            found += contract_differences.rate(fps, told.get("control_hz"))
            found += contract_differences.observation(told, some[0].observation)
        try:
            return _compared(about, found, config, checkpoint, around, recordings, some, client, args.model)
        except RuntimeError as error:  # the server's own words
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            cause, fix = "the server does not take what the dataset holds", "see its message; it names the field"
            refused = Difference(KEYS, "observation", f"refused: {reason}", cause, fix)
            return Diagnosis(about, [*found, refused], dict.fromkeys(_INNER, "the server refused the observation"))


def frames_of(recordings: Moments, at_most: int) -> list[Moment]:
    """From all over the episodes."""
    each = -(-at_most // len(recordings.lengths))
    places = [(e, step) for e, n in recordings.lengths.items() for step in _moments.spread(range(n), max(2, each))]
    rows = _moments.spread(range(len(places)), at_most)
    return [recordings.at(*places[row]) for row in rows]


def _contract(config: TrainConfig, around: Pipeline) -> Contract | None:
    """What was trained; None of a recipe whose transforms do not say which robot they are for."""
    if around.contract is not None or find_spec(around.data_config.data_transforms.inputs) is None:
        return around.contract
    return Contract.build(around.data_config, config.model)


def _compared(
    about: str,
    found: list[Difference],
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    around: Pipeline,
    recordings: Moments,
    some: Sequence[Moment],
    client: WebsocketClientPolicy,
    has_model: bool,
) -> Diagnosis:
    if TRACE not in client.server_features:
        return _foreign(about, found, config, checkpoint, some, client, has_model)
    takes_seed = config.model.model_type is not ModelType.PI0_FAST
    answers = [client.infer({**m.observation, TRACE: True, **_seed(i, takes_seed)}) for i, m in enumerate(some)]
    if any(TRACE not in answer for answer in answers):
        return _foreign(about, found, config, checkpoint, some, client, has_model)
    chain = data_loader.input_transforms(around.data_config, recordings.dataset)
    _, normalize, after = stages.split(chain)
    frames = [
        Frame(stages.walk(chain, recordings.sample(m.episode, m.step))[1], answer[TRACE], np.asarray(answer["actions"]))
        for m, answer in zip(some, answers, strict=True)
        if not answer.get("held")
    ]
    contract = around.contract
    names = ((), ()) if contract is None else (contract.state_names, contract.actions.names)
    path = TrainingPath(normalize, after, around.outputs, *names)
    if frames:
        found = [*found, *differences.find(frames, path)]
    not_compared = {} if frames else dict.fromkeys((*_INNER, CHUNK), "the model wrote no action chunk for any frame")
    if has_model and frames and not found:
        ours = list(_local(config, checkpoint, [{**m.observation, TRACE: True} for m in some], takes_seed, 1))
        mine = np.stack([chunks[0][TRACE][stages.ACTIONS] for chunks in ours])
        theirs = np.stack([answer[TRACE][stages.ACTIONS] for answer in answers])
        found += model_differences.same_noise(np.asarray(mine, np.float64), np.asarray(theirs, np.float64))
    elif has_model and found:
        not_compared = {**not_compared, "model": "it has other inputs"}
    return Diagnosis(about, _sorted(found), not_compared)


def _foreign(
    about: str,
    found: list[Difference],
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    some: Sequence[Moment],
    client: WebsocketClientPolicy,
    has_model: bool,
) -> Diagnosis:
    """By keys and chunks only."""
    why = "the server does not tell its stages: it is not of this version of openpi, or has a policy of its own"
    not_compared = dict.fromkeys(_INNER, why)
    answers = [[client.infer(dict(m.observation)) for _ in range(_SAMPLES if has_model else 1)] for m in some]
    theirs = [[np.asarray(answer["actions"], np.float64) for answer in each] for each in answers]
    if theirs[0][0].shape[-1] != (width := some[0].recorded.shape[-1]):
        text = f"{theirs[0][0].shape[-1]} dimensions; recorded were {width}"
        cause, fix = "the policy is that of another robot or recipe", "serve the checkpoint of this robot"
        found.append(Difference(CHUNK, "actions", text, cause, fix))
    elif has_model:
        mine = _local(config, checkpoint, [m.observation for m in some], False, _SAMPLES)
        ours = np.stack([[np.asarray(answer["actions"], np.float64) for answer in each] for each in mine])
        found += model_differences.other_noise(ours, np.stack([np.stack(each) for each in theirs]))
    else:
        not_compared[CHUNK] = "only its width; --model compares with what the checkpoint answers here"
    return Diagnosis(about, _sorted(found), not_compared)


def _local(
    config: TrainConfig,
    checkpoint: Checkpoint | None,
    observations: Sequence[Mapping[str, Any]],
    takes_seed: bool,
    samples: int,
) -> Iterator[list[dict[str, Any]]]:
    from openpi.cli.infer import load_policy

    policy = load_policy(config, checkpoint, {}, None)
    for i, observation in enumerate(observations):
        yield [policy.infer({**observation, **_seed(i, takes_seed)}) for _ in range(samples)]


def _seed(number: int, takes_seed: bool) -> dict[str, int]:
    return {SEED: number} if takes_seed else {}


def _sorted(found: Sequence[Difference]) -> list[Difference]:
    return sorted(found, key=lambda each: STAGES.index(each.stage))
