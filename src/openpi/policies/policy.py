"""Observation dict -> action-chunk dict: transforms around a sampler."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from openpi import transforms as _transforms
from openpi.models.fast_codec import UndecodableActionsError
from openpi.policies import stages
from openpi.policies.continuation import Continuation
from openpi.policies.contract import Contract
from openpi.policies.guards import GUARDS, ContractGuard, InputsGuard, ObservationError
from openpi.policies.observation_checks import first_not_finite
from openpi.policies.recorder import PolicyRecorder
from openpi.policies.request import CHUNK, SEED, TRACE, Request
from openpi.shared.collected_warnings import collected_warnings
from openpi.shared.tree import Params, Tree, flatten
from openpi_client.base_policy import BasePolicy, Reply

logger = logging.getLogger(__name__)

_FAST_CANNOT = "is pi0-FAST, which writes its actions token by token and cannot go on from others"

__all__ = ["BasePolicy", "Policy", "PolicyRecorder", "Sampler"]


class Sampler(Protocol):
    """A model made fast on a device; `policies.sampler_jax.JaxSampler` is one."""

    takes_noise: bool
    action_horizon: int
    action_dim: int

    def sample(self, inputs: Mapping[str, object], noise: np.ndarray | None, **sample_kwargs: object) -> np.ndarray:
        """f32[b ah ad] for a batched model-side dict; returns when the numbers are there."""
        ...


class ActionsError(ValueError):
    """Actions that no robot may get."""


class ExampleError(ValueError):
    """An observation made up for warming up is not what the transforms take."""


def _sampler_of(model: Any, rng: Any, pytorch_device: str | None) -> Sampler:
    if not hasattr(model, "sample_actions"):
        return model
    if pytorch_device is None:
        from openpi.policies.sampler_jax import JaxSampler

        return JaxSampler(model, seed=0 if rng is None else rng)
    from openpi.policies.sampler_pytorch import PytorchSampler

    return PytorchSampler(getattr(model, "model", model), device=pytorch_device)


class Policy(BasePolicy):
    """Runs one observation through transforms, model and back.

    Attributes:
        transforms: observation -> un-batched model inputs.
        contract: what robots are told that it takes and gives; None = unknown.
        checkpoint: which one its weights are of (`Checkpoint.identity`), for robots; None = unknown.
        rtc_metadata: what it can do of real-time chunking, for robots; None = nothing.
        tells_stages: that requests may ask for them.
        num_undecodable: answers so far for which the model wrote no action chunk.
    """

    tells_stages = True

    def __init__(
        self,
        model: object,
        *,
        rng: object = None,
        transforms: Sequence[_transforms.DataTransformFn] = (),
        output_transforms: Sequence[_transforms.DataTransformFn] = (),
        sample_kwargs: Mapping[str, object] | None = None,
        metadata: Mapping[str, object] | None = None,
        contract: Contract | None = None,
        hold_transforms: Sequence[_transforms.DataTransformFn] | None = None,
        continuation: Continuation | None = None,
        checkpoint: Mapping[str, str | int] | None = None,
        pytorch_device: str = "cpu",
        is_pytorch: bool = False,
    ) -> None:
        """
        Args:
            model: a `Sampler`; or a model, as programs that load one themselves have it, for which one is made.
            rng: of JAX, that a model's noise is drawn from; None = `key(0)`.
            transforms: observation -> un-batched model inputs.
            output_transforms: `{"state", "actions"}` as the model has them -> what the robot gets.
            sample_kwargs: passed to the sampler with every call, such as `num_steps`.
            contract: checked first, unless the transforms hold a guard of their own.
            hold_transforms: `{"state"}` as the model has it -> actions for standing still, the answer when the model
                wrote no action chunk; None = that is an error.
            continuation: how chunks go on from what a robot is still playing; None = requests for that are refused.
            pytorch_device, is_pytorch: where a model runs, and that it is of PyTorch.
        """
        is_guarded = contract is None or any(isinstance(t, (ContractGuard, InputsGuard)) for t in transforms)
        guards = [] if contract is None or is_guarded else [ContractGuard(contract)]
        self._sampler: Sampler = _sampler_of(model, rng, pytorch_device if is_pytorch else None)
        self.transforms = tuple(transforms)
        self._steps = [*guards, *transforms]
        self._to_model = _transforms.compose(self._steps)
        self._unchecked_steps = [t for t in transforms if not isinstance(t, GUARDS)]
        self._to_model_unchecked = _transforms.compose(self._unchecked_steps)
        self._to_robot = _transforms.compose(output_transforms)
        self._continuation = continuation
        self.rtc_metadata = None if continuation is None else continuation.as_metadata()
        self._hold = None if hold_transforms is None else _transforms.compose(hold_transforms)
        self.num_undecodable = 0
        self._sample_kwargs = dict(sample_kwargs or {})
        self._compiled_sizes: tuple[int, ...] = (1,)
        self._metadata = dict(metadata or {})
        self.contract = contract
        self.checkpoint = checkpoint

    @property
    def metadata(self) -> dict[str, object]:
        """Sent to robots when they connect."""
        return self._metadata

    def infer(self, obs: dict, *, noise: np.ndarray | None = None) -> dict:
        """A chunk of actions.

        Args:
            obs: client keys, un-batched NumPy values; not modified. Those of `openpi.policies.request` say what the
                chunk goes on from, and what it is made from.
            noise: f32[ah, ad] or [1, ah, ad] that the chunk is made from; None = the request's, or drawn.
        Returns:
            `actions` float[ah, d] in the robot's units, and `policy_timing/infer_ms`, the time the model
            took. `held` true when the actions stand still because the model wrote no chunk; `warnings` where the
            observation is suspicious, such as far outside of the training data.
        Raises:
            UndecodableActionsError: the model wrote no chunk, and the policy has no `hold_transforms`.
            ActionsError: the actions are not finite.
            ObservationError, KeyError: the observation does not fit; field, found, expected and fix are named.
        """
        [result] = self.infer_batch([obs], noise=noise)
        if isinstance(result, Exception):
            raise result
        return result

    def infer_batch(self, observations: Sequence[dict], *, noise: np.ndarray | None = None) -> list[Reply | Exception]:
        """Chunks of actions for several observations, run by the model together.

        Args:
            observations: as of `infer`.
            noise: f32[b, ah, ad] that the chunks are made from; None = the requests', or drawn.
        Returns:
            for each observation what `infer` returns, or the exception that it raises: the others are not affected.
        """
        noise = None if noise is None else self._checked_noise(noise, len(observations))
        return self.infer_prepared([self.prepare(obs) for obs in observations], noise=noise)

    def infer_prepared(
        self, items: Sequence[Prepared | Exception], *, noise: np.ndarray | None = None
    ) -> list[Reply | Exception]:
        """As `infer_batch`, of what `prepare` returned; exceptions are handed on."""
        results: list[Any] = list(items)
        alike: dict[Any, list[int]] = {}
        for i, item in enumerate(results):
            if isinstance(item, Prepared):
                alike.setdefault((item.noise is None, _form(item.inputs)), []).append(i)
        for indices in alike.values():
            for part in _parts(indices, self.batch_sizes):
                chosen = [results[i] for i in part]
                answers = self._sample(chosen, _own_noise(chosen) if noise is None else noise[part])
                for i, answer in zip(part, answers, strict=True):
                    results[i] = answer
        return results

    def prepare(self, obs: dict) -> Prepared | Exception:
        """An observation as the model takes it; or why it does not fit. Any thread, several at once."""
        try:
            with collected_warnings() as warnings:
                return self._prepared(Request.parse(obs), warnings)
        except Exception as error:  # Transforms are anybody's; what they raise is for whoever sent the observation.
            return error

    def _prepared(self, request: Request, warnings: list[str]) -> Prepared:
        noise = self._requested_noise(request)
        observation = _copied(request.observation)
        if request.is_traced:
            inputs, trace = stages.walk(self._steps, observation)
            return Prepared(inputs, warnings, noise, trace=trace)
        if request.left_over is None:
            return Prepared(self._to_model(observation), warnings, noise)
        if self._continuation is None:
            why = "is served without real-time chunking" if self._sampler.takes_noise else _FAST_CANNOT
            raise ObservationError(f"'{CHUNK}' is given, but this policy {why}; leave it out")
        inputs, continued = self._continuation.prepare(self._steps, observation, request.left_over)
        return Prepared(inputs, warnings, noise, continued)

    def _requested_noise(self, request: Request) -> np.ndarray | None:
        if not self._sampler.takes_noise and (request.noise is not None or request.seed is not None):
            key = "noise" if request.seed is None else SEED
            raise ObservationError(f"'{key}' is given, but this model writes its actions token by token; leave it out")
        return request.noise_of(self._sampler.action_horizon, self._sampler.action_dim)

    def _sample(self, items: Sequence[Prepared], noise: np.ndarray | None) -> list[Reply | Exception]:
        """Runs the model once; a batch that is smaller than what was compiled is filled with its last item."""
        size = _size_for(len(items), self.batch_sizes)
        batch, options = _stacked([item.inputs for item in items], size), dict(self._sample_kwargs)
        if self._continuation is not None and any(item.continued is not None for item in items):
            nothing, options["chunking"] = self._continuation.nothing(), self._continuation.config
            batch["continued"] = _stacked([item.continued or nothing for item in items], size)
        if noise is not None:
            noise = np.concatenate([noise, np.repeat(noise[-1:], size - len(noise), axis=0)])
        start = time.perf_counter()
        try:
            actions = np.asarray(self._sampler.sample(batch, noise, **options))
        except Exception as error:
            return [error] * len(items)
        infer_ms = 1000 * (time.perf_counter() - start)
        return [self._finished(item, actions[i], infer_ms) for i, item in enumerate(items)]

    def _finished(self, item: Prepared, actions: np.ndarray, infer_ms: float) -> Reply | Exception:
        state = np.asarray(item.inputs["state"])
        try:
            outputs = self._outputs(state, actions)
        except Exception as error:
            return error
        warnings = {"warnings": item.warnings} if item.warnings else {}
        trace = {} if item.trace is None else {TRACE: {**item.trace, stages.ACTIONS: actions}}
        return {**outputs, **warnings, **trace, "policy_timing": {"infer_ms": infer_ms}}

    def _outputs(self, state: np.ndarray, actions: np.ndarray) -> Reply:
        try:
            outputs = self._to_robot({"state": state, "actions": actions})
        except UndecodableActionsError as error:
            outputs = self._stand_still(state, error)
        _check_finite(outputs)
        return outputs

    def _stand_still(self, state: np.ndarray, error: UndecodableActionsError) -> dict:
        self.num_undecodable += 1
        logger.warning("no action chunk was written (%d so far): %s", self.num_undecodable, error)
        if self._hold is None:
            raise error
        return {**self._hold({"state": state}), "held": True}

    def view(self, obs: dict) -> dict[str, object]:
        """What the model sees of an observation, unchecked: `image` {slot: [h, w, 3]}, `state` before it is normalised,
        `prompt`. For people to look at.
        """
        data = _copied(Request.parse(obs).observation)
        seen: dict[str, Any] = {"prompt": data.get("prompt")}
        for step in self._unchecked_steps:
            if isinstance(step, _transforms.Normalize):
                seen["state"] = data.get("state")
            data = step(data)
        return {"state": data.get("state"), **seen, "image": data.get("image", {})}

    def warm_up(self, obs: dict, *, batch_size: int = 1) -> None:
        """Compiles for observations like this one, unchecked: an example need not look like the training data.

        `infer_batch` then runs batches of this size.

        Raises:
            ExampleError: the transforms do not take it.
        """
        warm_up = getattr(self._sampler, "warm_up", None)
        if warm_up is None:
            return
        try:
            inputs = self._to_model_unchecked(_copied(Request.parse(obs).observation))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ExampleError(f"{type(error).__name__}: {error}") from error
        batch = _stacked([inputs], batch_size)
        warm_up(batch, **self._sample_kwargs)
        if self._continuation is not None:
            batch["continued"] = _stacked([self._continuation.nothing()], batch_size)
            self._warm_up_continuing(warm_up, batch, self._continuation)
        self._compiled_sizes = tuple(sorted({*self._compiled_sizes, batch_size}))

    def _warm_up_continuing(self, warm_up: Callable[..., None], batch: Params, continuation: Continuation) -> None:
        """A device without the memory for a backward pass serves all the same, if nobody asked for one; and once it is
        offered it stays so: of larger batches only the size is given up.
        """
        try:
            warm_up(batch, **self._sample_kwargs, chunking=continuation.config)
        except Exception:
            if continuation.is_asked_for or len(batch["state"]) > 1:
                raise
            logger.exception("Real-time chunking does not run here, and is off; try --rtc-jacobian=identity")
            self._continuation = self.rtc_metadata = None

    @property
    def batch_sizes(self) -> tuple[int, ...] | None:
        """Sizes of batches that run without compiling, ascending; None = any."""
        return self._compiled_sizes if getattr(self._sampler, "compiles", hasattr(self._sampler, "warm_up")) else None

    @property
    def warms_up_beside(self) -> bool:
        """Whether another batch size may be warmed up while another thread infers."""
        return getattr(self._sampler, "warms_up_beside", False)

    def _checked_noise(self, noise: np.ndarray, batch_size: int) -> np.ndarray:
        if not self._sampler.takes_noise:
            raise ValueError("noise was given, but this model writes its actions token by token; leave noise out")
        given, noise = noise, np.asarray(noise, dtype=np.float32)
        noise = noise[None] if noise.ndim == 2 and batch_size == 1 else noise
        expected = (batch_size, self._sampler.action_horizon, self._sampler.action_dim)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {np.shape(given)}; expected {expected[1:]}, or {expected}")
        return noise


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request as the model takes it.

    Attributes:
        inputs: un-batched model inputs.
        warnings: what was suspicious about the observation.
        noise: f32[ah ad] that it brought; None = none.
        continued: what its chunk goes on from, as of `Continuation.prepare`; None = it begins anew.
        trace: its stages, as of `stages.walk`; None = not asked for.
    """

    inputs: Mapping[str, Any]
    warnings: list[str]
    noise: np.ndarray | None = None
    continued: Mapping[str, np.ndarray] | None = None
    trace: Mapping[str, Any] | None = None


def _own_noise(items: Sequence[Prepared]) -> np.ndarray | None:
    """f32[b ah ad] of requests that all brought some; None where none did."""
    brought = [item.noise for item in items if item.noise is not None]
    return np.stack(brought) if brought else None


def _form(inputs: Tree) -> object:
    """What has to be equal for two inputs to be in one batch: stacked, bytes would become floats beside floats, and
    pictures in 0..255 be taken for others in [-1, 1].
    """
    return tuple((key, _form(value) if isinstance(value, Mapping) else _kind(value)) for key, value in inputs.items())


def _kind(value: object) -> tuple[tuple[int, ...], np.dtype]:
    array = np.asarray(value)
    return array.shape, array.dtype


def _parts(indices: list[int], sizes: tuple[int, ...] | None) -> list[list[int]]:
    """Batches of at most the largest size."""
    largest = max(sizes) if sizes else len(indices)
    return [indices[start : start + largest] for start in range(0, len(indices), largest)]


def _size_for(count: int, sizes: tuple[int, ...] | None) -> int:
    return count if sizes is None else min((size for size in sizes if size >= count), default=count)


def _check_finite(outputs: Mapping[str, object]) -> None:
    """Raises ActionsError for NaN or infinity among the actions, also as float32: motors would get them. Output
    transforms of a user's own may have made a map of them, or given them other names.
    """
    leaves = flatten(outputs)
    actions = [value for key, value in leaves.items() if key.partition("/")[0] == "actions"] or leaves.values()
    for array in map(np.asarray, actions):
        where = first_not_finite(array) if array.dtype.kind == "f" else None
        if where is not None:
            raise ActionsError(
                f"the policy's actions are not finite (first at [step, dimension] {where}): its weights or statistics "
                "are damaged, as by training on NaN. Serve an earlier checkpoint"
            )


def _copied(tree: Mapping[str, object]) -> Params:
    """New dicts around the same arrays, so that a transform that edits its dict spares the caller's."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _stacked(inputs: Sequence[Mapping[str, object]], size: int) -> Params:
    """One batch of un-batched inputs; the last one again up to `size`."""
    rows = [*inputs, *[inputs[-1]] * (size - len(inputs))]
    return {key: _stacked_values([row[key] for row in rows]) for key in inputs[0]}


def _stacked_values(values: Sequence[Any]) -> object:
    if isinstance(values[0], Mapping):
        return _stacked(values, len(values))
    return np.asarray(values[0])[None] if len(values) == 1 else np.stack([np.asarray(value) for value in values])
