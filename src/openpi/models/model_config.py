"""What every model's configuration shares. No JAX here: configs are plain data (ARCHITECTURE, "Imports")."""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from openpi.shared.param_paths import ParamPath
from openpi.shared.ranges import Count
from openpi.shared.tree import Params, flatten

if TYPE_CHECKING:
    import jax

    from openpi.models.gemma_config import GemmaConfig
    from openpi.models.model import Actions, BaseModel, Observation
    from openpi.models.siglip_config import SiglipConfig
    from openpi.models_pytorch.pi0_pytorch import PI0Pytorch

IMAGE_KEYS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
IMAGE_RESOLUTION = (224, 224)


class ModelType(enum.Enum):
    """The three published model families."""

    PI0 = "pi0"
    PI0_FAST = "pi0_fast"
    PI05 = "pi05"


class ArraySpec(NamedTuple):
    """An array without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class BaseModelConfig(abc.ABC):
    """Dimensions shared by all models; `create` and `load` build the model itself.

    Attributes:
        action_dim: width of state and action vectors after zero padding.
        action_horizon: actions per chunk.
        max_token_len: prompt length after padding, in tokens.
        skip_unused: the model takes batches without what changes no number (see `openpi.models.compact`).
    """

    action_dim: Count
    action_horizon: Count
    max_token_len: Count
    skip_unused: bool = dataclasses.field(default=False, kw_only=True)

    @property
    @abc.abstractmethod
    def model_type(self) -> ModelType:
        """Family, which decides prompt form and normalisation."""

    @abc.abstractmethod
    def create(self, rng: jax.Array) -> BaseModel:
        """A model with freshly initialised f32 parameters."""

    def abstract_params(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct` leaves; nothing is computed."""
        return self._outline().params

    def load(self, params: Mapping[str, object], *, remove_extra_params: bool = True) -> BaseModel:
        """A model around existing parameters of any float dtype.

        Args:
            params: the published tree (nested dicts).
            remove_extra_params: drop leaves that this model does not have instead of failing on them.
        Raises:
            ValueError: structure or shapes differ; every differing path is named.
        """
        import jax
        import jax.numpy as jnp

        from openpi.models import model

        outline = self._outline()
        matched = model.match_params(outline.params, params, remove_extra=remove_extra_params)
        return outline.replace(params=jax.tree.map(jnp.asarray, matched))

    def _outline(self) -> BaseModel:
        """What `create` makes, a subclass's own, too, with shapes for parameters."""
        import jax

        made: list[BaseModel] = []

        def params() -> Params:
            made.append(self.create(jax.random.key(0)))
            return made[-1].params

        shapes = jax.eval_shape(params)  # touches no device
        return made[-1].replace(params=shapes)

    def load_pytorch(self, train_config: object, weight_path: Path | str) -> PI0Pytorch:
        """The published PyTorch module with the weights of a `model.safetensors`, on the CPU.

        Args:
            train_config: that this is the model of, which programs pass; not looked at.
        Raises:
            ValueError: the model is pi0-FAST, which has no such module.
        """
        del train_config
        from openpi.models_pytorch import pi0_pytorch

        return pi0_pytorch.from_file(self, weight_path)

    def inputs_spec(self, *, batch_size: int = 1) -> tuple[Observation, Actions]:
        """Shapes and dtypes of the training inputs as `jax.ShapeDtypeStruct` leaves."""
        from openpi.models import model

        return model.inputs_spec(self._own_spec(), batch_size)

    def sample_spec(self) -> dict[str, ArraySpec]:
        """Of one training sample, `actions` included, by '/'-joined path. No JAX, but for a class with an `inputs_spec`
        of its own.
        """
        if type(self).inputs_spec is BaseModelConfig.inputs_spec:
            return self._own_spec()
        observation, actions = self.inputs_spec(batch_size=1)
        leaves = flatten({**observation.to_dict(), "actions": actions})
        return {path: ArraySpec(tuple(leaf.shape[1:]), np.dtype(leaf.dtype)) for path, leaf in leaves.items()}

    def _own_spec(self) -> dict[str, ArraySpec]:
        chunk = (self.action_horizon, self.action_dim)
        return {**self._observation_spec(), "actions": ArraySpec(chunk, np.dtype(np.float32))}

    def _observation_spec(self) -> dict[str, ArraySpec]:
        raise NotImplementedError(f"{type(self).__name__} does not say what it takes; it needs `inputs_spec`")

    def get_freeze_filter(self) -> Callable[[str], bool]:
        """Predicate on '/'-joined parameter paths: true where the parameter is frozen."""
        return freeze_nothing

    def fake_obs(self, batch_size: int = 1) -> Observation:
        """An observation of ones with the right shapes."""
        return _ones(self.inputs_spec(batch_size=batch_size)[0])

    def fake_act(self, batch_size: int = 1) -> Actions:
        """An action chunk of ones with the right shape."""
        return _ones(self.inputs_spec(batch_size=batch_size)[1])


class PaliGemmaConfig(Protocol):
    """The fields that pi0, pi0.5 and pi0-FAST share, of which tensors and prompts are made."""

    @property
    def model_type(self) -> ModelType: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def action_horizon(self) -> int: ...
    @property
    def max_token_len(self) -> int: ...
    @property
    def experts(self) -> tuple[GemmaConfig, ...]: ...
    @property
    def image_encoder(self) -> SiglipConfig: ...
    @property
    def image_encoder_variant(self) -> str | SiglipConfig: ...
    @property
    def image_keys(self) -> tuple[str, ...]: ...
    @property
    def image_resolution(self) -> tuple[int, int]: ...
    @property
    def tokenizer_path(self) -> str | None: ...


def prompted_images_spec(
    config: BaseModelConfig, image_keys: Sequence[str], image_resolution: tuple[int, int]
) -> dict[str, ArraySpec]:
    """Of what pi0 and pi0.5 observe."""
    f32, length = np.dtype(np.float32), (config.max_token_len,)
    return {
        **{f"image/{key}": ArraySpec((*image_resolution, 3), f32) for key in image_keys},
        **{f"image_mask/{key}": ArraySpec((), np.dtype(np.bool_)) for key in image_keys},
        "state": ArraySpec((config.action_dim,), f32),
        "tokenized_prompt": ArraySpec(length, np.dtype(np.int32)),
        "tokenized_prompt_mask": ArraySpec(length, np.dtype(np.bool_)),
    }


def freeze_nothing(path: ParamPath, value: object = None) -> bool:
    """The freeze predicate of full fine-tuning."""
    del path, value
    return False


def _ones(spec: object) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), spec)
