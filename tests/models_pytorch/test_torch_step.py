"""What a step in PyTorch costs: it waits for nothing, and holds no more than it has to."""

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_recipe
from meta_device import DEVICE, NothingWaits
from openpi.models.gemma_config import LoRAConfig
from openpi.training.backends.pytorch import adam_8bit as adam_8bit_pytorch
from openpi.training.backends.pytorch import optimizer as optimizer_pytorch
from openpi.training.backends.pytorch import step as step_pytorch
from openpi.training.backends.pytorch.backend import Metrics, PyTorchBackend
from openpi.training.config import TrainConfig
from openpi.training.optimizer import SGD, AdamW, Muon

Change = Callable[[TrainConfig], TrainConfig]


def model(**fields: Any) -> Change:
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


def run(**fields: Any) -> Change:
    return lambda config: dataclasses.replace(config, **fields)


def of_torch(config: TrainConfig, *changes: Change) -> TrainConfig:
    config = dataclasses.replace(config, exp_name="step", backend="pytorch")
    for change in changes:
        config = change(config)
    return config


def adapted(config: TrainConfig) -> TrainConfig:
    lora = LoRAConfig(rank=2, alpha=2.0)
    expert = dataclasses.replace(tiny_recipe.MODEL.experts[0], attn_lora=lora, ffn_lora=lora)
    found = dataclasses.replace(config.model, action_expert_variant=expert)
    return dataclasses.replace(config, model=found, freeze_filter=found.get_freeze_filter(), ema_decay=None)


# --- the host does not wait ---------------------------------------------------------------------------------------

STEPS: dict[str, TrainConfig] = {
    "pi0": of_torch(tiny_recipe.tiny, model(augmentation=True, remat="full")),
    "pi05": of_torch(tiny_recipe.tiny, model(pi05=True, augmentation=True, remat="dots"), run(optimizer=Muon())),
    "draws": of_torch(tiny_recipe.tiny, model(loss_draws=3), run(optimizer=SGD(), gradient_accumulation_steps=2)),
    "lora": of_torch(tiny_recipe.tiny, adapted),
    "lora over eight bits": of_torch(tiny_recipe.tiny, adapted, run(pytorch_frozen_bits=8)),
    "fast": of_torch(tiny_recipe.fast, model(augmentation=True)),
}


def sample_batch(config: TrainConfig) -> dict[str, Any]:
    """Of the shapes that the recipe's loader gives."""
    model: Any = config.model
    rng, count = np.random.default_rng(0), config.batch_size
    images = {key: rng.integers(0, 256, (count, *model.image_resolution, 3), np.uint8) for key in model.image_keys}
    words = rng.integers(0, 2048, (count, model.max_token_len))
    batch = {
        "image": images,
        "image_mask": {key: np.ones(count, bool) for key in images},
        "state": rng.standard_normal((count, model.action_dim)),
        "actions": rng.standard_normal((count, model.action_horizon, model.action_dim)),
        "tokenized_prompt": words,
        "tokenized_prompt_mask": np.ones(words.shape, bool),
    }
    if len(model.experts) == 1:
        is_answer = np.arange(words.shape[1]) >= words.shape[1] // 2
        batch |= {"token_ar_mask": np.tile(is_answer.astype(int), (count, 1))}
        batch |= {"token_loss_mask": np.tile(is_answer, (count, 1))}
    return batch


def moved(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, tree)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_the_device(name: str) -> None:
    config = STEPS[name]
    backend = PyTorchBackend(config)
    placed = moved(backend.place(sample_batch(config), 0))
    backend._device = DEVICE
    state = backend.empty_state()
    assert all(param.device == DEVICE for param in state.params.values())
    with NothingWaits() as seen:
        metrics = backend._step(state, placed.rows, placed.random)
    assert {name: x.device for name, x in metrics.items() if isinstance(x, Tensor)} == dict.fromkeys(
        ("loss", "grad_norm", "param_norm"), DEVICE
    )
    assert state.step == 1 and seen.num_operations > 500


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("skip_unused", [True, False])
def test_a_model_knows_which_parameters_get_no_gradient(name: str, skip_unused: bool) -> None:
    """DDP is told; it would otherwise look for them in every step, and wait for the device."""
    backend = PyTorchBackend(model(skip_unused=skip_unused)(STEPS[name]))
    state = backend.create_state()
    placed = backend.place(sample_batch(STEPS[name]), 0)
    step_pytorch.batch_loss(state.forward, placed.rows, placed.random).backward()
    found: Any = state.model
    without = {name for name, param in state.trainable.items() if param.grad is None}
    assert without == set(found.unread_parameters()) & state.trainable.keys()


def test_a_step_gets_the_random_numbers_drawn_for_it() -> None:
    config = STEPS["pi0"]
    backend = PyTorchBackend(config)
    for step in (0, 7):
        placed = backend.place(sample_batch(config), step)
        drawn = step_pytorch.draw(config, step, config.batch_size)
        torch.testing.assert_close(placed.random, drawn, rtol=0, atol=0)
    with pytest.raises(AssertionError, match="the batch of step 7 is given to step 0"):
        backend.train_step(backend.empty_state(), placed)


def test_metrics_are_numbers_once_they_are_read() -> None:
    found = {"loss": torch.tensor(0.5), "learning_rate": 0.25, "grad_norm": torch.tensor(2.0, dtype=torch.float64)}
    metrics = Metrics(found)
    found["loss"] += 1  # the next step may reuse the memory
    assert dict(metrics) == {"loss": 0.5, "learning_rate": 0.25, "grad_norm": 2.0}
    assert {name: type(value) for name, value in metrics.items()} == dict.fromkeys(found, float)


@contextlib.contextmanager
def does_not_wait() -> Iterator[None]:
    """Whatever waits for the GPU raises RuntimeError."""
    with warnings.catch_warnings(action="ignore"):  # that it does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_not_wait_for_a_gpu(name: str) -> None:
    config = STEPS[name]
    backend = PyTorchBackend(config)
    state = backend.create_state()
    for step in range(3):
        placed = backend.place(sample_batch(config), step)
        # The first step opens libraries.
        with does_not_wait() if step else contextlib.nullcontext():
            state, metrics = backend.train_step(state, placed)
        backend.wait(metrics)
        assert math.isfinite(metrics["loss"])


# --- memory -------------------------------------------------------------------------------------------------------


class Allocated(TorchDispatchMode):
    """Bytes of all tensors made in it: that live, and that lived at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), is_made=False)
        out = function(*args, **(kwargs or {}))
        self._count(out, is_made=True)
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, tensors: Any, *, is_made: bool) -> None:
        for tensor in pytree.tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or id(tensor.untyped_storage()) in self._known:
                continue
            storage = tensor.untyped_storage()
            size = storage.nbytes() if is_made else 0
            self._known.add(id(storage))
            self.now += size
            weakref.finalize(storage, self._freed, id(storage), size)

    def _freed(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size


DEEP = dataclasses.replace(tiny_recipe.MODEL.experts[0], depth=8, width=64, mlp_dim=256, vocab_size=64)
STATES: dict[str, Change] = {
    "adamw": run(optimizer=AdamW()),
    "8bit": run(optimizer=AdamW(state_bits=8)),
    "muon": run(optimizer=Muon()),
    "sgd": run(optimizer=SGD()),
    "freed gradients": run(optimizer=AdamW(clip_gradient_norm=math.inf), pytorch_free_gradients=True),
    "pure bfloat16": run(pytorch_training_precision="pure_bfloat16"),
}


def test_an_update_with_8_bits_computes_with_a_part_of_a_large_parameter_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    param = torch.nn.Parameter(torch.ones(1024, 64))
    peaks = []
    for at_once in (param.numel(), param.numel() // 16):
        monkeypatch.setattr(adam_8bit_pytorch, "_ELEMENTS_AT_ONCE", at_once)
        optimizer = optimizer_pytorch.create(AdamW(state_bits=8), {"x": param}, lambda name: False)
        optimizer_pytorch.allocate(optimizer)
        param.grad = torch.ones_like(param)
        with Allocated() as allocated:
            optimizer.step()
        peaks.append(allocated.peak)
    assert peaks[0] > 8 * param.nbytes and peaks[1] < peaks[0] / 8  # one part's tensors live until the next has its own


@pytest.mark.parametrize("name", STATES)
def test_a_state_is_made_without_all_gradients_at_once(name: str) -> None:
    deep = model(paligemma_variant=DEEP, action_expert_variant=DEEP)
    # An average is made afterwards, and would hide what was there before.
    backend = PyTorchBackend(of_torch(tiny_recipe.tiny, deep, run(ema_decay=None), STATES[name]))
    with Allocated() as allocated:
        state = backend.empty_state()
        sizes = [param.nbytes for param in state.trainable.values()]
        kept = sum(x.nbytes for slots in state.optimizer.state.values() for x in slots.values())
        kept += sum(sizes)
        assert allocated.now == pytest.approx(kept, rel=0.01)
        assert max(sizes) < 0.05 * sum(sizes)
        # A gradient, and what the update of one parameter computes with; in f32, whatever the weights are.
        assert allocated.peak - allocated.now < 0.25 * sum(sizes)
        assert all(param.grad is None for param in state.params.values())
