"""Observation dict -> action-chunk dict: transforms around a sampler."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from openpi import transforms as _transforms
from openpi.models.fast_codec import UndecodableActionsError
from openpi.policies.contract import Contract
from openpi.policies.guards import ContractGuard, RangeGuard
from openpi.policies.recorder import PolicyRecorder
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger("openpi")

__all__ = ["BasePolicy", "Policy", "PolicyRecorder", "Sampler"]


class Sampler(Protocol):
    """A model made fast on a device; `policies.sampler_jax.JaxSampler` is one."""

    takes_noise: bool
    action_horizon: int
    action_dim: int

    def sample(self, inputs: Mapping[str, Any], noise: np.ndarray | None, **sample_kwargs: Any) -> np.ndarray:
        """f32[b ah ad] for a batched model-side dict; returns when the numbers are there."""
        ...


class ActionsError(ValueError):
    """Actions that no robot may get."""


class ExampleError(ValueError):
    """An observation made up for warming up is not what the transforms take."""


class Policy(BasePolicy):
    """Runs one observation through transforms, model and back.

    Attributes:
        metadata: sent to robots when they connect.
        contract: what observations are checked against; None = unchecked.
        num_undecodable: answers so far for which the model wrote no action chunk.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        transforms: Sequence[_transforms.DataTransformFn] = (),
        output_transforms: Sequence[_transforms.DataTransformFn] = (),
        sample_kwargs: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        contract: Contract | None = None,
        hold_transforms: Sequence[_transforms.DataTransformFn] | None = None,
    ) -> None:
        """
        Args:
            transforms: observation -> un-batched model inputs.
            output_transforms: `{"state", "actions"}` as the model has them -> what the robot gets.
            sample_kwargs: passed to the sampler with every call, such as `num_steps`.
            contract: checked first, unless the transforms hold a `ContractGuard` at a later place.
            hold_transforms: `{"state"}` as the model has it -> actions for standing still, the answer when the model
                wrote no action chunk; None = that is an error.
        """
        is_guarded = contract is None or any(isinstance(t, ContractGuard) for t in transforms)
        guards = [] if contract is None or is_guarded else [ContractGuard(contract)]
        self._sampler = sampler
        self._to_model = _transforms.compose([*guards, *transforms])
        unguarded = [t for t in transforms if not isinstance(t, (ContractGuard, RangeGuard))]
        self._to_model_unchecked = _transforms.compose(unguarded)
        self._to_robot = _transforms.compose(output_transforms)
        self._hold = None if hold_transforms is None else _transforms.compose(hold_transforms)
        self.num_undecodable = 0
        self._sample_kwargs = dict(sample_kwargs or {})
        self.metadata = dict(metadata or {})
        self.contract = contract

    def infer(self, obs: dict, *, noise: np.ndarray | None = None) -> dict:
        """A chunk of actions.

        Args:
            obs: client keys, un-batched NumPy values; not modified.
            noise: f32[ah, ad] or [1, ah, ad] that the chunk is made from; None = drawn.
        Returns:
            `actions` float[ah, d] in the robot's units, and `policy_timing/infer_ms`, the time the model
            took. `held` true when the actions stand still because the model wrote no chunk.
        Raises:
            UndecodableActionsError: the model wrote no chunk, and the policy has no `hold_transforms`.
            ActionsError: the actions are not finite.
            ObservationError, KeyError: the observation does not fit; field, found, expected and fix are named.
        """
        inputs = self._to_model(_copied(obs))
        batched = {key: _with_batch_axis(value) for key, value in inputs.items()}
        noise = None if noise is None else self._batched_noise(noise)
        start = time.perf_counter()
        actions = self._sampler.sample(batched, noise, **self._sample_kwargs)
        infer_ms = 1000 * (time.perf_counter() - start)
        state = np.asarray(inputs["state"])
        try:
            outputs = self._to_robot({"state": state, "actions": np.asarray(actions)[0]})
        except UndecodableActionsError as error:
            outputs = self._stand_still(state, error)
        _check_finite(outputs)
        return {**outputs, "policy_timing": {"infer_ms": infer_ms}}

    def _stand_still(self, state: np.ndarray, error: UndecodableActionsError) -> dict:
        self.num_undecodable += 1
        logger.warning("no action chunk was written (%d so far): %s", self.num_undecodable, error)
        if self._hold is None:
            raise error
        return {**self._hold({"state": state}), "held": True}

    def warm_up(self, obs: dict) -> None:
        """Compiles for observations like this one, unchecked: an example need not look like the training data.

        Raises:
            ExampleError: the transforms do not take it.
        """
        warm_up = getattr(self._sampler, "warm_up", None)
        if warm_up is None:
            return
        try:
            inputs = self._to_model_unchecked(_copied(obs))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ExampleError(f"{type(error).__name__}: {error}") from error
        warm_up({key: _with_batch_axis(value) for key, value in inputs.items()}, **self._sample_kwargs)

    def _batched_noise(self, noise: np.ndarray) -> np.ndarray:
        if not self._sampler.takes_noise:
            raise ValueError("noise was given, but this model writes its actions token by token; leave noise out")
        noise = np.asarray(noise, dtype=np.float32)
        batched = noise[None] if noise.ndim == 2 else noise
        expected = (1, self._sampler.action_horizon, self._sampler.action_dim)
        if batched.shape != expected:
            raise ValueError(f"noise has shape {noise.shape}; expected {expected[1:]}, or {expected}")
        return batched


def _check_finite(outputs: Mapping[str, Any]) -> None:
    """Raises ActionsError for NaN or infinity among the actions, which motors would get."""
    actions = np.asarray(outputs.get("actions", 0.0))
    if actions.dtype.kind == "f" and not np.isfinite(actions).all():
        where = np.argwhere(~np.isfinite(actions))[0].tolist()
        raise ActionsError(
            f"the policy's actions are not finite (first at [step, dimension] {where}): its weights or statistics are "
            "damaged, as by training on NaN. Serve an earlier checkpoint"
        )


def _copied(tree: Any) -> Any:
    """New dicts around the same arrays, so that a transform that edits its dict spares the caller's."""
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _with_batch_axis(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_batch_axis(item) for key, item in value.items()}
    return np.asarray(value)[None]
