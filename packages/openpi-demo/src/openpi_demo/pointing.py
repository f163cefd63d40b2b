"""The co-training loss of the shipped base: point at the object that the prompt names.

Flow matching alone never connects words to things on a small budget; naming the image patch that holds the asked
object does. It plays the part that localisation data plays for the released base. Fine-tuning does not need it: the
extra head is dropped when a plain `Pi0Config` loads the parameters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from openpi.models import gemma, pi0
from openpi.models.model import Actions, Observation
from openpi.models.pi0_config import Pi0Config


@dataclasses.dataclass(frozen=True)
class PointingPi0Config(Pi0Config):
    """pi0.5 with a pointing head while it is trained.

    Attributes:
        pointing_weight: of the pointing loss beside the flow-matching loss.
    """

    pointing_weight: float = 0.2

    def create(self, rng: jax.Array) -> PointingPi0:
        head = {"kernel": jnp.zeros((self.experts[0].width, 1)), "bias": jnp.zeros(1)}
        return PointingPi0(self, pi0.init(self, rng) | {"pointing_head": head})


@dataclasses.dataclass(frozen=True)
class PointingPi0(pi0.Pi0):
    """See `PointingPi0Config`; sampling is pi0.5's."""

    config: PointingPi0Config
    params: dict[str, Any]

    def compute_loss(
        self, rng: jax.Array, observation: Observation, actions: Actions, *, train: bool = False
    ) -> Float[Array, "b ah"]:
        """Flow matching plus the weighted pointing loss of each sample.

        `observation.extras[<camera key>]` holds int32[b], the patch of the asked object, -1 where out of view;
        without extras only the flow-matching loss is left (validation on data without labels).
        """
        preprocess_rng, noise_rng, time_rng = jax.random.split(rng, 3)
        observation = self.preprocess(preprocess_rng, observation, train=train)
        prefix = pi0.embed_prefix(self.config, self.params, observation)
        hidden, kv_cache = self._encode(prefix)
        draws = self.config.loss_draws
        noise = jax.random.normal(noise_rng, (draws, *actions.shape))
        time = pi0.draw_time(time_rng, (draws, len(actions)))
        flow = pi0.loss_over_draws(
            self.config, self.params, observation.state, actions, noise, time, prefix.mask, kv_cache
        )
        if observation.extras is None:
            return flow
        return flow + self.config.pointing_weight * self._pointing_loss(hidden, observation)[:, None]

    def _encode(self, prefix: pi0.Tokens) -> tuple[Array, gemma.KVCache]:
        (hidden, _), kv_cache = pi0.transformer(
            self.config,
            self.params,
            [prefix.embedded, None],
            positions=jnp.cumsum(prefix.mask, axis=1) - 1,
            mask=pi0.make_attention_mask(prefix.mask, prefix.ar_mask),
            cond=None,
        )
        assert hidden is not None
        return hidden, kv_cache

    def _pointing_loss(self, hidden: Float[Array, "b p d"], observation: Observation) -> Float[Array, " b"]:
        """Softmax cross-entropy over each camera's patches, summed over the cameras that see the object."""
        height, width = self.config.image_resolution
        patch = self.config.image_encoder.patch_size
        num_patches = (height // patch) * (width // patch)
        logits = pi0.project(self.params["pointing_head"], hidden)[..., 0].astype(jnp.float32)
        total, labels = jnp.zeros(hidden.shape[0]), observation.extras or {}
        for i, key in enumerate(key for key in self.config.image_keys if key in observation.images):
            log_probs = jax.nn.log_softmax(logits[:, i * num_patches : (i + 1) * num_patches])
            label = labels[key]
            picked = jnp.take_along_axis(log_probs, jnp.maximum(label, 0)[:, None], axis=1)[:, 0]
            total = total - jnp.where(label >= 0, picked, 0.0)
        return total
