"""What a model sees of a robot, batched: arrays of NumPy, of JAX, or tensors of PyTorch. No framework here.

Source: the model specification, section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import GenericAlias
from typing import Any, Self

import numpy as np

from openpi.shared.errors import missing_key
from openpi.shared.tree import Params, Tree


@dataclasses.dataclass(frozen=True)
class Observation:
    """Model inputs, batched.

    Attributes:
        images: per camera f32[*b h w 3] in [-1, 1], RGB.
        image_masks: per camera bool[*b], false where the camera is padding. None = it is in the whole batch, and the
            camera has no images (see `openpi.models.compact`).
        state: f32[*b s], normalised and padded.
        tokenized_prompt: int[*b l]; with `tokenized_prompt_mask` bool[*b l], true on real tokens.
        token_ar_mask: int[*b l], 1 where a token starts a new attention block (pi0-FAST).
        token_loss_mask: bool[*b l], true on tokens that are trained (pi0-FAST).
        extras: labels that a recipe's own training loss reads; released models ignore them.
    """

    images: dict[str, Any]
    image_masks: dict[str, Any]
    state: Any
    tokenized_prompt: Any = None
    tokenized_prompt_mask: Any = None
    token_ar_mask: Any = None
    token_loss_mask: Any = None
    extras: dict[str, Any] | None = None

    __class_getitem__ = classmethod(GenericAlias)  # as published: `Observation[at.Array]` in signatures

    @classmethod
    def from_dict(cls, data: Tree) -> Self:
        """Builds an observation from the model-side sample keys; uint8 images become f32 in [-1, 1].

        Tensors of PyTorch are taken, too; uint8 images among them become [*b 3 h w], floats stay as they are.

        Raises:
            KeyError: `image`, `image_mask` or `state` is missing.
            ValueError: only one of `tokenized_prompt` and `tokenized_prompt_mask` is there.
        """
        for key in ("image", "image_mask", "state"):
            if key not in data:
                raise missing_key(key, data, wanted_by="Observation.from_dict")
        if ("tokenized_prompt" in data) != ("tokenized_prompt_mask" in data):
            raise ValueError(
                "'tokenized_prompt' and 'tokenized_prompt_mask' go together; "
                f"found only one of them among: {', '.join(sorted(data))}"
            )
        return cls(
            images={key: _to_unit_range(image) for key, image in data["image"].items()},
            image_masks=dict(data["image_mask"]),
            state=data["state"],
            tokenized_prompt=data.get("tokenized_prompt"),
            tokenized_prompt_mask=data.get("tokenized_prompt_mask"),
            token_ar_mask=data.get("token_ar_mask"),
            token_loss_mask=data.get("token_loss_mask"),
            extras=data.get("extras"),
        )

    def replace(self, **changes: Any) -> Self:
        """The same observation with other values in some fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> Params:
        """Inverse of `from_dict` in naming; images stay as they are, absent fields are left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {_BATCH_KEYS.get(name, name): value for name, value in fields.items() if value is not None}


_BATCH_KEYS = {"images": "image", "image_masks": "image_mask"}  # those that are other than the fields' names


def model_side(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What models take of a loader's batch: observation and actions, and no texts, for example."""
    taken = {_BATCH_KEYS.get(field.name, field.name) for field in dataclasses.fields(Observation)} | {"actions"}
    return {key: value for key, value in batch.items() if key in taken and value is not None}


def _to_unit_range(image: Any) -> object:
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255 * 2 - 1
    if str(image.dtype) == "torch.uint8":  # as published, with the channels first
        return image.float().movedim(-1, -3) / 255 * 2 - 1
    return image
