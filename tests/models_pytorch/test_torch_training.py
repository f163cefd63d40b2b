"""Training in PyTorch: the same numbers as JAX, however many processes, and however often it is continued."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import tiny_recipe
import weight_layouts
from openpi.cli.checkpoints import export, verify
from openpi.models.gemma_config import LoRAConfig
from openpi.models.pi0 import draw_time
from openpi.models_pytorch import loading
from openpi.policies.policy_config import create_trained_policy
from openpi.shared.tree import flatten, unflatten
from openpi.training import data_loader, loop, recipe_io
from openpi.training.backends.jax import step as step_jax
from openpi.training.backends.jax.backend import JaxBackend
from openpi.training.backends.jax.published_checkpoints import initialize_checkpoint_dir
from openpi.training.backends.pytorch import adam_8bit as adam_8bit_pytorch
from openpi.training.backends.pytorch import optimizer as optimizer_pytorch
from openpi.training.backends.pytorch import step as step_pytorch
from openpi.training.backends.pytorch.backend import PyTorchBackend
from openpi.training.config import TrainConfig
from openpi.training.optimizer import (
    SGD,
    AdamW,
    CosineDecaySchedule,
    Muon,
    OptimizerConfig,
    create_optimizer,
    is_matrix,
)
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import names, opening, orbax_io, published_tree, safetensors_io

BOTH = dataclasses.replace(
    tiny_recipe.tiny,
    exp_name="both",
    model=dataclasses.replace(tiny_recipe.MODEL, pi05=True, max_token_len=8),
    lr_schedule=CosineDecaySchedule(warmup_steps=10, peak_lr=1e-3, decay_steps=200, decay_lr=1e-4),
    ema_decay=0.95,
    pytorch_training_precision="float32",
)


@dataclasses.dataclass
class Pair:
    """A recipe in both backends, from the same weights, on the same batches with the same random numbers."""

    config: TrainConfig

    def __post_init__(self) -> None:
        self.jax = JaxBackend(self.config)
        self.torch = PyTorchBackend(dataclasses.replace(self.config, backend="pytorch"))
        for backend in (self.jax, self.torch):
            backend.check()
        self.of_jax = self.jax.create_state()
        self.of_torch = self.torch.create_state()
        self._start_alike()
        self.batches = iter(data_loader.create_batch_loader(self.config))

    def _start_alike(self) -> None:
        tree = jax.tree.map(np.asarray, self.of_jax.params)
        weights = dict(loading.from_tree(self.config.model, tree).named_parameters())
        with torch.no_grad():
            for name, param in self.of_torch.model.named_parameters():
                param.copy_(weights[name])
            for name, average in (self.of_torch.average or {}).items():
                average.copy_(weights[name])

    def step(self) -> tuple[dict[str, float], dict[str, float]]:
        batch = next(self.batches)
        random = self._draws_of_jax()
        step = self.of_torch.step
        self.of_jax, of_jax = self.jax.train_step(self.of_jax, self.jax.place(batch, step))
        placed = self.torch.place(batch, step)._replace(random=random)
        self.of_torch, of_torch = self.torch.train_step(self.of_torch, placed)
        return {k: float(v) for k, v in of_jax.items()}, {k: float(v) for k, v in of_torch.items()}

    def _draws_of_jax(self) -> step_pytorch.Randomness:
        """What `Pi0.compute_loss` draws in the step to come."""
        model = self.config.model
        key = jax.random.fold_in(self.jax._keys[1], self.of_jax.step)
        _, noise_key, time_key = jax.random.split(key, 3)
        count = self.config.batch_size
        noise = jax.random.normal(noise_key, (count, model.action_horizon, model.action_dim))
        as_tensors = (torch.as_tensor(np.array(x)) for x in (noise, draw_time(time_key, (count,))))
        return step_pytorch.Randomness(*as_tensors, None)

    def weights(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        return self._trees(self.of_jax.params, dict(self.of_torch.model.named_parameters()))

    def averages(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        params = dict(self.of_torch.model.named_parameters())
        return self._trees(self.of_jax.ema_params, params | (self.of_torch.average or {}))

    def _trees(self, of_jax: Any, of_torch: dict[str, torch.Tensor]) -> tuple[dict, dict]:
        theirs = flatten(loading.to_tree(self.config.model, of_torch))
        return {path: np.asarray(leaf) for path, leaf in flatten(of_jax).items()}, theirs


def assert_alike(
    pair: tuple[dict[str, np.ndarray], dict[str, np.ndarray]], atol: float, share_of_others: float = 0.0
) -> None:
    """
    Args:
        share_of_others: of an array's numbers, how many may differ more.
    """
    ours, theirs = pair
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        found, expected = theirs[path].astype(np.float32), value.astype(np.float32)
        is_alike = np.isclose(found, expected, atol=atol, rtol=1e-3)
        if 1 - is_alike.mean() > share_of_others:
            np.testing.assert_allclose(found, expected, atol=atol, rtol=1e-3, err_msg=path)


def test_60_steps_give_the_losses_and_the_average_of_jax() -> None:
    pair = Pair(BOTH)
    curves = [pair.step() for _ in range(60)]
    losses = np.asarray([[metrics["loss"] for metrics in both] for both in curves])
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], rtol=1e-3)
    rates = np.asarray([[metrics["learning_rate"] for metrics in both] for both in curves])
    np.testing.assert_allclose(rates[:, 1], rates[:, 0], rtol=1e-6)
    for name in ("grad_norm", "param_norm"):
        values = np.asarray([[metrics[name] for metrics in both] for both in curves])
        # Rounding grows from step to step, most of all where samples disagree.
        np.testing.assert_allclose(values[:50, 1], values[:50, 0], rtol=1e-3)
        np.testing.assert_allclose(np.median(values[:, 1] / values[:, 0]), 1, rtol=1e-3)
    assert losses[-20:, 0].mean() < losses[:20, 0].mean(), "it learns"
    # Biases of keys change no loss, and a few words are hardly ever met: Adam makes whole steps of rounding errors.
    averages: Any = tuple(without_idle(tree) for tree in pair.averages())
    assert_alike(averages, atol=2e-3, share_of_others=1e-3)


def test_60_steps_in_mixed_precision_stay_close_to_jax() -> None:
    # Both compute in bfloat16 (8 bits of mantissa) but add up in another order, and differences grow from step to step.
    model = dataclasses.replace(BOTH.model, dtype="bfloat16")
    pair = Pair(dataclasses.replace(BOTH, model=model, pytorch_training_precision="bfloat16"))
    assert all(param.dtype == torch.float32 for param in pair.of_torch.model.parameters())
    losses = np.asarray([[metrics["loss"] for metrics in pair.step()] for _ in range(60)])
    np.testing.assert_allclose(losses[:20, 1], losses[:20, 0], rtol=5e-3)
    windows = losses.reshape(3, 20, 2).mean(axis=1)
    np.testing.assert_allclose(windows[:, 1], windows[:, 0], rtol=1e-2)


def without_idle(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: leaf for path, leaf in tree.items() if not path.endswith("key/bias")}


@pytest.mark.parametrize(
    ("optimizer", "atol"),
    [
        (AdamW(weight_decay=0.1), 1e-6),
        (SGD(nesterov=True), 1e-6),
        (Muon(weight_decay=0.1), 2e-5),
        (AdamW(state_bits=8), 5e-3),  # rounds at random
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "state_bits", "")),
)
def test_optimisers_make_the_steps_of_jax(
    optimizer: OptimizerConfig, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On random gradients, with the schedule, and clipping in some steps."""
    monkeypatch.setattr(adam_8bit_pytorch, "_ELEMENTS_AT_ONCE", 1000)  # some parameters have more
    rng = np.random.default_rng(0)
    shapes, table = names.tree_shapes(BOTH.model), names.rows(BOTH.model)
    schedule = CosineDecaySchedule(warmup_steps=1, peak_lr=1e-2, decay_steps=10)

    def random_tree(scale: float) -> dict[str, np.ndarray]:
        return {path: scale * rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}

    before = random_tree(1.0)
    ours: Any = unflatten(dict(before))
    theirs = {
        row.torch: torch.nn.Parameter(loading.as_tensor(row.to_torch(before[row.tree][row.index]).copy()))
        for row in table
    }
    in_jax = create_optimizer(optimizer, schedule)
    trees = {row.torch: row.tree for row in table}
    in_torch = optimizer_pytorch.create(optimizer, theirs, lambda name: is_matrix(trees[name]))
    state = jax.jit(in_jax.init)(ours)

    @jax.jit
    def step_in_jax(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = in_jax.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step, scale in enumerate((1e-5, 1e-2, 1.0, 1e-4)):
        grads = random_tree(scale)
        ours, state = step_in_jax(unflatten(dict(grads)), state, ours)
        for row in table:
            theirs[row.torch].grad = loading.as_tensor(row.to_torch(grads[row.tree][row.index]).copy())
        found = [param.grad for param in theirs.values() if param.grad is not None]
        if np.isfinite(limit := optimizer_pytorch.clip_norm(optimizer)):
            optimizer_pytorch.clip(found, optimizer_pytorch.global_norm(found), limit)
        for group in in_torch.param_groups:
            group["lr"] = float(np.asarray(schedule.create()(step)))
        in_torch.step()
    after = {path: np.asarray(leaf) for path, leaf in flatten(ours).items()}
    assert_alike((after, flatten(loading.to_tree(BOTH.model, theirs))), atol)
    assert max(np.abs(after[path] - before[path]).max() for path in after) > 1e-3


def lora_config() -> TrainConfig:
    adapters = LoRAConfig(rank=2, alpha=4.0)
    expert = dataclasses.replace(tiny_recipe.MODEL.experts[0], attn_lora=adapters, ffn_lora=adapters)
    # Not pi0.5: the gates of its fresh adaptive norms are shut, and frozen here.
    model = dataclasses.replace(tiny_recipe.MODEL, action_expert_variant=expert)
    return dataclasses.replace(BOTH, model=model, freeze_filter=model.get_freeze_filter(), ema_decay=None)


def test_adapters_and_what_is_not_frozen_train_as_in_jax_and_nothing_else_changes() -> None:
    pair = Pair(lora_config())
    before, _ = pair.weights()
    for _ in range(5):
        ours, theirs = pair.step()
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
    _, after = pair.weights()
    assert_alike(tuple(without_idle(tree) for tree in pair.weights()), atol=5e-5)  # type: ignore[arg-type]
    is_frozen = pair.config.freeze_filter
    changed = {path for path in after if not np.array_equal(after[path], before[path].astype(after[path].dtype))}
    assert not [path for path in changed if is_frozen(path)]
    assert {path for path in after if "lora" in path} <= changed
    frozen = [param for param in pair.of_torch.model.parameters() if not param.requires_grad]
    assert frozen and all(param.dtype == torch.bfloat16 and param.grad is None for param in frozen)


def test_a_batch_in_parts_gives_the_gradients_of_the_whole() -> None:
    batch = next(iter(data_loader.create_batch_loader(BOTH)))
    metrics = []
    for count in (1, 2):
        recipe = dataclasses.replace(BOTH, gradient_accumulation_steps=count, optimizer=SGD(), backend="pytorch")
        backend = PyTorchBackend(recipe)
        metrics.append(backend.train_step(backend.create_state(), backend.place(batch, 0))[1])
    for name in ("loss", "grad_norm"):
        assert float(metrics[1][name]) == pytest.approx(float(metrics[0][name]), rel=1e-5)


def test_random_numbers_depend_on_seed_and_step_only() -> None:
    config = dataclasses.replace(BOTH, model=dataclasses.replace(BOTH.model, augmentation=True))
    first, again = (step_pytorch.draw(config, 3, 64) for _ in range(2))
    assert first.noise is not None and first.time is not None and first.augmentation is not None
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = step_pytorch.draw(config, 4, 64)
    assert not torch.equal(first.noise, other.noise)  # type: ignore[arg-type]
    assert first.time.min() > 0 and first.time.max() <= 1 and first.time.mean() > 0.5
    part = first.rows(lambda x: x[10:12])
    torch.testing.assert_close(part.noise, first.noise[10:12])
    torch.testing.assert_close(part.augmentation.wrist.hue, first.augmentation.wrist.hue[10:12])  # type: ignore[union-attr]


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def arm(tmp_path: Path, arm_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(tiny_recipe.arm.data, repo_id=str(arm_dataset))
    return dataclasses.replace(
        tiny_recipe.arm, exp_name="run", data=data, backend="pytorch", ema_decay=0.9, holdout_episodes=1, eval_batches=1
    )


def metrics_of(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("step", "samples_per_s", "data_wait")}
        found.setdefault(row["step"], {}).update(kept)
    return found


@pytest.mark.parametrize(
    "optimizer", [AdamW(), AdamW(state_bits=8), Muon(), SGD(momentum=0.0)], ids=["adamw", "8bit", "muon", "plain_sgd"]
)
def test_a_continued_run_is_the_run_that_never_stopped(arm: TrainConfig, optimizer: OptimizerConfig) -> None:
    torch.manual_seed(0)
    arm = dataclasses.replace(arm, optimizer=optimizer)
    whole = loop.train(dataclasses.replace(arm, exp_name="whole"))
    loop.train(dataclasses.replace(arm, num_train_steps=3))
    rest = loop.train(dataclasses.replace(arm, resume=True))
    assert rest.step == whole.step == 5
    expected, found = metrics_of(whole.checkpoint.parent), metrics_of(rest.checkpoint.parent)
    for step in (3, 4, 5):
        for name in ("loss", "grad_norm", "param_norm"):
            assert found[step][name] == pytest.approx(expected[step][name], rel=1e-6), (step, name)
    assert {"validation_loss", "action_error"} <= found[5].keys()


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (AdamW(state_bits=8), r"optimizer/exp_avg_sq_codes/.*not in the checkpoint"),
        (Muon(), r"optimizer/exp_avg_sq/.*the recipe's optimiser keeps no such thing"),
        (SGD(momentum=0.0), r"optimizer/exp_avg/.*the recipe's optimiser keeps no such thing"),
    ],
    ids=["8bit", "muon", "sgd"],
)
def test_a_checkpoint_of_another_optimiser_is_refused_by_name(
    arm: TrainConfig, optimizer: OptimizerConfig, told: str
) -> None:
    loop.train(dataclasses.replace(arm, num_train_steps=1))
    with pytest.raises(ValueError, match=told):
        loop.train(dataclasses.replace(arm, resume=True, optimizer=optimizer))


def test_what_is_frozen_since_a_checkpoint_with_an_average_keeps_its_trained_weights(arm: TrainConfig) -> None:
    before = loop.train(dataclasses.replace(arm, num_train_steps=3, keep_period=1)).checkpoint
    raw = safetensors_io.open_tensors(before / "train_state.safetensors")
    now = dataclasses.replace(arm, resume=True, freeze_filter=tiny_recipe.everything_but_the_head, keep_period=1)
    state = PyTorchBackend(now).restore_state(before)
    frozen = {name: param for name, param in state.params.items() if not param.requires_grad}
    assert len(frozen) > 10
    for name, param in frozen.items():
        torch.testing.assert_close(param.detach(), torch.tensor(raw[f"weights/{name}"]).bfloat16(), rtol=0, atol=0)
    assert loop.train(dataclasses.replace(now, num_train_steps=4)).step == 3


def test_weights_that_are_no_numbers_are_not_saved(arm: TrainConfig) -> None:
    """The loss of a step is that of the weights before it: of the last ones there is none."""
    fast = CosineDecaySchedule(warmup_steps=0, peak_lr=1e37, decay_lr=1e37)
    with pytest.raises(RuntimeError, match=r"the param_norm of step 0 is inf; there is no checkpoint from before"):
        loop.train(dataclasses.replace(arm, num_train_steps=1, log_interval=1, lr_schedule=fast))
    assert not [entry for entry in Path("checkpoints/arm/run").iterdir() if entry.name.isdigit()]


def test_pi0_fast_trains_validates_and_saves(arm: TrainConfig) -> None:
    recipe = dataclasses.replace(tiny_recipe.fast, exp_name="fast", data=arm.data, backend="pytorch")
    result = loop.train(dataclasses.replace(recipe, num_train_steps=2, holdout_episodes=1, eval_batches=1))
    assert {"validation_loss", "undecodable"} <= metrics_of(result.checkpoint.parent)[1].keys()
    assert (result.checkpoint / "model.safetensors").is_file()


def test_a_checkpoint_is_served_as_it_is_by_both_backends(arm: TrainConfig) -> None:
    checkpoint = loop.train(dataclasses.replace(arm, num_train_steps=2)).checkpoint
    observation = {"camera": np.full((32, 32, 3), 90, np.uint8), "joints": np.zeros(3), "prompt": "pick up the cube"}
    noise = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    policies = [create_trained_policy(arm, checkpoint, backend=name) for name in (None, "jax")]
    actions = [policy.infer(observation, noise=noise)["actions"] for policy in policies]
    assert actions[0].shape == (3, 3)
    np.testing.assert_allclose(actions[0], actions[1], atol=1e-4)


def lora_from(arm: TrainConfig, place: str, **changes: Any) -> TrainConfig:
    loader = CheckpointWeightLoader(place)
    recipe = dataclasses.replace(tiny_recipe.lora, data=arm.data, backend="pytorch", weight_loader=loader)
    return dataclasses.replace(recipe, **{"num_train_steps": 3, "exp_name": "whole", **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "params"
    orbax_io.write_params(folder, tiny_recipe.MODEL.create(jax.random.key(7)).params)
    return folder


def params_of(checkpoint: Path) -> dict[str, np.ndarray]:
    return flatten(published_tree.tree_of(opening.open_weights(recipe_io.load_recipe(checkpoint).model, checkpoint)))


def actions_of(checkpoint: Path, backend: str) -> np.ndarray:
    observation = {"camera": np.full((32, 32, 3), 90, np.uint8), "joints": np.zeros(3), "prompt": "pick up the cube"}
    noise = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    policy = create_trained_policy(recipe_io.load_recipe(checkpoint), checkpoint, backend=backend)
    return policy.infer(observation, noise=noise)["actions"]


@pytest.mark.parametrize("kind", weight_layouts.LAYOUTS)
def test_adapters_are_trained_continued_and_served_over_a_base_in_any_layout(
    kind: str, arm: TrainConfig, base: Path, tmp_path: Path
) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", kind)
    whole = loop.train(lora_from(arm, place)).checkpoint
    light = {"exp_name": "light", "save_frozen_params": False}
    loop.train(lora_from(arm, place, **light, num_train_steps=2))
    alone = loop.train(lora_from(arm, place, **light, resume=True)).checkpoint
    assert json.loads((alone / "adapters.json").read_text())["base"] == place
    np.testing.assert_equal(params_of(alone), params_of(whole))
    stored = set(safetensors_io.open_tensors(alone))
    is_frozen = tiny_recipe.lora.freeze_filter
    assert stored == {row.released for row in names.rows(tiny_recipe.lora.model) if not is_frozen(row.tree)}
    expected = actions_of(whole, "pytorch")
    np.testing.assert_array_equal(actions_of(alone, "pytorch"), expected)
    if kind == "lerobot":
        np.testing.assert_allclose(actions_of(alone, "jax"), expected, atol=1e-4)


def test_each_form_of_a_pytorch_checkpoint_is_made_from_the_other(arm: TrainConfig, base: Path, tmp_path: Path) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    whole = loop.train(lora_from(arm, place)).checkpoint
    for form, source, target in (("--adapters", whole, "light"), ("--full", tmp_path / "light", "full")):
        assert export.main([str(source), form, f"--output={tmp_path / target}"]) == 0
    np.testing.assert_equal(params_of(tmp_path / "full"), params_of(whole))
    assert not (tmp_path / "full" / "adapters.json").exists()
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / "light", tmp_path / "full")]
    assert sizes[0] < sizes[1]
    assert export.main([str(tmp_path / "light"), "--merge", f"--output={tmp_path / 'merged'}"]) == 0
    assert not any("lora" in name for name in safetensors_io.open_tensors(tmp_path / "merged"))
    expected = actions_of(whole, "pytorch")
    for folder in ("light", "full", "merged"):
        np.testing.assert_allclose(actions_of(tmp_path / folder, "pytorch"), expected, atol=1e-5, err_msg=folder)


def test_neither_a_run_nor_a_check_goes_on_over_another_base(
    arm: TrainConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    light = {"exp_name": "light", "save_frozen_params": False}
    checkpoint = loop.train(lora_from(arm, place, **light, num_train_steps=2)).checkpoint
    assert verify.main([str(checkpoint)]) == 0
    tensors = {name: np.array(tensor) for name, tensor in safetensors_io.open_tensors(Path(place)).items()}
    (changed,) = (name for name in tensors if name.endswith("language_model.layers.0.mlp.up_proj.weight"))
    tensors[changed] += 0.01
    safetensors_io.save(Path(place) / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"others than before: PaliGemma/llm/layers/mlp/gating_einsum differs"):
        loop.train(lora_from(arm, place, **light, resume=True))
    assert verify.main([str(checkpoint)]) == 1
    assert "others than before: PaliGemma/llm/layers/mlp/gating_einsum differs" in capsys.readouterr().err
    Path(place).rename(tmp_path / "elsewhere")
    with pytest.raises(
        ValueError, match=r"^this checkpoint holds adapters only, and its base is not there.*"
    ) as refused:
        loop.train(lora_from(arm, place, **light, resume=True))
    assert "move it away" not in str(refused.value)


def test_weights_that_are_needed_are_not_overwritten(arm: TrainConfig) -> None:
    base = loop.train(dataclasses.replace(arm, num_train_steps=2)).checkpoint
    again = dataclasses.replace(arm, overwrite=True, num_train_steps=1)
    with pytest.raises(FileExistsError, match=r"would delete the weights that the run starts from"):
        loop.train(dataclasses.replace(again, pytorch_weight_path=str(base)))
    light = loop.train(lora_from(arm, str(base), save_frozen_params=False)).checkpoint
    with pytest.raises(FileExistsError, match=rf"read with step 1 of .*If those .* delete {base}/KEEP"):
        loop.train(again)
    with pytest.raises(FileExistsError, match=r"read with step 1 of"):  # a training script's own way
        initialize_checkpoint_dir(base.parent, keep_period=None, overwrite=True, resume=False)
    assert actions_of(light, "pytorch").shape == (3, 3)
    (base / "KEEP").unlink()
    assert loop.train(again).step == 0


def test_what_is_frozen_since_is_not_lost_from_checkpoints_without_frozen_weights(
    arm: TrainConfig, base: Path, tmp_path: Path
) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    now = {"exp_name": "light", "freeze_filter": tiny_recipe.everything_but_the_head, "resume": True}
    light = loop.train(lora_from(arm, place, exp_name="light", save_frozen_params=False, num_train_steps=2)).checkpoint
    with pytest.raises(ValueError, match=r"freezes \d+ parameters that .*/1 has trained, such as .*would lose them"):
        loop.train(lora_from(arm, place, **now, save_frozen_params=False))
    before = params_of(light)
    after = params_of(loop.train(lora_from(arm, place, **now)).checkpoint)
    assert before.keys() == after.keys()


def test_a_run_that_cannot_go_on_with_other_frozen_weights_is_not_called_damaged(
    arm: TrainConfig, base: Path, tmp_path: Path
) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    checkpoint = loop.train(lora_from(arm, place, num_train_steps=2)).checkpoint
    told = rf"does not fit the recipe .*\n(.*\n)+Changed since .*--freeze-filter.*--pytorch-weight-path={checkpoint}$"
    with pytest.raises(ValueError, match=told):
        loop.train(lora_from(arm, place, resume=True, freeze_filter=tiny_recipe.arm.freeze_filter))


def test_a_run_does_not_go_on_with_adapters_of_another_scale(arm: TrainConfig, base: Path, tmp_path: Path) -> None:
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    loop.train(lora_from(arm, place, num_train_steps=2))
    adapted = dataclasses.replace(tiny_recipe.lora.model.paligemma_variant, attn_lora=LoRAConfig(rank=2, alpha=8.0))
    model = dataclasses.replace(tiny_recipe.lora.model, paligemma_variant=adapted)
    with pytest.raises(ValueError, match=r"attn_lora.alpha is 8.*were trained with 2"):
        loop.train(lora_from(arm, place, model=model, resume=True))


def test_adapters_are_trained_over_a_base_in_eight_bits(arm: TrainConfig, base: Path, tmp_path: Path) -> None:
    """The checkpoint has the rounded weights that were trained with, so a continued run and a server have them, too."""
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    of_16, of_8 = (
        loop.train(lora_from(arm, place, pytorch_frozen_bits=bits, exp_name=f"of-{bits}")).checkpoint
        for bits in (16, 8)
    )
    params = [params_of(checkpoint) for checkpoint in (of_16, of_8)]
    kernel = "PaliGemma/llm/layers/mlp/gating_einsum"
    exact, rounded = (np.asarray(found[kernel], np.float32) for found in params)
    assert 0 < np.abs(exact - rounded).max() < np.abs(exact).max() / 100
    expected, found = (metrics_of(checkpoint.parent) for checkpoint in (of_16, of_8))
    for step in range(3):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=0.05)

    parts = {"pytorch_frozen_bits": 8, "exp_name": "parts"}
    loop.train(lora_from(arm, place, **parts, num_train_steps=2))
    continued = loop.train(lora_from(arm, place, **parts, resume=True)).checkpoint
    np.testing.assert_equal(params_of(continued), params[1])
    assert metrics_of(continued.parent) == found
    np.testing.assert_allclose(actions_of(of_8, "pytorch"), actions_of(of_8, "jax"), atol=1e-4)


def test_gradients_freed_in_the_backward_pass_make_the_same_steps(arm: TrainConfig) -> None:
    arm = dataclasses.replace(arm, optimizer=AdamW(clip_gradient_norm=math.inf), num_train_steps=4, holdout_episodes=0)
    usual = loop.train(dataclasses.replace(arm, exp_name="usual"))
    loop.train(dataclasses.replace(arm, num_train_steps=2, pytorch_free_gradients=True))
    freed = loop.train(dataclasses.replace(arm, pytorch_free_gradients=True, resume=True))
    expected, found = metrics_of(usual.checkpoint.parent), metrics_of(freed.checkpoint.parent)
    for step in range(4):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


REFUSED: dict[str, tuple[Callable[[TrainConfig], TrainConfig], str]] = {
    "cpu_devices": (lambda c: dataclasses.replace(c, cpu_devices=2), "cpu_devices=2"),
    "clipping": (
        lambda c: dataclasses.replace(c, pytorch_free_gradients=True),
        "optimizer.clip_gradient_norm must be inf; it is 1.0",
    ),
    "eight bits of nothing": (
        lambda c: dataclasses.replace(c, pytorch_frozen_bits=8),
        "this recipe freezes none",
    ),
    "eight bits unsaved": (
        lambda c: dataclasses.replace(
            c,
            pytorch_frozen_bits=8,
            save_frozen_params=False,
            freeze_filter=tiny_recipe.lora.freeze_filter,
            weight_loader=CheckpointWeightLoader("base"),
        ),
        "set save_frozen_params=True",
    ),
    "fsdp_devices": (
        lambda c: dataclasses.replace(c, fsdp_devices=3),
        "fsdp_devices=3 does not divide the 1 processes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_it_cannot_honour_are_refused_before_work_starts(arm: TrainConfig, case: str) -> None:
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        loop.train(change(arm))
    assert not Path("checkpoints").exists()


def test_layers_and_gradients_of_a_random_model_agree_with_jax() -> None:
    """Also where the recorded kits have nothing: augmentation off, several draws sharing a prefix."""
    config = dataclasses.replace(BOTH, model=dataclasses.replace(BOTH.model, loss_draws=3))
    pair = Pair(config)
    batch = next(pair.batches)
    rng = np.random.default_rng(0)
    noise, time = step_pytorch.draw_flow(config.model, rng, config.batch_size, 3)
    assert noise is not None and time is not None
    random = step_pytorch.Randomness(noise, time, None)
    loss = step_pytorch.batch_loss(pair.of_torch.model, pair.torch.place(batch, 0).rows, random)
    loss.backward()

    def of_jax(params: Any) -> jax.Array:
        from openpi.models import pi0

        model = config.model
        observation, actions = step_jax._inputs(pair.jax.place(batch, 0))
        observation = model.load(params).preprocess(None, observation, train=False)
        prefix = pi0.encode_prefix(model, params, pi0.embed_prefix(model, params, observation))
        draws = (jnp.asarray(noise.numpy()), jnp.asarray(time.numpy()))
        return jnp.mean(pi0.loss_over_draws(model, params, observation.state, actions, *draws, *prefix))

    expected, gradients = jax.jit(jax.value_and_grad(of_jax))(pair.of_jax.params)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    found = {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in pair.of_torch.model.named_parameters()
    }
    scale = max(float(jnp.abs(leaf).max()) for leaf in flatten(gradients).values())
    assert_alike(pair._trees(gradients, found), atol=1e-6 * scale)


@torch.no_grad()
def test_steps_too_small_for_bfloat16_count_on_average_with_moments_of_eight_bits() -> None:
    start = torch.full((256, 512), 1.0)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        param = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = adam_8bit_pytorch.AdamW8bit([param], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 1e-4  # bfloat16 has steps of 39e-4 below 1
        for _ in range(20):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[dtype] = float((start - param.float()).mean())
    assert moved[torch.float32] == pytest.approx(20e-4, rel=0.01)
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.03)


def test_rounding_at_random_keeps_what_bfloat16_can_tell_and_what_is_not_finite() -> None:
    rounding = torch.Generator().manual_seed(0)
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e38, float("inf"), -float("inf"), float("nan")])
    torch.testing.assert_close(
        adam_8bit_pytorch.rounded(exact.bfloat16().float(), rounding), exact.bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    between = torch.full((10_000,), -1 - 0.25 / 128)
    found = adam_8bit_pytorch.rounded(between, rounding).float()
    assert set(found.tolist()) == {-1.0, -1 - 1 / 128} and float(found.mean()) == pytest.approx(
        -1 - 0.25 / 128, abs=3e-4
    )
