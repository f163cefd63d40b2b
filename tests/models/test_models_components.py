"""Pieces of the models against recordings, and what they refuse."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi.models import pi0
from openpi.models.augment import augment_images
from openpi.models.gemma_config import GemmaConfig, get_config
from openpi.models.model import Observation, preprocess_observation, resize_with_pad
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten, unflatten

TINY = Pi0Config(
    dtype="float32",
    paligemma_variant=GemmaConfig(32, 1, 64, 2, 1, 16, vocab_size=64),
    action_expert_variant=GemmaConfig(32, 1, 64, 2, 1, 16, vocab_size=64),
    image_encoder_variant=SiglipConfig(32, 1, 64, 2, 16),
    image_resolution=(32, 32),
    action_dim=6,
    action_horizon=4,
    max_token_len=8,
)


@pytest.fixture(scope="module")
def recorded(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "components" / "components.npz") as data:
        return dict(data)


def test_time_embedding_equals_the_recording(recorded: dict) -> None:
    dims = [int(key.rsplit("_", 1)[1]) for key in recorded if key.startswith("posemb/jax_")]
    assert dims
    for dim in dims:
        embedded = pi0.posemb_sincos(jnp.asarray(recorded["posemb/t"], jnp.float32), dim)
        # The angle reaches 2 pi / 4e-3, where one f32 rounding is 1e-4 rad.
        np.testing.assert_allclose(embedded, recorded[f"posemb/jax_{dim}"], atol=2e-4)


def test_flow_times_follow_the_recorded_draw(recorded: dict) -> None:
    key = jax.random.split(jax.random.key(11), 3)[2]
    drawn = np.asarray(pi0.draw_time(key, (4096,)))
    expected = recorded["time/beta_key11_b4096"]
    assert drawn.min() > 0.001 - 1e-6 and drawn.max() <= 1
    np.testing.assert_allclose(np.quantile(drawn, np.linspace(0.05, 0.95, 10)),
                               np.quantile(expected, np.linspace(0.05, 0.95, 10)), atol=0.03)  # fmt: skip


def test_device_resize_equals_the_recording(recorded: dict) -> None:
    cases = sorted({key.split("/")[1] for key in recorded if key.startswith("resize/")})
    assert cases
    for case in cases:
        _, _, height, width = recorded[f"resize/{case}/size"]
        image = jnp.asarray(recorded[f"resize/{case}/in_u8"])
        as_uint8 = np.asarray(resize_with_pad(image, int(height), int(width)), np.int32)
        assert np.abs(as_uint8 - recorded[f"resize/{case}/jax_u8"]).max() <= 1
        as_float = resize_with_pad(image.astype(jnp.float32) / 255 * 2 - 1, int(height), int(width))
        np.testing.assert_allclose(as_float, recorded[f"resize/{case}/jax_f32"], atol=1e-5)


def test_resize_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match="int32; expected uint8"):
        resize_with_pad(jnp.zeros((8, 8, 3), jnp.int32), 4, 4)


def test_augmentation_equals_the_recording(recorded: dict) -> None:
    cameras = [key.rsplit("/", 1)[1] for key in recorded if key.startswith("aug/in_u8/")]
    images = {key: jnp.asarray(recorded[f"aug/in_u8/{key}"], jnp.float32) / 255 * 2 - 1 for key in cameras}
    for key, image in augment_images(jax.random.key(5), images).items():
        np.testing.assert_allclose(image, recorded[f"aug/out_key5/{key}"], atol=2e-5)


def test_preprocessing_fills_in_masks_keeps_the_order_and_drops_other_cameras() -> None:
    images = {"extra": np.zeros((2, 8, 8, 3), np.float32)}
    images |= {key: np.zeros((2, 8, 8, 3), np.float32) for key in reversed(TINY.image_keys)}
    observation = Observation(images=images, image_masks={}, state=np.zeros((2, 6), np.float32))
    processed = preprocess_observation(None, observation, image_resolution=(8, 8))
    assert tuple(processed.images) == TINY.image_keys
    assert all(mask.all() and mask.shape == (2,) for mask in processed.image_masks.values())
    assert observation.image_masks == {}


def test_a_missing_camera_is_named() -> None:
    observation = Observation(images={"front": np.zeros((1, 8, 8, 3))}, image_masks={}, state=np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"missing the cameras .*base_0_rgb.*found \['front'\]"):
        preprocess_observation(None, observation)


@given(st.integers(0, 255))
@settings(max_examples=20, deadline=None)
def test_uint8_images_become_minus_one_to_one_without_touching_the_input(level: int) -> None:
    data = {
        "image": {"base_0_rgb": np.full((1, 2, 2, 3), level, np.uint8)},
        "image_mask": {"base_0_rgb": np.ones(1, bool)},
        "state": np.zeros((1, 6), np.float32),
    }
    observation = Observation.from_dict(data)
    np.testing.assert_allclose(observation.images["base_0_rgb"], level / 255 * 2 - 1, atol=1e-6)
    assert data["image"]["base_0_rgb"].dtype == np.uint8
    assert observation.to_dict().keys() == data.keys()


def test_prompt_and_mask_go_together() -> None:
    data = {"image": {}, "image_mask": {}, "state": np.zeros(6), "tokenized_prompt": np.zeros(4, np.int64)}
    with pytest.raises(ValueError, match="go together"):
        Observation.from_dict(data)


@pytest.mark.parametrize("pi05", [False, True])
def test_a_created_model_trains_and_samples_with_its_spec(pi05: bool) -> None:
    config = dataclasses.replace(TINY, pi05=pi05)
    model = config.create(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.shape, model.params) == jax.tree.map(
        lambda leaf: leaf.shape, config.abstract_params()
    )
    assert len(flatten(model.params)) == (51 if pi05 else 50)
    loss = jax.jit(lambda m, o, a: m.compute_loss(jax.random.key(1), o, a, train=True))(
        model, config.fake_obs(2), config.fake_act(2)
    )
    assert loss.shape == (2, 4) and bool(jnp.isfinite(loss).all())
    sample = jax.jit(lambda m, o: m.sample_actions(jax.random.key(2), o, num_steps=2))
    actions = sample(model, config.fake_obs(2))
    assert actions.shape == (2, 4, 6)


@pytest.mark.parametrize(("pi05", "total", "leaves"), [(False, 3_238_048_528, 50), (True, 3_353_433_872, 51)])
def test_full_size_models_have_the_published_parameter_count(pi05: bool, total: int, leaves: int) -> None:
    params = flatten(Pi0Config(pi05=pi05).abstract_params())
    assert len(params) == leaves
    assert sum(int(np.prod(leaf.shape)) for leaf in params.values()) == total


def random_inputs(config: Pi0Config) -> tuple[Observation, jax.Array]:
    """Random values in the shapes of the config's spec, all masks true."""
    keys = iter(jax.random.split(jax.random.key(3), 20))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            return jnp.ones(leaf.shape, bool)
        if leaf.dtype == jnp.int32:
            return jax.random.randint(next(keys), leaf.shape, 0, 60)
        return jax.random.uniform(next(keys), leaf.shape, minval=-1.0)

    observation, actions = jax.tree.map(draw, config.inputs_spec(batch_size=2))
    return observation, actions


def random_params(config: Pi0Config) -> dict:
    """By NumPy: drawing them as a model does is a program of its own, to be compiled."""
    rng = np.random.default_rng(0)
    shapes = flatten(config.abstract_params())
    return unflatten({path: 0.1 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in shapes.items()})


def test_the_drawn_loss_delegates_with_the_published_split_of_the_key() -> None:
    model = TINY.load(random_params(TINY))
    observation, actions = random_inputs(TINY)

    @jax.jit
    def both(key: jax.Array, model: pi0.Pi0, observation: Observation, actions: jax.Array) -> tuple:
        _, noise_key, time_key = jax.random.split(key, 3)
        noise, time = jax.random.normal(noise_key, actions.shape), pi0.draw_time(time_key, (2,))
        drawn = model.compute_loss(key, observation, actions, train=False)
        return drawn, pi0.loss(TINY, model.params, observation, actions, noise, time)

    np.testing.assert_array_equal(*both(jax.random.key(7), model, observation, actions))


def test_remat_and_unrolling_change_no_gradient() -> None:
    for depth in (1, 6):  # unrolled, scanned
        expert = GemmaConfig(16, depth, 16, 2, 1, 8, vocab_size=64)
        base = dataclasses.replace(
            TINY, image_keys=TINY.image_keys[:1], paligemma_variant=expert, action_expert_variant=expert
        )
        params = random_params(base)
        observation, actions = random_inputs(base)

        def gradient(remat: str, base=base, observation=observation, actions=actions, params=params) -> dict:
            config = dataclasses.replace(base, remat=remat)
            noise, time = jnp.ones_like(actions), jnp.full(2, 0.5)
            mean_loss = lambda p: jnp.mean(pi0.loss(config, p, observation, actions, noise, time))  # noqa: E731
            return flatten(jax.jit(jax.grad(mean_loss))(params))

        reference = gradient("full")
        for remat in ("dots", "none"):
            for path, leaf in gradient(remat).items():
                np.testing.assert_allclose(leaf, reference[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_loading_names_every_kind_of_misfit() -> None:
    params = TINY.create(jax.random.key(0)).params
    params = {
        **params,
        "surprise": {"kernel": jnp.zeros(3)},
        "action_out_proj": {"kernel": jnp.zeros((32, 7))},
    }
    with pytest.raises(ValueError) as error:
        TINY.load(params, remove_extra_params=False)
    message = str(error.value)
    assert "action_out_proj/bias: missing, expected shape (6,)" in message
    assert "action_out_proj/kernel: shape (32, 7), expected (32, 6)" in message
    assert "surprise/kernel: unexpected" in message


def test_defaults_follow_the_family() -> None:
    assert (Pi0Config().max_token_len, Pi0Config().discrete_state_input) == (48, False)
    assert (Pi0Config(pi05=True).max_token_len, Pi0Config(pi05=True).discrete_state_input) == (200, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paligemma_variant": "gemma_7b"}, "unknown Gemma variant 'gemma_7b'; registered: dummy"),
        ({"action_expert_variant": "dummy"}, "the same depth"),
        ({"image_encoder_variant": "So400m"}, "expected NAME/PATCH"),
        ({"image_resolution": (100, 100)}, "not a multiple of the patch size"),
        ({"pytorch_compile_mode": "fast"}, "pytorch_compile_mode='fast'; expected one of None"),
        ({"remat": "some"}, "remat='some'"),
    ],
)
def test_a_config_that_cannot_work_is_refused_at_once(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Pi0Config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paligemma_variant": "gemma_7b"}, "unknown Gemma variant 'gemma_7b'"),
        ({"image_encoder_variant": "So400m"}, "expected NAME/PATCH"),
        ({"image_resolution": (224, 100)}, "not a multiple of the patch size"),
        ({"dtype": "float16"}, "dtype='float16'; expected one of 'bfloat16', 'float32'"),
        ({"remat": "some"}, "remat='some'"),
        ({"action_dim": 0}, "action_dim=0; expected a whole number of at least 1"),
        ({"image_keys": ()}, "image_keys is empty"),
    ],
)
@pytest.mark.parametrize("config", [Pi0Config, Pi0FASTConfig])
def test_what_all_models_share_is_checked_in_each(config: type, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_explicit_dims_pass_through() -> None:
    dims = GemmaConfig(8, 1, 8, 2, 1, 4)
    assert get_config(dims) is dims
    with pytest.raises(ValueError, match="not a multiple of num_kv_heads"):
        GemmaConfig(8, 1, 8, 3, 2, 4)
