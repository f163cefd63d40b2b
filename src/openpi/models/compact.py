"""Batches without what changes no number: cameras that every sample masks, and the padding of prompts.

Which cameras and how long a prompt are part of a compiled program, so lengths go up in steps of `PROMPT_STEP`.
NumPy on the host; `cut` also takes JAX arrays. Source: the model specification, sections 5.1 and 5.2: masked tokens do
not advance positions, and nobody attends to them.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.shared.tree import Tree

PROMPT_STEP = 32  # tokens
_PROMPT_FIELDS = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")


@dataclasses.dataclass(frozen=True)
class Extent:
    """How much of a padded batch is used.

    Attributes:
        cameras: those that at least one sample shows, in the batch's order.
        prompt_len: tokens, a multiple of `PROMPT_STEP` or the whole length; None = no prompts.
    """

    cameras: tuple[str, ...]
    prompt_len: int | None

    def holds(self, other: Extent) -> bool:
        """Whether a batch of the other extent can be cut to this one."""
        return set(other.cameras) <= set(self.cameras) and (other.prompt_len or 0) <= (self.prompt_len or 0)


def reads_masked(config: BaseModelConfig, *, exact_slots: bool = False) -> bool:
    """Whether sampling reads places of masked tokens, so that batches with a masked camera have to stay as they are.

    pi0-FAST does while it decodes, unless told `exact_slots` (the model specification, section 7.2).
    """
    return config.model_type is ModelType.PI0_FAST and not exact_slots


def whole_extent(inputs: Tree) -> Extent:
    """Everything that a batch has."""
    prompt = inputs.get("tokenized_prompt")
    return Extent(tuple(inputs["image"]), None if prompt is None else prompt.shape[-1])


def used_extent(inputs: Tree, *, reads_masked: bool = False) -> Extent:
    """What a batch of model inputs (`image`, `image_mask`, `tokenized_prompt`, ...) uses.

    A camera without a mask is used. One camera stays, and one step of prompt, where nothing is used at all.

    Args:
        reads_masked: of the model, see there.
    """
    whole = whole_extent(inputs)
    masks = inputs["image_mask"]
    if reads_masked and not all(np.all(mask) for mask in masks.values() if mask is not None):
        return whole
    used = tuple(key for key in whole.cameras if masks.get(key) is None or np.any(masks[key]))
    cameras = used or whole.cameras[:1]
    if whole.prompt_len is None:
        return Extent(cameras, None)
    is_token = np.asarray(inputs["tokenized_prompt_mask"]).reshape(-1, whole.prompt_len).any(axis=0)
    num_tokens = int(np.max(np.flatnonzero(is_token), initial=0)) + 1
    return Extent(cameras, min(-(-num_tokens // PROMPT_STEP) * PROMPT_STEP, whole.prompt_len))


def longer(extent: Extent, whole: Extent) -> Extent:
    """One step of prompt more, where there is more."""
    if extent.prompt_len is None or whole.prompt_len is None:
        return extent
    return dataclasses.replace(extent, prompt_len=min(extent.prompt_len + PROMPT_STEP, whole.prompt_len))


def cut(inputs: Tree, extent: Extent) -> dict[str, object]:
    """The batch without the images of other cameras, whose masks become None, and without longer prompts."""
    prompts = {key: inputs[key][..., : extent.prompt_len] for key in _PROMPT_FIELDS if inputs.get(key) is not None}
    masks = {key: mask for key, mask in inputs["image_mask"].items() if key in extent.cameras or mask is None}
    dropped = dict.fromkeys(key for key in inputs["image"] if key not in extent.cameras)
    images = {key: image for key, image in inputs["image"].items() if key in extent.cameras}
    return {**inputs, **prompts, "image": images, "image_mask": masks | dropped}
