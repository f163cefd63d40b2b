"""`PI0Pytorch` as programs use it: made of a configuration, given released weights, asked for losses and actions."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_file, save_model

import tiny_recipe
from golden_kits import Kit, load_kit
from openpi.models import model as _model
from openpi.models_pytorch.pi0_pytorch import PI0Pytorch
from openpi.weights import names, spelling

LOSS, ACTIONS = 1e-4, 2e-4
TABLE = "paligemma_with_expert.paligemma.lm_head.weight"
SECOND = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
PATCHES = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.patch_embedding.weight"


def released(kit: Kit) -> dict[str, torch.Tensor]:
    """What the published converter writes of the kit's weights."""
    from openpi.shared.tree import flatten

    flat = flatten(kit.params)
    rows = names.rows(kit.config)
    return {row.released: torch.tensor(np.ascontiguousarray(row.to_torch(flat[row.tree][row.index]))) for row in rows}


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def kit(request, golden: Path) -> Kit:
    return load_kit(golden / request.param)


@pytest.fixture(scope="module")
def model(kit, tmp_path_factory):
    file = tmp_path_factory.mktemp("released") / "model.safetensors"
    save_file({**released(kit), spelling.UNUSED_TABLE: torch.zeros(1)}, file)
    model = PI0Pytorch(kit.config)
    load_model(model, file)
    return model.eval()


def test_its_parameters_have_the_released_names(model, kit, golden):
    folder = golden / ("pi05" if kit.config.pi05 else "pi0")
    stored = json.loads((folder / "torch" / "layout.json").read_text())["tensors"]
    assert model.state_dict().keys() == stored.keys() - {spelling.UNUSED_TABLE}
    assert {name for name, _ in model.named_parameters()} == model.state_dict().keys()


def test_losses_and_actions_equal_the_recording(model, kit):
    data = {key: jax_free(value) for key, value in kit.observation().items()}
    observation = _model.Observation.from_dict(data)
    assert observation.images["base_0_rgb"].shape[1] == 3  # as published
    inputs = {key: torch.as_tensor(kit.inputs[key]) for key in ("actions", "loss_noise", "loss_time", "sample_noise")}
    with torch.no_grad():
        losses = model(observation, inputs["actions"].double(), noise=inputs["loss_noise"], time=inputs["loss_time"])
    assert losses.shape == kit.inputs["actions"].shape
    np.testing.assert_allclose(losses.mean(-1), kit.outputs["loss"], atol=LOSS, rtol=LOSS)
    sampled = model.sample_actions("cpu", observation, noise=inputs["sample_noise"])
    np.testing.assert_allclose(sampled, kit.outputs["sampled_actions_10"], atol=ACTIONS)


def jax_free(value):
    return {key: jax_free(item) for key, item in value.items()} if isinstance(value, dict) else torch.as_tensor(value)


# --- with a small model ----------------------------------------------------------------------------------------


@pytest.fixture
def small():
    torch.manual_seed(0)
    return PI0Pytorch(tiny_recipe.MODEL)


def batch():
    config = tiny_recipe.MODEL
    data = {
        "image": {"base_0_rgb": torch.zeros(2, *config.image_resolution, 3, dtype=torch.uint8)},
        "image_mask": {"base_0_rgb": torch.ones(2, dtype=torch.bool)},
        "state": torch.zeros(2, config.action_dim, dtype=torch.float64),
        "tokenized_prompt": torch.ones(2, config.max_token_len, dtype=torch.int64),
        "tokenized_prompt_mask": torch.ones(2, config.max_token_len, dtype=torch.bool),
    }
    return _model.Observation.from_dict(data), torch.zeros(2, config.action_horizon, config.action_dim)


def test_it_trains_as_the_published_script_does(small):
    small.gradient_checkpointing_enable()
    assert small.model.config.remat == "full"
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss = small(*batch()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    small.gradient_checkpointing_disable()
    assert small.config.remat == "none"


def test_images_are_augmented_while_it_trains_and_only_then():
    model = PI0Pytorch(dataclasses.replace(tiny_recipe.MODEL, augmentation=True))
    for parameter in model.parameters():  # some begin as zero, and let nothing through
        torch.nn.init.normal_(parameter, std=0.2)
    observation, actions = batch()
    ramp = torch.linspace(-1, 1, 28)[None, None, None].expand(2, 3, 28, 28)
    observation = dataclasses.replace(observation, images={"base_0_rgb": ramp})

    def loss(seed):
        torch.manual_seed(seed)
        fixed = {"noise": torch.ones_like(actions), "time": torch.full((2,), 0.5)}
        return model(observation, actions, **fixed).mean().item()

    assert loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


def test_half_precision_keeps_what_is_published_in_f32(small):
    small.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    wide = {name for name, parameter in small.named_parameters() if parameter.dtype == torch.float32}
    assert {PATCHES, "action_in_proj.weight"} <= wide and TABLE not in wide
    layer = "paligemma_with_expert.gemma_expert.model.layers.0"
    assert f"{layer}.input_layernorm.weight" in wide and f"{layer}.mlp.up_proj.weight" not in wide
    assert small.eval()(*batch()).isfinite().all()
    with pytest.raises(ValueError, match="precision='float16'"):
        small.paligemma_with_expert.to_bfloat16_for_selected_params("float16")


def test_what_it_saves_is_read_by_it_and_by_the_policy_s_reader(small, tmp_path):
    from openpi.models_pytorch import loading
    from openpi.weights.opening import open_weights

    save_model(small, tmp_path / "model.safetensors")
    other = PI0Pytorch(tiny_recipe.MODEL)
    load_model(other, tmp_path / "model.safetensors")
    ours = loading.load_checkpoint(tiny_recipe.MODEL, open_weights(tiny_recipe.MODEL, tmp_path))
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, dict(other.named_parameters())[name])
    assert torch.equal(ours.action_in_proj.weight, small.model.action_in_proj.weight)


def test_a_part_of_a_model_of_ones_own_keeps_the_names(small):
    whole = torch.nn.ModuleDict({"policy": small})
    stored = whole.state_dict()
    assert f"policy.{TABLE}" in stored
    for tensor in stored.values():
        tensor.zero_()
    again = torch.nn.ModuleDict({"policy": PI0Pytorch(tiny_recipe.MODEL)})
    again.load_state_dict(stored)
    assert all(not parameter.any() for parameter in again.parameters())


def test_a_subclass_may_add_to_it(tmp_path):
    class WithValue(PI0Pytorch):
        def __init__(self, config):
            super().__init__(config)
            self.value_head = torch.nn.Linear(4, 1)

    model = WithValue(tiny_recipe.MODEL)
    assert {"value_head.weight", TABLE} <= {name for name, _ in model.named_parameters()} & model.state_dict().keys()
    missing, unexpected = model.load_state_dict(PI0Pytorch(tiny_recipe.MODEL).state_dict(), strict=False)
    assert set(missing) == {"value_head.weight", "value_head.bias"} and unexpected == []


def test_weights_that_do_not_fit_are_named_as_in_the_file(small):
    stored = small.state_dict()
    lerobot = {spelling.LEROBOT_PREFIX + name: tensor for name, tensor in stored.items()}
    assert small.load_state_dict(lerobot) == ([], [])
    without = {name: tensor for name, tensor in stored.items() if name != PATCHES}
    assert small.load_state_dict({**without, "head.weight": torch.zeros(1)}, strict=False) == (
        [PATCHES],
        ["head.weight"],
    )
    with pytest.raises(RuntimeError, match=PATCHES.replace(".", r"\.")):
        small.load_state_dict(without)
    small.load_state_dict({**stored, SECOND: stored[TABLE]})
    with pytest.raises(ValueError, match="two names of one tensor"):
        small.load_state_dict({**stored, SECOND: stored[TABLE] + 1})


def test_a_model_that_was_not_published_is_refused():
    with pytest.raises(ValueError, match="is a Pi0FASTConfig"):
        PI0Pytorch(tiny_recipe.fast.model)
