"""The mathematics of real-time chunking; see `openpi.models.rtc_config`. The PyTorch twin of `openpi.models.rtc`.

Time runs from 1 (noise) to 0 (data), u = noise - actions: signs are the opposite of the paper's.

Legend: b batch, ah action horizon, ad action dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from openpi.models.rtc_config import RtcConfig

Velocity = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Continued:
    """What is left of the chunks that robots are playing, for new ones to go on from; row 0 is due when the observation
    was made.

    Attributes:
        actions: as the model has them, normalized and padded.
        weights: of the guidance; all zero for a sample that begins anew, and in padded dims.
        delay: rows that are frozen; 0 for a sample that begins anew.
    """

    actions: Float[Tensor, "b ah ad"]
    weights: Float[Tensor, "b ah ad"]
    delay: Int[Tensor, " b"]
    config: RtcConfig

    @property
    def clean_rows(self) -> Int[Tensor, " b"] | None:
        """How many rows have the flow time of data; None for a model that knows one time for all rows."""
        return self.delay if self.config.is_trained else None

    def start(self, noise: Float[Tensor, "b ah ad"]) -> Float[Tensor, "b ah ad"]:
        """What the integration starts from."""
        return self._freeze(noise) if self.config.is_trained else noise

    def euler_step(
        self, velocity: Velocity, x_t: Float[Tensor, "b ah ad"], time: Float[Tensor, ""], dt: float
    ) -> Float[Tensor, "b ah ad"]:
        """One flow step of length `dt` (negative).

        Args:
            velocity: of a noisy chunk at `time`, its `clean_rows` at 0.
        """
        if self.config.is_trained:
            return self._freeze(x_t + dt * velocity(x_t))
        clip = -1 / dt if self.config.clip is None else self.config.clip
        return x_t + dt * guided(velocity, x_t, time, self, clip=clip)

    def _freeze(self, x: Float[Tensor, "b ah ad"]) -> Float[Tensor, "b ah ad"]:
        return torch.where(frozen_rows(self.delay, x.shape[1])[..., None], self.actions, x)


def frozen_rows(delay: Int[Tensor, "*b"], horizon: int) -> Bool[Tensor, "*b {horizon}"]:
    """True for the first `delay` rows."""
    return torch.arange(horizon, device=delay.device) < delay[..., None]


def token_times(time: Float[Tensor, "*b"], delay: Int[Tensor, "*b"], horizon: int) -> Float[Tensor, "*b {horizon}"]:
    """Flow time per action: `time`, and 0 (data) for frozen ones."""
    return torch.where(frozen_rows(delay, horizon), 0.0, time[..., None])


def guidance_weight(time: Float[Tensor, ""], clip: float) -> Float[Tensor, ""]:
    """w(t) = min(clip, (t^2 + (1-t)^2) / (t (1-t))); `clip` at both ends."""
    variance = time * (1 - time)
    weight = (time**2 + (1 - time) ** 2) / torch.where(variance > 0, variance, 1.0)
    return torch.where(variance > 0, weight.clamp(max=clip), clip)


def of_postfix(losses: Float[Tensor, "b ah *ad"], delay: Int[Tensor, " b"]) -> Float[Tensor, "b ah *ad"]:
    """Losses of the actions after the frozen ones, whose mean is that of each sample over its own."""
    horizon = losses.shape[1]
    weights = ~frozen_rows(delay, horizon) * (horizon / (horizon - delay))[:, None]
    return losses * weights.reshape(*weights.shape, *[1] * (losses.ndim - 2))


def guided(
    velocity: Velocity, x_t: Float[Tensor, "b ah ad"], time: Float[Tensor, ""], continued: Continued, *, clip: float
) -> Float[Tensor, "b ah ad"]:
    """The velocity that leads to a chunk like the one before: u - w(t) g, where g takes the error of the predicted
    chunk x0 = x_t - t u, times `weights`, back through x0(x_t). Gradients need not be enabled.
    """
    if not continued.config.needs_gradients:
        u_t = velocity(x_t)
        g = continued.weights * (continued.actions - (x_t - time * u_t))
    else:
        u_t, pull_back, *_ = torch.func.vjp(velocity, x_t)
        error = continued.weights * (continued.actions - (x_t - time * u_t))
        g = error - time * pull_back(error)[0]
    return u_t - guidance_weight(time, clip) * g
