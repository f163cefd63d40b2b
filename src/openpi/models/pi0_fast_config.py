"""`Pi0FASTConfig`: everything that decides a pi0-FAST model. No JAX here.

Source: the model specification, sections 1.2 and 9.2. The model itself is not part of this build: recipes,
data and tokens work, `create` and `load` say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from openpi.models import gemma_config
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import IMAGE_RESOLUTION, BaseModelConfig, ModelType, freeze_nothing
from openpi.models.pi0_config import LoRAFreeze

if TYPE_CHECKING:
    import jax

    from openpi.models.model import Actions, Observation

FAST_IMAGE_KEYS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class Pi0FASTConfig(BaseModelConfig):
    """Configuration of pi0-FAST, which writes actions as tokens.

    Attributes:
        dtype: activation dtype (parameters keep their own).
        paligemma_variant: registered name or explicit dims.
        action_dim: width of the robot's own actions: this model pads nothing.
        fast_model_tokenizer: class of the action tokenizer, called with `max_token_len`; None =
            `FASTTokenizer`.
        fast_model_tokenizer_kwargs: its further arguments.
    """

    dtype: str = "bfloat16"
    paligemma_variant: str | GemmaConfig = "gemma_2b"

    action_dim: int = 32
    action_horizon: int = 32
    max_token_len: int = 250

    fast_model_tokenizer: Any | None = None
    fast_model_tokenizer_kwargs: dict[str, Any] | None = None

    @property
    def model_type(self) -> ModelType:
        return ModelType.PI0_FAST

    def create(self, rng: jax.Array) -> NoReturn:
        _not_in_this_build()

    def abstract_params(self) -> NoReturn:
        _not_in_this_build()

    def load(self, params: Mapping[str, Any], *, remove_extra_params: bool = True) -> NoReturn:
        _not_in_this_build()

    def inputs_spec(self, *, batch_size: int = 1) -> tuple[Observation, Actions]:
        import jax
        import jax.numpy as jnp

        from openpi.models import model

        observation, actions = model.inputs_spec(
            self, batch_size, image_keys=FAST_IMAGE_KEYS, image_resolution=IMAGE_RESOLUTION
        )
        shape = (batch_size, self.max_token_len)
        masks = {
            "token_ar_mask": jax.ShapeDtypeStruct(shape, jnp.int32),
            "token_loss_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }
        return dataclasses.replace(observation, **masks), actions

    def get_freeze_filter(self) -> Callable[[str], bool]:
        """Freezes the transformer weights under LoRA, except the adapters themselves."""
        if not gemma_config.get_config(self.paligemma_variant).has_lora:
            return freeze_nothing
        return LoRAFreeze(prefix=True, suffix=True)


def _not_in_this_build() -> NoReturn:
    raise NotImplementedError("the pi0-FAST model is not part of this build; use a pi0 or pi0.5 recipe")
