"""`Pi0FASTConfig`: everything that decides a pi0-FAST model. No JAX here.

Source: the model specification, sections 1.2 and 9.2.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.models import gemma_config, siglip_config
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import (
    IMAGE_RESOLUTION,
    ArraySpec,
    BaseModelConfig,
    ModelType,
    freeze_nothing,
    prompted_images_spec,
)
from openpi.models.pi0_config import LoRAFreeze, check_shared_fields
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.ranges import Count

if TYPE_CHECKING:
    import jax

    from openpi.models.pi0_fast import Pi0FAST

FAST_IMAGE_KEYS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
_PUBLISHED_DECODING_STEPS = 256


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
        action_tokenizer_path: folder of a FAST processor, or its name on the Hugging Face hub; None = the published.
        tokenizer_path, image_encoder_variant, image_resolution, augmentation, remat, skip_unused: as of `Pi0Config`.
        image_keys: cameras that `inputs_spec` describes; the model itself takes those of the observation, by name.
    """

    dtype: str = "bfloat16"
    paligemma_variant: str | GemmaConfig = "gemma_2b"

    action_dim: Count = 32
    action_horizon: Count = 32
    max_token_len: Count = 250

    fast_model_tokenizer: Any | None = None
    fast_model_tokenizer_kwargs: dict[str, Any] | None = dataclasses.field(default=None, hash=False)

    action_tokenizer_path: str | None = None
    tokenizer_path: str | None = None
    image_encoder_variant: str | SiglipConfig = "So400m/14"
    image_resolution: tuple[Count, Count] = IMAGE_RESOLUTION
    image_keys: tuple[str, ...] = FAST_IMAGE_KEYS
    augmentation: bool = True
    remat: str = "full"
    skip_unused: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_shared_fields(self)
        _ = self.expert  # an unknown variant is named now
        self._check_tokenizer_arguments()

    def _check_tokenizer_arguments(self) -> None:
        if self.fast_model_tokenizer is None:
            return
        try:
            inspect.signature(self.fast_model_tokenizer).bind(self.max_token_len, **self.tokenizer_arguments())
        except TypeError as error:
            name = getattr(self.fast_model_tokenizer, "__name__", self.fast_model_tokenizer)
            raise ValueError(
                f"the action tokenizer {name} does not take its arguments ({error}): tokenizer_path is passed as "
                "model_path, action_tokenizer_path as fast_tokenizer_path, the rest is fast_model_tokenizer_kwargs. "
                "Only FAST has an action tokenizer that is trained: for another class leave action_tokenizer_path out"
            ) from error

    def tokenizer_arguments(self) -> dict[str, object]:
        """What the action tokenizer is made with, besides `max_token_len`."""
        arguments = dict(self.fast_model_tokenizer_kwargs or {})
        if self.tokenizer_path is not None:
            arguments.setdefault("model_path", self.tokenizer_path)
        if self.action_tokenizer_path is not None:
            arguments.setdefault("fast_tokenizer_path", self.action_tokenizer_path)
        return arguments

    @property
    def max_decoding_steps(self) -> int:
        """Tokens that an answer may have: as published, but never fewer than one in training may have had."""
        return max(_PUBLISHED_DECODING_STEPS, self.max_token_len)

    @property
    def expert(self) -> GemmaConfig:
        """Dims of PaliGemma's language model."""
        return gemma_config.get_config(self.paligemma_variant)

    @property
    def experts(self) -> tuple[GemmaConfig]:
        """The one expert, as `Pi0Config` has two."""
        return (self.expert,)

    @property
    def image_encoder(self) -> SiglipConfig:
        """Dims of the image encoder."""
        return siglip_config.get_config(self.image_encoder_variant)

    @property
    def model_type(self) -> ModelType:
        return ModelType.PI0_FAST

    def create(self, rng: jax.Array) -> Pi0FAST:
        from openpi.models import pi0_fast

        return pi0_fast.Pi0FAST(self, pi0_fast.init(self, rng))

    def _observation_spec(self) -> dict[str, ArraySpec]:
        length = (self.max_token_len,)
        return {
            **prompted_images_spec(self, self.image_keys, self.image_resolution),
            "token_ar_mask": ArraySpec(length, np.dtype(np.int32)),
            "token_loss_mask": ArraySpec(length, np.dtype(np.bool_)),
        }

    def get_freeze_filter(self) -> Callable[[str], bool]:
        """Freezes the transformer weights under LoRA, except the adapters themselves."""
        if not self.expert.has_lora:
            return freeze_nothing
        return LoRAFreeze(prefix=True, suffix=True)
