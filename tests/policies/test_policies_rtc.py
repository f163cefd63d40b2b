"""Requests that say what a robot is still playing, and what noise to start from: `openpi.policies.request`."""

import dataclasses
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_recipe
from openpi.cli.evaluation import replay
from openpi.models.rtc_config import RtcConfig
from openpi.models.tokenizer import PaligemmaTokenizer
from openpi.models_pytorch import loading
from openpi.models_pytorch.model import fresh_parameters
from openpi.policies.continuation import Continuation
from openpi.policies.guards import ObservationError
from openpi.policies.policy import Policy
from openpi.policies.request import Request
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.serving.recording import SessionRecorder
from openpi.shared.normalize import NormStats
from openpi.transforms import (
    AbsoluteActions,
    DeltaActions,
    Normalize,
    PadStatesAndActions,
    TokenizePrompt,
    Unnormalize,
)
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import server_thread

MODEL = dataclasses.replace(tiny_recipe.MODEL, action_horizon=6, rtc_max_delay=3, pi05=True, pytorch_compile_mode=None)
STATS = {
    "state": NormStats(mean=np.full(3, 0.5), std=np.full(3, 2.0)),
    "actions": NormStats(mean=np.array([0.1, -0.2, 0.3]), std=np.array([0.5, 0.4, 2.0])),
}
MASK = (True, True, False)
F32 = 1e-5
NOISE = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)


def sampler() -> PytorchSampler:
    model, generator = loading.create(MODEL, device="cpu"), torch.Generator().manual_seed(1)
    for name, value in fresh_parameters(model, dict(model.named_parameters()), seed=0):
        is_norm = "layernorm" in name or "norms" in name  # fresh ones close the gates of their layers
        change = 0.05 * torch.randn(value.shape, generator=generator)
        loading.set_parameter(model, name, value + change if is_norm else value)
    return PytorchSampler(model, device="cpu")


SAMPLER = pytest.fixture(sampler, scope="module", name="sampler")


def policy_of(sampler: Any, config: RtcConfig | None) -> Policy:
    """One with relative actions, statistics and padding, as recipes have them."""
    inputs = [
        tiny_recipe.InputsAsRecorded(),
        DeltaActions(MASK),
        Normalize(STATS),
        TokenizePrompt(PaligemmaTokenizer(8, str(tiny_recipe.TOKENIZER))),
        PadStatesAndActions(4),
    ]
    outputs = [Unnormalize(STATS), AbsoluteActions(MASK), tiny_recipe.ArmOutputs()]
    continuation = None if config is None else Continuation.create(config, MODEL, inputs, None)
    return Policy(
        sampler,
        transforms=inputs,
        output_transforms=outputs,
        sample_kwargs={"num_steps": 4},
        continuation=continuation,
    )


@pytest.fixture(scope="module")
def trained(sampler: PytorchSampler) -> Policy:
    return policy_of(sampler, RtcConfig())


@pytest.fixture(scope="module")
def guided(sampler: PytorchSampler) -> Policy:
    return policy_of(sampler, RtcConfig("guided"))


def observation(joints: float = 0.0, **more: Any) -> dict[str, Any]:
    camera = np.random.default_rng(2).integers(0, 255, (28, 28, 3), np.uint8)
    return {"camera": camera, "joints": np.full(3, joints, np.float32), "prompt": "go", "noise": NOISE, **more}


def left_over(policy: Policy, **more: Any) -> dict[str, Any]:
    """What a robot says that has played two rows of a chunk, and moved meanwhile."""
    played = policy.infer(observation())["actions"]
    return observation(0.4, prev_action_chunk=played[2:], inference_delay=2, **more)


def test_frozen_actions_come_back_as_they_are_though_the_robot_has_moved(trained: Policy) -> None:
    asked = left_over(trained)
    actions = trained.infer(asked)["actions"]
    np.testing.assert_allclose(actions[:2], asked["prev_action_chunk"][:2], atol=F32)
    assert np.abs(actions[2:4] - asked["prev_action_chunk"][2:]).max() > 1e-3


def test_guided_chunks_stay_near_the_one_before_and_go_where_they_would_later(guided: Policy) -> None:
    asked = left_over(guided)
    fresh = guided.infer(observation(0.4))["actions"]
    actions = guided.infer(asked)["actions"]
    before = asked["prev_action_chunk"]
    assert np.abs(actions[:2] - before[:2]).max() < 0.3 * np.abs(fresh[:2] - before[:2]).max()


def test_the_answer_is_free_after_what_will_be_played(guided: Policy) -> None:
    """With six rows, asked every five ticks, only the frozen ones bind; by default all that are left do."""
    asked = left_over(guided)
    bound, free = (Request.parse({**asked, "execution_horizon": horizon}) for horizon in (2, 5))
    continuation = Continuation.create(RtcConfig("guided", "ones"), MODEL, [], None)
    steps = guided._steps

    def rows(request: Request) -> list[int]:
        assert request.left_over is not None
        _, continued = continuation.prepare(steps, request.observation, request.left_over)
        assert continued is not None
        assert not continued["weights"][:, 3].any()  # padding
        np.testing.assert_array_equal(continued["actions"][4:], np.tile(continued["actions"][3], (2, 1)))  # held
        return np.flatnonzero(continued["weights"][:, 0]).tolist()

    assert rows(bound) == [0, 1, 2, 3] == rows(Request.parse(asked))
    assert rows(free) == [0, 1]


def test_a_request_that_goes_on_and_one_that_begins_anew_share_a_batch(trained: Policy, guided: Policy) -> None:
    for policy in (trained, guided):
        asked = [left_over(policy), observation(0.1)]
        together = policy.infer_batch(asked)
        for one, result in zip(asked, together, strict=True):
            assert isinstance(result, dict)
            np.testing.assert_allclose(result["actions"], policy.infer(one)["actions"], atol=F32)


def test_without_a_delay_a_trained_model_answers_as_one_that_was_not(trained: Policy, sampler: PytorchSampler) -> None:
    asked = {**left_over(trained), "inference_delay": 0}
    plain = policy_of(sampler, None).infer(observation(0.4))["actions"]
    np.testing.assert_array_equal(trained.infer(asked)["actions"], plain)


def test_none_stands_for_absent(trained: Policy) -> None:
    nothing = dict.fromkeys(("prev_action_chunk", "inference_delay", "execution_horizon", "seed"))
    plain = trained.infer(observation())["actions"]
    np.testing.assert_array_equal(trained.infer(observation(**nothing))["actions"], plain)
    empty = observation(prev_action_chunk=np.zeros((0, 3)), inference_delay=0)
    np.testing.assert_array_equal(trained.infer(empty)["actions"], plain)


ROWS = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (
            {"prev_action_chunk": np.zeros((4, 2))},
            "'prev_action_chunk' has 2 values a row; this robot's actions have 3",
        ),
        ({"prev_action_chunk": np.zeros((7, 3))}, "'prev_action_chunk' has 7 rows; a chunk has 6"),
        ({"prev_action_chunk": np.zeros(3)}, r"'prev_action_chunk' has shape \(3,\); expected \[n, action width\]"),
        (
            {"prev_action_chunk": ROWS * np.nan},
            r"'prev_action_chunk' has NaN or infinity \(as float32\), first at \[0, 0\]",
        ),
        ({"prev_action_chunk": "rows"}, "'prev_action_chunk' has dtype <U4; expected an array of numbers"),
        ({"prev_action_chunk": [[0.0], [0.0, 1.0]]}, "'prev_action_chunk' has dtype object"),
        ({"inference_delay": None}, "'prev_action_chunk' is given without 'inference_delay'"),
        ({"inference_delay": 4}, r"'inference_delay' is 4; this policy takes at most 3 \(trained\)"),
        ({"inference_delay": -1}, "'inference_delay' is -1; expected a whole number of at least 0"),
        ({"inference_delay": 1.5}, "'inference_delay' is 1.5; expected a whole number"),
        ({"inference_delay": True}, "'inference_delay' is True; expected a whole number"),
        ({"inference_delay": [[1], [2, 3]]}, r"'inference_delay' is \[\[1\], \[2, 3\]\]; expected a whole number"),
        ({"execution_horizon": 0}, "'execution_horizon' is 0; expected a whole number of at least 1"),
        ({"noise": np.zeros((5, 4))}, r"'noise' has shape \(5, 4\); expected \(6, 4\)"),
        ({"noise": np.full((6, 4), np.inf)}, "'noise' has NaN or infinity"),
        ({"noise": np.full((6, 4), 1e300)}, "'noise' has NaN or infinity"),
        ({"prev_action_chunk": np.full((4, 3), -1e39)}, "'prev_action_chunk' has NaN or infinity"),
        ({"seed": 1}, "'noise' and 'seed' are both given"),
        ({"noise": None, "seed": -3}, "'seed' is -3; expected a whole number of at least 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_reason(trained: Policy, sent: Any, expected: str) -> None:
    asked = observation(**{"prev_action_chunk": ROWS, "inference_delay": np.int64(2), **sent})
    with pytest.raises(ObservationError, match=expected):
        trained.infer(asked)


@pytest.mark.parametrize("key", ["noise", "prev_action_chunk"])
def test_a_refusal_takes_no_more_memory_than_what_was_sent(key: str) -> None:
    """A list of all places of NaN in many axes is a hundred times as large."""
    values = np.full((50_000, *[1] * 31), np.nan, np.float16)
    tracemalloc.start()
    try:
        with pytest.raises(ObservationError, match=f"'{key}' has NaN or infinity"):
            Request.parse({key: values, "inference_delay": 1})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * values.nbytes


def test_a_policy_that_cannot_go_on_says_so(sampler: PytorchSampler) -> None:
    asked = observation(prev_action_chunk=ROWS, inference_delay=1)
    with pytest.raises(ObservationError, match="is served without real-time chunking; leave it out"):
        policy_of(sampler, None).infer(asked)
    untrained = dataclasses.replace(MODEL, rtc_max_delay=0)
    with pytest.raises(ValueError, match="needs a checkpoint that was trained with delays"):
        Continuation.create(RtcConfig("trained"), untrained, [], None)
    with pytest.raises(ValueError, match="must pass `actions` through"):
        policy = policy_of(sampler, RtcConfig())
        policy._steps = [lambda data: {**data, "actions": data["actions"][:1]}, *policy._steps]
        policy.infer(asked)


class WithoutBackward:
    """A device that has no memory for a backward pass, from some size of batches on."""

    takes_noise, action_horizon, action_dim = True, MODEL.action_horizon, MODEL.action_dim

    def __init__(self, largest_batch: int) -> None:
        self._largest_batch = largest_batch

    def warm_up(self, inputs: dict[str, Any], **options: Any) -> None:
        if "chunking" in options and len(inputs["state"]) > self._largest_batch:
            raise MemoryError("out of memory")


def test_what_does_not_fit_into_memory_is_not_offered_and_what_was_offered_stays(caplog) -> None:
    example = observation(noise=None)
    unasked, asked = (policy_of(WithoutBackward(0), config) for config in (RtcConfig(), RtcConfig("guided")))
    unasked.warm_up(example)
    assert unasked.rtc_metadata is None and "try --rtc-jacobian=identity" in caplog.text
    with pytest.raises(MemoryError):
        asked.warm_up(example)
    small = policy_of(WithoutBackward(1), RtcConfig())
    small.warm_up(example)
    with pytest.raises(MemoryError):  # the batch's size is given up, as for any other reason
        small.warm_up(example, batch_size=8)
    assert small.rtc_metadata is not None and small.batch_sizes == (1,)


def test_a_seed_makes_the_same_chunk_again_and_another_makes_another(trained: Policy) -> None:
    asked = observation(noise=None, seed=7)
    first = trained.infer(asked)["actions"]
    np.testing.assert_array_equal(trained.infer(asked)["actions"], first)
    other, plain = (trained.infer(observation(noise=None, **more))["actions"] for more in ({"seed": 8}, {}))
    assert np.abs(other - first).max() > 1e-3 and np.abs(plain - first).max() > 1e-3
    # Seeded ones run beside others, which draw for themselves.
    beside = trained.infer_batch([asked, observation(noise=None), observation()])
    assert isinstance(beside[0], dict)
    np.testing.assert_allclose(beside[0]["actions"], first, atol=F32)


def test_a_server_tells_what_it_can_and_its_recordings_replay_exactly(trained: Policy, tmp_path: Path) -> None:
    records = tmp_path / "records"
    recorder = SessionRecorder(records)
    with (
        server_thread(lambda: trained, recorder=recorder) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        told = client.get_server_metadata()["rtc"]
        assert told == {"modes": ["trained"], "max_delay": 3, "horizon": 6, "rate": None}
        first = client.infer(observation(noise=None, seed=1))["actions"]
        asked = observation(0.4, prev_action_chunk=first[2:], inference_delay=2, noise=None, seed=2)
        np.testing.assert_allclose(client.infer(asked)["actions"][:2], first[2:4], atol=F32)
        with pytest.raises(RuntimeError, match="this policy takes at most 3"):
            client.infer({**asked, "inference_delay": 5})
    with server_thread(lambda: trained) as (_, port):
        assert replay.main([str(records), "--port", str(port), "--tolerance", "0"]) == 0


def test_what_is_asked_for_is_not_told_to_the_model():
    """A frame of a dataset has its actions, and pi0-FAST went on writing from them."""
    assert Request.parse({"state": [0.0], "actions": [[1.0]], "prompt": "go"}).observation.keys() == {"state", "prompt"}
