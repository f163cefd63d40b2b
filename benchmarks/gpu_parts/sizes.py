"""The sizes that are measured: the published ones, and tiny ones that only show that everything runs."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model_config import BaseModelConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.libero_policy import make_libero_example
from openpi.training.config import TrainConfig, get_config
from openpi.training.optimizer import AdamW
from openpi.training.weight_loaders import NoOpWeightLoader

TOKENIZER = Path(__file__).parents[2] / "tests/golden/tokenizers/tiny_paligemma_tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Shape:
    """A policy whose calls are timed.

    Attributes:
        recipe: whose transforms are around the model.
        example: makes an observation of its robot.
        robot_dim: width of the robot's state and actions.
        fills_prompt: with a prompt as long as the model takes; else the example's.
    """

    recipe: str
    model: Pi0Config
    example: Callable[[], dict]
    state_dim: int
    action_dim: int
    fills_prompt: bool


@dataclasses.dataclass(frozen=True)
class Training:
    """A recipe whose steps are timed, with batches of `cameras` and prompts of `prompt_len` tokens."""

    config: TrainConfig
    cameras: int
    prompt_len: int
    note: str


@dataclasses.dataclass(frozen=True)
class Size:
    """Attributes:
    shapes: by name.
    seconds: of repeating whatever is repeated.
    compiles: by `torch.compile`, where that is what is measured, and by JAX every shape; on a CPU that takes minutes.
    gemm_side, copy_bytes: of the ceilings.
    tokens: that pi0-FAST writes, few and many.
    training: by name, made for a backend.
    """

    name: str
    shapes: dict[str, Shape]
    fast: Pi0FASTConfig
    tokens: tuple[int, int]
    training: dict[str, Callable[[str], Training]]
    seconds: float
    compiles: bool
    gemm_side: int
    copy_bytes: int
    clients: int


def _aloha_example() -> dict:
    observation = make_aloha_example()
    del observation["images"]["cam_low"]  # the model does not see it
    return observation


def _shapes(**small: Any) -> dict[str, Shape]:
    return {
        "published": Shape("pi05_aloha", Pi0Config(pi05=True, **small), _aloha_example, 14, 14, fills_prompt=True),
        "libero": Shape(
            "pi05_libero",
            Pi0Config(pi05=True, action_horizon=10, discrete_state_input=False, **small),
            make_libero_example,
            *(8, 7),
            fills_prompt=False,
        ),
    }


def _trained(name: str, backend: str, **fields: Any) -> TrainConfig:
    """A recipe as it is, but for the weights that it starts from."""
    config = get_config(name)
    return dataclasses.replace(
        config, backend=backend, weight_loader=NoOpWeightLoader(), pytorch_weight_path=None, **fields
    )


def _full(backend: str) -> Training:
    config = _trained("pi05_libero", backend, batch_size=32, model=Pi0Config(pi05=True))
    return Training(config, 3, 200, "pi0.5, all weights, three cameras, full prompts, 50 actions; EMA, AdamW in f32")


def _libero(backend: str) -> Training:
    return Training(_trained("pi05_libero", backend, batch_size=64), 2, 32, "recipe pi05_libero, but batch 64")


def _lora(backend: str) -> Training:
    return Training(_trained("pi0_libero_low_mem_finetune", backend), 2, 32, "recipe pi0_libero_low_mem_finetune")


def _lora_24gb(backend: str) -> Training:
    return Training(_trained("pi05_libero_lora_24gb", backend), 2, 32, "recipe pi05_libero_lora_24gb")


def _24gb(backend: str) -> Training:
    """All weights of pi0.5 in as little memory as the backend can."""
    if backend == "pytorch":
        return Training(_trained("pi05_libero_24gb", backend), 2, 32, "recipe pi05_libero_24gb")
    small: dict[str, Any] = {"batch_size": 8, "ema_decay": None, "optimizer": AdamW(state_bits=8)}
    config = _trained("pi05_libero", backend, gradient_accumulation_steps=2, **small)
    return Training(config, 2, 32, "pi0.5, all weights: 8-bit AdamW, two parts, no EMA, batch 8")


FULL = Size(
    name="full",
    shapes=_shapes(),
    fast=Pi0FASTConfig(action_dim=7, action_horizon=10, max_token_len=180),
    tokens=(16, 144),
    training={"full": _full, "libero": _libero, "lora": _lora, "24 GB": _24gb, "LoRA 24 GB": _lora_24gb},
    seconds=6.0,
    compiles=True,
    gemm_side=8192,
    copy_bytes=4 << 30,
    clients=16,
)

# --- tiny ---------------------------------------------------------------------------------------------------------


def _expert(width: int, **fields: Any) -> GemmaConfig:
    return GemmaConfig(width, mlp_dim=32, depth=1, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=4096, **fields)


_ENCODER = SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2)
_SMALL: dict[str, Any] = {
    "paligemma_variant": _expert(16),
    "image_encoder_variant": _ENCODER,
    "image_resolution": (28, 28),
}
_TINY: dict[str, Any] = {**_SMALL, "action_expert_variant": _expert(16)}


def _tiny(made: Callable[[str], Training]) -> Callable[[str], Training]:
    """The same training of a tiny model."""

    def make(backend: str) -> Training:
        training = made(backend)
        model: Any = training.config.model
        lora = {"attn_lora": LoRAConfig(2), "ffn_lora": LoRAConfig(2)} if "lora" in str(model.paligemma_variant) else {}
        tiny = {"paligemma_variant": _expert(16, **lora), "action_expert_variant": _expert(16, **lora)}
        # What takes a compiler long and changes nothing that a part does: augmentation, rematerialisation, cameras, and
        # chunks of another length, without which recipes have programs in common.
        less = {"augmentation": False, "remat": "none", "image_keys": model.image_keys[:1], "max_token_len": 32}
        less |= {"action_horizon": 10}
        model = dataclasses.replace(model, **{**_TINY, **tiny, **less})
        config = dataclasses.replace(training.config, model=model, batch_size=2)
        return dataclasses.replace(training, config=config, cameras=1, prompt_len=32)

    return make


SMOKE = Size(
    name="smoke",
    shapes=_shapes(**_TINY),
    fast=Pi0FASTConfig(action_dim=7, action_horizon=4, max_token_len=16, **_SMALL),
    tokens=(2, 4),
    training={name: _tiny(made) for name, made in FULL.training.items()},
    seconds=0.02,
    compiles=False,
    gemm_side=128,
    copy_bytes=1 << 20,
    clients=2,
)


def batch(model: BaseModelConfig, rows: int, *, cameras: int, prompt_len: int) -> dict[str, Any]:
    """Random model-side inputs with actions, batched; cameras beyond the first `cameras` are masked."""
    rng = np.random.default_rng(0)
    images: Any = getattr(model, "image_keys", ())
    size, length = (rows, *getattr(model, "image_resolution", ()), 3), model.max_token_len
    is_text = np.arange(length) < prompt_len
    every = np.broadcast_to(is_text, (rows, length)).copy()
    found = {
        "image": {key: rng.integers(0, 256, size, np.uint8) for key in images},
        "image_mask": {key: np.full(rows, i < cameras) for i, key in enumerate(images)},
        "state": rng.standard_normal((rows, model.action_dim), np.float32),
        "tokenized_prompt": rng.integers(2, 2000, (rows, length), np.int32),
        "tokenized_prompt_mask": every,
        "actions": rng.standard_normal((rows, model.action_horizon, model.action_dim), np.float32),
    }
    if model.model_type.name == "PI0_FAST":
        found |= {"token_ar_mask": np.zeros((rows, length), np.int32), "token_loss_mask": every}
    return found
