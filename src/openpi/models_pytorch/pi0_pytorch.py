"""pi0 and pi0.5 as the published PyTorch module: its calls and its names of parameters, over our own model.

    model = PI0Pytorch(config).to(device)
    safetensors.torch.load_model(model, "pi05_base_pytorch/model.safetensors")
    loss = model(observation, actions).mean()
    actions = model.sample_actions(device, observation)

Source: the model specification, section 11; names: the checkpoint specification, section 4.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models_pytorch import loading
from openpi.models_pytorch.augment import Draws
from openpi.models_pytorch.model import Observation, fresh_parameters
from openpi.models_pytorch.pi0 import Pi0
from openpi.weights import names, spelling

_TIME_BETA, _TIME_SCALE, _TIME_OFFSET = (1.5, 1.0), 0.999, 0.001
_MODEL = "model."  # of our own names, as they are in here
# By released name, what stays f32 in a model of bfloat16, besides the projections of state, actions and time.
_KEPT_F32 = ("embeddings.", "input_layernorm", "post_attention_layernorm", "model.norm")


class PI0Pytorch(nn.Module):
    """Freshly initialized from `torch`'s seed; `named_parameters`, `state_dict` and `load_state_dict` have the released
    names. Files with those of LeRobot or of our own modules are read as well.

    Nothing is compiled here, whatever `config.pytorch_compile_mode` says: the fast way to sample is
    `openpi.policies.policy_config.create_trained_policy`.

    Raises:
        ValueError: the configuration is of pi0-FAST, which was not published for PyTorch.
    """

    def __init__(self, config: Pi0Config) -> None:
        super().__init__()
        if not isinstance(config, Pi0Config):
            raise ValueError(
                f"PI0Pytorch is pi0 or pi0.5, and the configuration is a {type(config).__name__}; other models are "
                "made by openpi.models_pytorch.loading"
            )
        self.config = config
        self.model = cast(Pi0, loading.create(config))
        self._rows = names.rows(config)
        self._released = {_MODEL + row.torch: row.released for row in self._rows}
        wanted = [row.torch for row in self._rows]
        for name, values in fresh_parameters(self.model, wanted, torch.initial_seed()):
            loading.set_parameter(self.model, name, values)
        self.to_bfloat16_for_selected_params(config.dtype)
        self.register_state_dict_post_hook(_to_released)
        self.register_load_state_dict_pre_hook(_from_released)
        self.register_load_state_dict_post_hook(_report_released)

    def forward(
        self,
        observation: object,
        actions: Float[Tensor, "b ah ad"],
        noise: Float[Tensor, "b ah ad"] | None = None,
        time: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b ah ad"]:
        """Squared errors of the velocity, not yet reduced. In training mode images are augmented.

        Args:
            observation: of `openpi.models.model` or `openpi.models_pytorch.model`, with tensors.
            actions: normalized and padded.
            noise, time: None = drawn from `torch`'s generator.
        """
        observation = self._observation(observation)
        actions = actions.to(self._device, torch.float32)
        noise = torch.randn_like(actions) if noise is None else noise.to(actions)
        if time is None:
            alpha, beta = (torch.tensor(side) for side in _TIME_BETA)
            time = torch.distributions.Beta(alpha, beta).sample((len(actions),)) * _TIME_SCALE + _TIME_OFFSET
        delay, most = None, self.config.rtc_max_delay
        if most:  # half of them are 0, see `rtc_config`
            delay = torch.randint(1 - most, most + 1, (len(actions),)).clamp(min=0).to(self._device)
        draws = None
        if self.training:
            seed = int(torch.randint(2**62, ()))
            draws = Draws.draw(np.random.default_rng(seed), len(actions)).map(lambda x: x.to(self._device))
        return self.model.squared_errors(
            self.model.preprocess(observation, draws), actions, noise, time.to(self._device, torch.float32), delay
        )

    @torch.no_grad()
    def sample_actions(
        self,
        device: torch.device | str,
        observation: object,
        noise: Float[Tensor, "b ah ad"] | None = None,
        num_steps: int = 10,
    ) -> Float[Tensor, "b ah ad"]:
        """Action chunks, normalized, from noise in `num_steps` Euler steps.

        Args:
            device: of noise that is drawn, and of the result; the model computes where its parameters are.
            noise: None = drawn from `torch`'s generator.
        """
        observation = self._observation(observation)
        if noise is None:
            shape = (len(observation.state), self.config.action_horizon, self.config.action_dim)
            noise = torch.randn(shape, device=device)
        return self.model.sample_actions(observation, noise.to(self._device), num_steps=num_steps).to(device)

    def gradient_checkpointing_enable(self) -> None:
        """The backward pass computes layers again instead of keeping them."""
        self._remat("full")

    def gradient_checkpointing_disable(self) -> None:
        self._remat("none")

    def _remat(self, remat: str) -> None:
        self.config = self.model.config = dataclasses.replace(self.config, remat=remat)

    @property
    def paligemma_with_expert(self) -> Self:
        """Programs reach `to_bfloat16_for_selected_params` through it; there is one module here."""
        return self

    def to_bfloat16_for_selected_params(self, precision: str = "bfloat16") -> None:
        """Casts the parameters in place: `float32`, or `bfloat16` for all but norms, embeddings of patches and
        positions, and the projections of state, actions and time.

        Raises:
            ValueError: another precision.
        """
        if precision not in ("bfloat16", "float32"):
            raise ValueError(f"precision={precision!r}; expected 'bfloat16' or 'float32'")
        for name, parameter in self.named_parameters():
            is_kept = any(part in name for part in _KEPT_F32) or "paligemma_with_expert" not in name
            is_wide = precision == "float32" or is_kept
            parameter.data = parameter.data.to(torch.float32 if is_wide else torch.bfloat16)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        dot = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters("", recurse, remove_duplicate):
            yield dot + self._released.get(name, name), parameter  # a subclass may have more

    @property
    def _device(self) -> torch.device:
        return self.model.action_in_proj.weight.device

    def _observation(self, observation: object) -> Observation:
        given = {field.name: getattr(observation, field.name, None) for field in dataclasses.fields(Observation)}
        given["image"], given["image_mask"] = given.pop("images"), given.pop("image_masks")
        return Observation.from_dict(given, device=self._device)


def from_file(config: BaseModelConfig, path: Path | str) -> PI0Pytorch:
    """With the weights of a `model.safetensors`, on the CPU. Raises ValueError as of `PI0Pytorch`."""
    model = PI0Pytorch(cast(Pi0Config, config))
    safetensors.torch.load_model(model, path)
    return model


def _to_released(module: PI0Pytorch, state_dict: dict[str, object], prefix: str, metadata: object) -> None:
    del metadata
    for name, released in module._released.items():
        state_dict[prefix + released] = state_dict.pop(prefix + name)


def _from_released(module: PI0Pytorch, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """In place: our own names instead of those of a file, and nothing that no model reads."""
    stored = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    found = spelling.Spelling.of(stored, {row.torch: row.released for row in module._rows}).names
    for row in module._rows:
        if row.released in found:
            tensor = _same_tensor(found[row.released], stored)
            for name in found[row.released]:
                del state_dict[prefix + name]
            state_dict[f"{prefix}{_MODEL}{row.torch}"] = tensor
    for released, all_names in found.items():
        for name in all_names if spelling.is_known_unused(released) else ():
            del state_dict[prefix + name]


def _same_tensor(names: Sequence[str], stored: Mapping[str, Tensor]) -> Tensor:
    """What a file holds under names that mean one tensor."""
    first, *others = names
    for other in others:
        if not torch.equal(stored[first], stored[other].to(stored[first])):
            raise ValueError(
                f"'{first}' and '{other}' are two names of one tensor, and hold different values; take out the one "
                "that was not trained"
            )
    return stored[first]


def _report_released(module: PI0Pytorch, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [module._released.get(name, name) for name in missing]
