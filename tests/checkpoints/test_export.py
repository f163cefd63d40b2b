"""LoRA checkpoints without their adapters."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi.cli.checkpoints import export
from openpi.models import gemma_config
from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model import restore_params
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten, unflatten
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.weights import merging, orbax_io

_EXPERT = GemmaConfig(
    width=16,
    depth=5,  # layers are scanned: quicker to compile than two that are not
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=300,
    attn_lora=LoRAConfig(rank=2, alpha=6.0),
    ffn_lora=LoRAConfig(rank=2, alpha=2.0),
)
_IMAGES = {
    "image_encoder_variant": SiglipConfig(width=16, depth=1, mlp_dim=16, num_heads=2),
    "image_resolution": (28, 28),
    "image_keys": ("base_0_rgb",),
}
_SIZES = {"dtype": "float32", "action_dim": 4, "action_horizon": 3, "max_token_len": 8}
_EXPERTS = {"paligemma_variant": _EXPERT, "action_expert_variant": dataclasses.replace(_EXPERT, width=12)}
MODELS = {
    "pi0": Pi0Config(**_SIZES, **_EXPERTS, **_IMAGES),
    "pi05": Pi0Config(pi05=True, **_SIZES, **_EXPERTS, **_IMAGES),
    "pi0_fast": Pi0FASTConfig(**_SIZES, paligemma_variant=_EXPERT, **_IMAGES),
}


def with_large_adapters(config) -> dict:
    """Fresh adapters change next to nothing, and fresh gates of pi0.5 let nothing through; these do."""
    rng = np.random.default_rng(0)
    shapes = flatten(config.abstract_params())
    return unflatten({path: rng.normal(0, 0.2, leaf.shape).astype(np.float32) for path, leaf in shapes.items()})


def random_inputs(config):
    """A batch of two with the shapes of `inputs_spec`: every mask true, tokens below 256."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype == np.bool_:
            return jnp.ones(leaf.shape, leaf.dtype)
        is_token = np.issubdtype(leaf.dtype, np.integer)
        return jnp.asarray(rng.integers(0, 256, leaf.shape) if is_token else rng.uniform(-1, 1, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, config.inputs_spec(batch_size=2))


@jax.jit
def loss(model, observation, actions) -> jax.Array:
    return model.compute_loss(jax.random.key(0), observation, actions)


@functools.partial(jax.jit, static_argnames="max_decoding_steps")
def sample(model, observation, **options) -> jax.Array:
    return model.sample_actions(jax.random.key(1), observation, **options)


def checkpoint(folder: Path, config) -> Path:
    orbax_io.write_params(folder / "params", with_large_adapters(config))
    recipe_io.save_recipe(folder, TrainConfig(name="tuned", exp_name="x", model=config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_checkpoint_gives_the_same_actions_without_adapters(tmp_path, name, capfd):
    source = checkpoint(tmp_path / "0", MODELS[name])
    assert export.main([str(source), "--merge", f"--output={tmp_path / 'merged'}"]) == 0
    assert "has no normalisation statistics, so neither has" in capfd.readouterr().err
    recipe = recipe_io.load_recipe(tmp_path / "merged")
    params = restore_params(tmp_path / "merged" / "params")
    assert not any("lora" in path for path in flatten(params))

    observation, actions = random_inputs(recipe.model)
    models = [
        MODELS[name].load(restore_params(source / "params")),
        recipe.model.load(params, remove_extra_params=False),
    ]
    losses = [loss(model, observation, actions) for model in models]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    options = {"max_decoding_steps": 4} if name == "pi0_fast" else {}
    samples = [sample(model, observation, **options) for model in models]
    np.testing.assert_allclose(samples[0], samples[1], atol=1e-4)
    bare = MODELS[name].load(with_large_adapters(MODELS[name]))
    without = recipe.model.load(bare.params)  # adapters dropped
    assert np.abs(loss(without, observation, actions) - losses[0]).max() > 1e-3


def test_names_of_variants_lose_their_adapters():
    config = Pi0Config(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")
    plain = gemma_config.without_adapters(config)
    assert (plain.paligemma_variant, plain.action_expert_variant) == ("gemma_2b", "gemma_300m")


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path, capsys):
    plain = gemma_config.without_adapters(MODELS["pi0"])
    source = checkpoint(tmp_path / "0", plain)
    assert export.main([str(source), "--merge", f"--output={tmp_path / 'merged'}"]) == 1
    assert "has no adapters" in capsys.readouterr().err
    assert export.main([str(source), "--merge", f"--output={source}"]) == 1
    assert "exists; choose another --output" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]


def test_a_merge_that_computes_something_else_is_refused(tmp_path, capsys, monkeypatch):
    right = merging._scalings
    monkeypatch.setattr(merging, "_scalings", lambda config: {name: 1.1 * by for name, by in right(config).items()})
    source = checkpoint(tmp_path / "0", MODELS["pi0"])
    assert export.main([str(source), "--merge", f"--output={tmp_path / 'merged'}"]) == 1
    assert "the merged model differs by" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]


def test_adapters_that_were_never_trained_are_warned_of(tmp_path, capfd):
    large = flatten(with_large_adapters(MODELS["pi0"]))
    tiny = {path: leaf * np.float32(1e-4 if "lora" in path else 1) for path, leaf in large.items()}
    orbax_io.write_params(tmp_path / "0" / "params", unflatten(tiny))
    recipe_io.save_recipe(tmp_path / "0", TrainConfig(name="tuned", exp_name="x", model=MODELS["pi0"]))
    assert export.main([str(tmp_path / "0"), "--merge", f"--output={tmp_path / 'merged'}"]) == 0
    assert "the adapters hardly change the model: were they trained?" in capfd.readouterr().err
