"""`Pi0Config`: everything that decides a pi0 or pi0.5 model. No JAX here.

Source: the model specification, section 1.1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from openpi.models import gemma_config, siglip_config
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import (
    IMAGE_KEYS,
    IMAGE_RESOLUTION,
    ArraySpec,
    BaseModelConfig,
    ModelType,
    freeze_nothing,
    prompted_images_spec,
)
from openpi.models.siglip_config import SiglipConfig
from openpi.shared import ranges
from openpi.shared.param_paths import ParamPath, joined
from openpi.shared.ranges import Count, WholeNumber

if TYPE_CHECKING:
    import jax

    from openpi.models.pi0 import Pi0
    from openpi.models.pi0_fast_config import Pi0FASTConfig

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_REMAT = ("full", "dots", "none")


@dataclasses.dataclass(frozen=True)
class Pi0Config(BaseModelConfig):
    """Configuration of pi0, and of pi0.5 with `pi05=True`.

    Attributes:
        dtype: activation dtype of image encoder and transformer (parameters keep their own).
        paligemma_variant, action_expert_variant: registered name or explicit dims of the two experts.
        max_token_len: None = 48 for pi0, 200 for pi0.5.
        pi05: flow time enters through adaptive norms, state through the prompt.
        discrete_state_input: whether the prompt carries the state; None = equal to `pi05`. Read by the
            data pipeline only.
        pytorch_compile_mode: `torch.compile` mode of the PyTorch backend; None = eager.
        image_encoder_variant: registered `NAME/PATCH` or explicit dims.
        image_resolution: (height, width) in pixels that the encoder sees.
        image_keys: cameras the model takes, in token order.
        tokenizer_path: sentencepiece model; None = PaliGemma's. A file, or `package:<package>/<file>`.
        augmentation: random crop, rotation and colour jitter while training.
        remat: what the backward pass recomputes: `full` keeps only layer inputs, `dots` also keeps matrix
            products, `none` keeps everything (fastest; for small models).
        loss_draws: (noise, time) pairs per observation in the loss; the prefix is computed once for all of them.
        rtc_max_delay: train for real-time chunking (`openpi.models.rtc_config`): the model is given the first actions
            of a chunk clean, so many at most, and learns to go on from them. 0 = off.
        skip_unused: leave out what changes no number: cameras that the whole batch masks, the padding of prompts, the
            last layer's answers that nobody reads, and flow times embedded anew at each step.
    """

    dtype: str = "bfloat16"
    paligemma_variant: str | GemmaConfig = "gemma_2b"
    action_expert_variant: str | GemmaConfig = "gemma_300m"

    action_dim: Count = 32
    action_horizon: Count = 50
    max_token_len: Count = None  # type: ignore[assignment]  # filled in __post_init__
    pi05: bool = False
    discrete_state_input: bool = None  # type: ignore[assignment]  # filled in __post_init__
    pytorch_compile_mode: str | None = "max-autotune"

    image_encoder_variant: str | SiglipConfig = "So400m/14"
    image_resolution: tuple[Count, Count] = IMAGE_RESOLUTION
    image_keys: tuple[str, ...] = IMAGE_KEYS
    tokenizer_path: str | None = None
    augmentation: bool = True
    remat: str = "full"
    loss_draws: Count = 1
    rtc_max_delay: WholeNumber = dataclasses.field(default=0, kw_only=True)
    skip_unused: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.max_token_len is None:
            object.__setattr__(self, "max_token_len", 200 if self.pi05 else 48)
        if self.discrete_state_input is None:
            object.__setattr__(self, "discrete_state_input", self.pi05)
        _check_choice("pytorch_compile_mode", self.pytorch_compile_mode, (None, *_COMPILE_MODES))
        check_shared_fields(self)
        self._check_dims()

    def _check_dims(self) -> None:
        prefix, suffix = self.experts
        for field in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(prefix, field) != getattr(suffix, field):
                raise ValueError(
                    f"the experts attend jointly, so they need the same {field}: paligemma_variant has "
                    f"{getattr(prefix, field)}, action_expert_variant has {getattr(suffix, field)}"
                )
        if self.rtc_max_delay >= self.action_horizon:
            raise ValueError(
                f"rtc_max_delay={self.rtc_max_delay} leaves nothing to learn of {self.action_horizon} actions "
                "(action_horizon); expected fewer"
            )
        if suffix.width % 2:
            raise ValueError(f"action expert width={suffix.width} must be even (sine and cosine of the flow time)")

    @property
    def experts(self) -> tuple[GemmaConfig, GemmaConfig]:
        """Dims of PaliGemma and of the action expert."""
        return gemma_config.get_config(self.paligemma_variant), gemma_config.get_config(self.action_expert_variant)

    @property
    def image_encoder(self) -> SiglipConfig:
        """Dims of the image encoder."""
        return siglip_config.get_config(self.image_encoder_variant)

    @property
    def model_type(self) -> ModelType:
        return ModelType.PI05 if self.pi05 else ModelType.PI0

    def create(self, rng: jax.Array) -> Pi0:
        from openpi.models import pi0

        return pi0.Pi0(self, pi0.init(self, rng))

    def _observation_spec(self) -> dict[str, ArraySpec]:
        return prompted_images_spec(self, self.image_keys, self.image_resolution)

    def get_freeze_filter(self) -> Callable[[str], bool]:
        """Freezes the transformer weights of each LoRA expert, except the adapters themselves."""
        prefix, suffix = self.experts
        if not (prefix.has_lora or suffix.has_lora):
            return freeze_nothing
        return LoRAFreeze(prefix=prefix.has_lora, suffix=suffix.has_lora)


@dataclasses.dataclass(frozen=True)
class LoRAFreeze:
    """Predicate on parameter paths: the non-adapter weights of the experts that carry LoRA.

    Source: the model specification, section 9.2. The adaptive norms of a LoRA action expert are frozen too,
    because the published rule goes by path.
    """

    prefix: bool
    suffix: bool

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        path = joined(path)
        if "llm" not in path or "lora" in path:
            return False
        is_suffix = re.search(r"llm.*_1", path) is not None
        return self.suffix if is_suffix else self.prefix


def check_shared_fields(config: Pi0Config | Pi0FASTConfig) -> None:
    """Raises ValueError unless the fields that pi0, pi0.5 and pi0-FAST share describe a model."""
    _check_choice("remat", config.remat, _REMAT)
    _check_choice("dtype", config.dtype, ("bfloat16", "float32"))
    ranges.check(config)
    if not config.image_keys:
        raise ValueError("image_keys is empty; expected the names of the cameras, such as 'base_0_rgb'")
    patch = config.image_encoder.patch_size
    if any(side % patch for side in config.image_resolution):
        raise ValueError(f"image_resolution={config.image_resolution} is not a multiple of the patch size {patch}")


def _check_choice(field: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r}; expected one of {', '.join(map(repr, choices))}")
