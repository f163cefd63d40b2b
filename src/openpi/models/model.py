"""What a model takes and gives, batched, and what all models share.

Source: the model specification, section 2; loading: the checkpoint specification, section 1.3.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi.models.augment import augment_images
from openpi.models.model_config import (
    IMAGE_KEYS,
    IMAGE_RESOLUTION,
    BaseModelConfig,
    ModelType,
)
from openpi.shared import download
from openpi.shared.errors import missing_key
from openpi.shared.image_tools import resize_with_pad
from openpi.shared.tree import differences, flatten, unflatten
from openpi.weights import layout, on_device, orbax_io
from openpi.weights.adapter_base import AdapterBase

__all__ = [
    "IMAGE_KEYS",
    "IMAGE_RESOLUTION",
    "Actions",
    "BaseModel",
    "BaseModelConfig",
    "ModelType",
    "Observation",
    "preprocess_observation",
    "resize_with_pad",
    "restore_params",
]

logger = logging.getLogger("openpi")

Actions = Float[Array, "*b ah ad"]


@jax.tree_util.register_dataclass
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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
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

    def to_dict(self) -> dict[str, Any]:
        """Inverse of `from_dict` in naming; images stay as they are, absent fields are left out."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        renamed = {{"images": "image", "image_masks": "image_mask"}.get(k, k): v for k, v in fields.items()}
        return {key: value for key, value in renamed.items() if value is not None}


def _to_unit_range(image: Any) -> Any:
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255 * 2 - 1
    if str(image.dtype) == "torch.uint8":  # as published, with the channels first
        return image.float().movedim(-1, -3) / 255 * 2 - 1
    return image


def preprocess_observation(
    rng: jax.Array | None,
    observation: Observation,
    *,
    train: bool = False,
    image_keys: Sequence[str] = IMAGE_KEYS,
    image_resolution: tuple[int, int] = IMAGE_RESOLUTION,
) -> Observation:
    """Selects the model's cameras, brings them to its size, augments while training, fills in missing masks.

    Raises:
        ValueError: a camera is missing (found and expected are named).
    """
    dropped = [key for key, mask in observation.image_masks.items() if mask is None]
    image_keys = [key for key in image_keys if key not in dropped]
    missing = [key for key in image_keys if key not in observation.images]
    if missing:
        raise ValueError(
            f"observation is missing the cameras {missing}; the model takes {list(image_keys)}, "
            f"found {sorted(observation.images)}"
        )
    images = {}
    for key in image_keys:
        image = observation.images[key]
        images[key] = image if image.shape[-3:-1] == image_resolution else resize_with_pad(image, *image_resolution)
    if train:
        if rng is None:
            raise ValueError("training augmentation draws at random: pass rng")
        images = augment_images(rng, images)
    batch_shape = observation.state.shape[:-1]
    masks = {key: jnp.asarray(observation.image_masks.get(key, jnp.ones(batch_shape, bool))) for key in image_keys}
    return dataclasses.replace(observation, images=images, image_masks=masks | dict.fromkeys(dropped))


def inputs_spec(
    config: BaseModelConfig, batch_size: int, *, image_keys: Sequence[str], image_resolution: tuple[int, int]
) -> tuple[Observation, Any]:
    """Shapes and dtypes of the training inputs of pi0 and pi0.5."""
    b, length = batch_size, config.max_token_len
    leaf = jax.ShapeDtypeStruct
    observation = Observation(
        images={key: leaf((b, *image_resolution, 3), jnp.float32) for key in image_keys},
        image_masks={key: leaf((b,), jnp.bool_) for key in image_keys},
        state=leaf((b, config.action_dim), jnp.float32),
        tokenized_prompt=leaf((b, length), jnp.int32),
        tokenized_prompt_mask=leaf((b, length), jnp.bool_),
    )
    return observation, leaf((b, config.action_horizon, config.action_dim), jnp.float32)


@dataclasses.dataclass(frozen=True)
class BaseModel(abc.ABC):
    """A model: static configuration and the published parameter tree. A pytree, so it passes through `jit`.

    Attributes:
        config: dimensions and options.
        params: nested dicts of arrays, as on disk.
    """

    config: Any
    params: dict[str, Any]

    @property
    def action_dim(self) -> int:
        return self.config.action_dim

    @property
    def action_horizon(self) -> int:
        return self.config.action_horizon

    @property
    def max_token_len(self) -> int:
        return self.config.max_token_len

    def replace(self, *, params: dict[str, Any]) -> Self:
        """The same model around other parameters."""
        return dataclasses.replace(self, params=params)

    @abc.abstractmethod
    def compute_loss(
        self, rng: jax.Array, observation: Observation, actions: Actions, *, train: bool = False
    ) -> Float[Array, "*b ah"]:
        """Loss per sample and action step; draws noise and time from `rng`, augments when `train`."""

    @abc.abstractmethod
    def sample_actions(self, *args: Any, **kwargs: Any) -> Actions:
        """Action chunks for `(rng, observation)`; options depend on the family."""


def restore_params(
    params_path: Path | str,
    *,
    restore_type: type = np.ndarray,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, Any]:
    """Reads the parameter tree of a `params/` folder, released or written by training.

    Of a checkpoint that holds adapters only, the frozen rest is read from its base.

    Args:
        params_path: local folder, or a URL that is fetched into the cache first.
        restore_type: `np.ndarray` or `jax.Array`.
        dtype: cast every leaf while it is read; None keeps what is stored.
        sharding: placement of `jax.Array` leaves; default: the first device.
    Raises:
        FileNotFoundError: nothing there, or the base of adapters is not.
        ValueError: it is damaged, or the base is another than the adapters were trained on.
    """
    folder = download.maybe_download(str(params_path))
    if AdapterBase.load(folder.parent) is None:
        return orbax_io.read_params(folder, dtype=dtype, as_numpy=restore_type is np.ndarray, sharding=sharding)
    weights = layout.open_tree(layout.stored_shapes(folder), folder)
    if restore_type is np.ndarray:
        return layout.tree_of(weights, dtype=dtype)
    return on_device.read_params(weights, dtype=dtype, sharding=sharding)


def match_params(expected: Mapping[str, Any], params: Mapping[str, Any], *, remove_extra: bool) -> dict[str, Any]:
    """Checks a parameter tree against the model's; returns it without unknown leaves if `remove_extra`.

    Raises:
        ValueError: leaves are missing, unexpected or of another shape (the first ten are listed).
    """
    wanted, found = flatten(expected), flatten(params)
    extra = [path for path in found if path not in wanted]
    if extra and remove_extra:
        logger.info("ignoring %d parameters that the model does not have, such as %s", len(extra), extra[0])
        found = {path: leaf for path, leaf in found.items() if path in wanted}
    problems = differences(wanted, found)
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{len(problems)} parameters do not fit the model; the first are:\n  {shown}")
    return unflatten(found)


def make_attention_mask(input_mask: Bool[Array, "b n"], ar_mask: Int[Array, "*b n"]) -> Bool[Array, "b n n"]:
    """True where token i may attend to token j: j's block is not later than i's, and both are real.

    `ar_mask` is 1 where a new block starts; a block sees itself and all earlier ones:

        ar 0 0 0 1 0     rows attend to   1 1 1 0 0
                                          1 1 1 0 0
                                          1 1 1 0 0
                                          1 1 1 1 1
                                          1 1 1 1 1
    """
    blocks = jnp.cumsum(jnp.broadcast_to(ar_mask, input_mask.shape), axis=1)
    return (blocks[:, None, :] <= blocks[:, :, None]) & input_mask[:, None, :] & input_mask[:, :, None]
