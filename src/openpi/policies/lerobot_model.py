"""Which models LeRobot 0.6.1 can build, and what its config calls their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpi.models import gemma_config, siglip_config
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import FASTTokenizer, load_sentencepiece
from openpi.shared.errors import listed

# Its PaliGemma projects pictures to 2048 values, whatever the language model takes: that is gemma_2b.
_SIZES = {"paligemma_variant": ("gemma_2b",), "action_expert_variant": ("gemma_2b", "gemma_300m")}
_IMAGE_ENCODER = "So400m/14"
_RESOLUTION = (224, 224)


def variants(model_config: Any) -> dict[str, str]:
    """The fields of LeRobot's config that name the sizes; those that it has no name for are left out."""
    found = {field: _name(field, size) for field, size in zip(_SIZES, model_config.experts, strict=False)}
    return {field: name for field, name in found.items() if name is not None}


def obstacles(model_config: Any) -> Iterator[str]:
    """Why LeRobot cannot build this model, or would build another one; nothing if it can."""
    for field, size in zip(_SIZES, model_config.experts, strict=False):
        if _name(field, size) is None:
            yield f"{field}={getattr(model_config, field)!r}: it builds {listed(_SIZES[field])} only"
    if model_config.image_encoder != siglip_config.get_config(_IMAGE_ENCODER):
        yield f"image_encoder_variant={model_config.image_encoder_variant!r}: it builds '{_IMAGE_ENCODER}' only"
    yield from _image_obstacles(model_config)
    yield from _prompt_obstacles(model_config)


def _image_obstacles(model_config: Any) -> Iterator[str]:
    height, width = model_config.image_resolution
    if model_config.model_type is ModelType.PI0_FAST and (height, width) != _RESOLUTION:
        yield f"image_resolution={(height, width)}: it builds pi0-FAST for {_RESOLUTION} only"
    elif height != width:
        yield f"image_resolution={(height, width)}: it takes square images only"


def _prompt_obstacles(model_config: Any) -> Iterator[str]:
    kind = model_config.model_type
    states = {ModelType.PI0: False, ModelType.PI05: True}
    if kind in states and model_config.discrete_state_input is not states[kind]:
        yield f"discrete_state_input={model_config.discrete_state_input}: its {kind.value} has {states[kind]}"
    path = model_config.tokenizer_path
    if path is not None and load_sentencepiece(path).vocab_size() != gemma_config.PALIGEMMA_VOCAB_SIZE:
        yield f"tokenizer_path={path}: it uses PaliGemma's own tokenizer, of {gemma_config.PALIGEMMA_VOCAB_SIZE} tokens"
    if kind is not ModelType.PI0_FAST:
        return
    if model_config.fast_model_tokenizer not in (None, FASTTokenizer):
        yield f"fast_model_tokenizer={model_config.fast_model_tokenizer.__name__}: it has FAST only"
    path = model_config.tokenizer_arguments().get("fast_tokenizer_path")
    if path is not None and Path(path).exists():
        yield f"action_tokenizer_path={path}: it fetches action tokenizers by their name on the hub"


def _name(field: str, size: GemmaConfig) -> str | None:
    return next((name for name in _SIZES[field] if gemma_config.get_config(name) == size), None)
