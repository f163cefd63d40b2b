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
from numpy.typing import DTypeLike

from openpi.models.augment import augment_images
from openpi.models.model_config import (
    IMAGE_KEYS,
    IMAGE_RESOLUTION,
    ArraySpec,
    BaseModelConfig,
    ModelType,
)
from openpi.models.observation import Observation
from openpi.shared import download
from openpi.shared.image_tools import resize_with_pad
from openpi.shared.tree import Params, differences, flatten, unflatten
from openpi.weights import on_device, opening, orbax_io, published_tree
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

logger = logging.getLogger(__name__)

Actions = Float[Array, "*b ah ad"]


jax.tree_util.register_dataclass(Observation)


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


def inputs_spec(sample: Mapping[str, ArraySpec], batch_size: int) -> tuple[Observation, Actions]:
    """Of a batch of such samples, with leaves of JAX."""
    leaves = {path: jax.ShapeDtypeStruct((batch_size, *spec.shape), spec.dtype) for path, spec in sample.items()}
    tree = unflatten(leaves)
    actions, images, masks = (tree.pop(key) for key in ("actions", "image", "image_mask"))
    return Observation(images=images, image_masks=masks, **tree), actions


@dataclasses.dataclass(frozen=True)
class BaseModel(abc.ABC):
    """A model: static configuration and the published parameter tree. A pytree, so it passes through `jit`.

    Attributes:
        config: dimensions and options.
        params: nested dicts of arrays, as on disk.
    """

    config: Any
    params: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(cls, data_fields=["params"], meta_fields=["config"])

    @property
    def action_dim(self) -> int:
        return self.config.action_dim

    @property
    def action_horizon(self) -> int:
        return self.config.action_horizon

    @property
    def max_token_len(self) -> int:
        return self.config.max_token_len

    def replace(self, *, params: Params) -> Self:
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
    dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Params:
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
    weights = opening.open_tree(opening.stored_shapes(folder), folder)
    if restore_type is np.ndarray:
        return published_tree.tree_of(weights, dtype=dtype)
    return on_device.read_params(weights, dtype=dtype, sharding=sharding)


def match_params(expected: Mapping[str, object], params: Mapping[str, object], *, remove_extra: bool) -> Params:
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
