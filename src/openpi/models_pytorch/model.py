"""What a model takes, batched, and what all models share: the PyTorch twin of `openpi.models.model`.

Source: the model specification, section 2.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from openpi.models.model_config import IMAGE_KEYS, IMAGE_RESOLUTION
from openpi.models_pytorch.augment import Draws, augment_images
from openpi.models_pytorch.lora import INIT_STDDEV as LORA_STDDEV
from openpi.models_pytorch.lora import Adapter
from openpi.shared.tree import Tree

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Observation:
    """Model inputs, batched; the fields are those of `openpi.models.model.Observation`, as tensors.

    Attributes:
        images: per camera f32[b h w 3] in [-1, 1], RGB.
        image_masks: per camera bool[b], false where the camera is padding. None = it is in the whole batch, and the
            camera has no images (see `openpi.models.compact`).
    """

    images: dict[str, Tensor]
    image_masks: dict[str, Tensor | None]
    state: Tensor
    tokenized_prompt: Tensor | None = None
    tokenized_prompt_mask: Tensor | None = None
    token_ar_mask: Tensor | None = None
    token_loss_mask: Tensor | None = None

    @classmethod
    def from_dict(cls, data: Tree, *, device: torch.device | str | None = None) -> Self:
        """Builds an observation from the model-side sample keys (arrays or tensors); uint8 images become f32 in
        [-1, 1], those with their channels first get them last, 64-bit floats become f32.

        Raises:
            ValueError: only one of `tokenized_prompt` and `tokenized_prompt_mask` is there.
        """
        if ("tokenized_prompt" in data) != ("tokenized_prompt_mask" in data):
            raise ValueError(
                "'tokenized_prompt' and 'tokenized_prompt_mask' go together; "
                f"found only one of them among: {', '.join(sorted(data))}"
            )

        def tensor(value: object) -> Any:
            if value is None:
                return None
            found = torch.as_tensor(value, device=device)
            return found.float() if found.dtype == torch.float64 else found

        texts = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask", "token_loss_mask")
        return cls(
            images={key: _to_unit_range(_channels_last(tensor(image))) for key, image in data["image"].items()},
            image_masks={key: tensor(mask) for key, mask in data["image_mask"].items()},
            state=tensor(data["state"]),
            **{key: tensor(data.get(key)) for key in texts},
        )

    def rows(self, start: int, stop: int) -> Self:
        """A part of the batch."""
        return self.map(lambda x: x[start:stop])

    def map(self, function: Callable[[Tensor], object]) -> Self:
        """The same observation with `function` of every tensor."""

        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: mapped(item) for key, item in value.items()}
            return None if value is None else function(value)

        return type(self)(**{f.name: mapped(getattr(self, f.name)) for f in dataclasses.fields(self)})


def _channels_last(image: Tensor) -> Tensor:
    return image.movedim(1, -1) if image.ndim == 4 and image.shape[1] == 3 and image.shape[-1] != 3 else image


def _to_unit_range(image: Tensor) -> Tensor:
    return image.float() / 255 * 2 - 1 if image.dtype == torch.uint8 else image


def preprocess_observation(
    observation: Observation,
    *,
    draws: Draws | None = None,
    image_keys: Sequence[str] = IMAGE_KEYS,
    image_resolution: tuple[int, int] = IMAGE_RESOLUTION,
) -> Observation:
    """Selects the model's cameras, brings them to its size, augments, fills in missing masks.

    Args:
        draws: of the augmentation; None = no augmentation.
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
    if draws is not None:
        images = augment_images(draws, images)
    state = observation.state
    shown = torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)
    masks: dict[str, Tensor | None] = {key: observation.image_masks.get(key, shown) for key in image_keys}
    return dataclasses.replace(observation, images=images, image_masks=masks | dict.fromkeys(dropped))


def resize_with_pad(images: Tensor, height: int, width: int) -> Tensor:
    """Resizes on the device, aspect kept, on a centred black canvas.

    Bilinear with antialiasing when shrinking, as in JAX and, to one grey level, as Pillow does.

    Args:
        images: [b h w c]; uint8, or f32 in [-1, 1].
    Returns:
        [b height width c] of the same dtype.
    Raises:
        ValueError: another dtype.
    """
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images have dtype {images.dtype}; expected uint8, or float32 in [-1, 1]")
    h, w = images.shape[-3:-1]
    ratio = max(w / width, h / height)
    new_h, new_w = int(h / ratio), int(w / ratio)
    planes = images.float().movedim(-1, 1)
    resized = F.interpolate(planes, (new_h, new_w), mode="bilinear", align_corners=False, antialias=True)
    if images.dtype == torch.uint8:
        resized, fill = resized.round().clamp(0, 255).to(torch.uint8), 0
    else:
        resized, fill = resized.clamp(-1, 1), -1
    top, left = (height - new_h) // 2, (width - new_w) // 2
    padded = F.pad(resized, (left, width - new_w - left, top, height - new_h - top), value=fill)
    return padded.movedim(1, -1)


def make_attention_mask(input_mask: Bool[Tensor, "b n"], ar_mask: Int[Tensor, "*b n"]) -> Bool[Tensor, "b n n"]:
    """True where token i may attend to token j: j's block is not later than i's, and both are real.

    `ar_mask` is 1 where a new block starts; see `openpi.models.model.make_attention_mask`.
    """
    blocks = torch.cumsum(ar_mask.expand(input_mask.shape), dim=1)
    return (blocks[:, None, :] <= blocks[:, :, None]) & input_mask[:, None, :] & input_mask[:, :, None]


def fresh_parameters(model: nn.Module, names: Collection[str], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Initial values, f32, of the named parameters of a model that may be on "meta"; module by module.

    A parameter's values depend on its name and the seed only. They are distributed as those of the JAX models: weights
    LeCun normal, truncated at two standard deviations; biases, plain norms, modulations and the image encoder's head
    zero; its norms one. The draws themselves are others.
    """
    for path, module in model.named_modules():
        wanted = [name for name, _ in module.named_parameters(recurse=False) if _join(path, name) in names]
        if not wanted:
            continue
        made = copy.deepcopy(module).to_empty(device="cpu", recurse=False)
        with torch.no_grad():
            _init_module(path, made, torch.Generator().manual_seed(zlib.crc32(f"{seed}/{path}".encode())))
        for name in wanted:
            yield _join(path, name), getattr(made, name).detach()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _init_module(path: str, module: nn.Module, generator: torch.Generator) -> None:
    from openpi.models_pytorch import gemma, siglip

    def truncated(weight: Tensor, fan_in: int) -> None:
        # 0.8796 is the standard deviation that truncation leaves of a standard normal.
        std = fan_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)

    match module:
        case Adapter():
            nn.init.normal_(module.a, std=LORA_STDDEV, generator=generator)
            nn.init.normal_(module.b, std=LORA_STDDEV, generator=generator)
        case gemma.RMSNorm():
            _fill(module.weight, 0)
        case siglip.LayerNorm():
            _fill(module.weight, 1)
            _fill(module.bias, 0)
        case gemma.Embedding():
            nn.init.normal_(module.weight, std=0.01, generator=generator)
        case siglip.PatchEmbedding():
            truncated(module.weight, module.weight[0].numel())
            _fill(module.bias, 0)
        case siglip.Siglip():
            width = module.position_embedding.shape[1]
            nn.init.normal_(module.position_embedding, std=width**-0.5, generator=generator)
        case siglip.Linear() if path.endswith((".dense", "vision.head")):
            _fill(module.weight, 0)
            _fill(module.bias, 0)
        case siglip.Linear() if path.startswith("vision."):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if ".mlp." in path and module.bias is not None:
                nn.init.normal_(module.bias, std=1e-6, generator=generator)
            else:
                _fill(module.bias, 0)
        case siglip.Linear():
            truncated(module.weight, module.weight.shape[1])
            _fill(module.bias, 0)
        case _:
            raise TypeError(f"{path} ({type(module).__name__}) has parameters, and no initialisation")


def _fill(parameter: Tensor | None, value: float) -> None:
    if parameter is not None:
        parameter.fill_(value)
