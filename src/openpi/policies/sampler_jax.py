"""A JAX model made fast on a device: parameters placed once, sampling compiled once per input shape."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi.models import compact, rtc
from openpi.models.model import BaseModel, Observation
from openpi.policies.program import Extents, Options, Program, check_finite
from openpi.shared.tree import Tree


class JaxSampler:
    """Runs `sample_actions` of a model on batches of NumPy inputs.

    Without given noise, successive calls draw from a key that starts at `key(seed)`: a fresh process repeats the
    same sequence. It is drawn by a program of its own: given noise does not make another one of the model's. Calls must
    not overlap: the caller (a server) runs one at a time.
    """

    warms_up_beside = True  # another batch size, while another thread samples

    def __init__(self, model: BaseModel, *, seed: int | jax.Array = 0) -> None:
        self._model = jax.device_put(model)
        self._rng = jax.random.key(seed) if isinstance(seed, int) else seed
        self._sample = jax.jit(_sample, static_argnames="sample_kwargs", compiler_options=_compiler_options())
        self._extents = Extents(model.config)
        self.takes_noise = "noise" in inspect.signature(model.sample_actions).parameters
        self.action_horizon: int = model.action_horizon
        self.action_dim: int = model.action_dim

    def sample(self, inputs: Mapping[str, object], noise: np.ndarray | None, **sample_kwargs: object) -> np.ndarray:
        """Action chunks (of pi0-FAST, tokens) for a batch; returns when they are there.

        Args:
            inputs: batched model-side dict (`image`, `image_mask`, `state`, `tokenized_prompt`, ...); with `continued`,
                the fields of `rtc.Continued`, and the option `chunking` chunks go on from others.
            noise: f32[b ah ad] to start from, or None to draw it.
            sample_kwargs: hashable options of the model's `sample_actions`, such as `num_steps` or, for pi0-FAST,
                `temperature` and `grammar`; each new combination compiles once.
        Returns:
            f32[b ah ad] actions; from pi0-FAST, which takes no noise, f32[b m] tokens.
        """
        return self.program(inputs, noise, **sample_kwargs)()

    def program(self, inputs: Mapping[str, object], noise: np.ndarray | None, **sample_kwargs: object) -> Program:
        """What `sample` does with these arguments, part by part."""
        options = tuple(sorted(sample_kwargs.items()))
        self._rng, key = jax.random.split(self._rng)
        return self._program(compact.cut(inputs, self._extents.choose(inputs, options)), noise, options, key)

    def warm_up(self, inputs: Mapping[str, object], **sample_kwargs: object) -> None:
        """Compiles `sample` for inputs like these (`Extents.make_ready`); the sequence of noise stays where it is."""
        options = tuple(sorted(sample_kwargs.items()))
        _, key = jax.random.split(jax.random.key(0))  # compiled as well
        for extent in self._extents.make_ready(inputs, options):
            check_finite(self._program(compact.cut(inputs, extent), None, options, key)())

    def _program(
        self, inputs: Mapping[str, object], noise: np.ndarray | None, options: Options, key: jax.Array
    ) -> Program:
        kwargs = tuple((name, value) for name, value in options if name != "chunking")
        arguments: list[Any] = []
        outputs: list[jax.Array] = []

        def send() -> None:
            arguments[:] = self._arguments(inputs, noise, options, key)

        def run() -> None:
            outputs[:] = [self._sample(self._model, key, *arguments, sample_kwargs=kwargs)]

        return Program(send, run, lambda: np.asarray(outputs[0]), lambda: jax.block_until_ready((arguments, outputs)))

    def _arguments(
        self, inputs: Tree, noise: np.ndarray | None, options: Options, key: jax.Array
    ) -> tuple[Observation, jax.Array | None, rtc.Continued | None]:
        """Of `_sample`, on their way to the device."""
        observation = jax.tree.map(jnp.asarray, Observation.from_dict(inputs))
        start = None if noise is None else jnp.asarray(noise, jnp.float32)
        if start is None and self.takes_noise:
            start = _draw(key, (len(inputs["state"]), self.action_horizon, self.action_dim))
        continued = None
        if "continued" in inputs:
            rows = {name: jnp.asarray(value) for name, value in inputs["continued"].items()}
            continued = rtc.Continued(**rows, config=dict(options)["chunking"])
        return observation, start, continued


def _compiler_options() -> dict[str, str] | None:
    """On processors XLA multiplies in float32, and moves the widening of weights out of the loop over the layers: a
    second copy of all weights, of twice the size (11.4 GB for pi0.5). Left in the loop it is one layer at a time.
    """
    if jax.default_backend() != "cpu":
        return None
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def _sample(
    model: BaseModel,
    key: jax.Array,
    observation: Observation,
    noise: jax.Array | None,
    continued: rtc.Continued | None,
    *,
    sample_kwargs: tuple[tuple[str, object], ...],
) -> jax.Array:
    kwargs = dict(sample_kwargs)
    if noise is not None:
        kwargs["noise"] = noise
    if continued is not None:
        kwargs["continued"] = continued
    return model.sample_actions(key, observation, **kwargs)


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape)
