"""The PyTorch models against numbers recorded from the reference implementation, with its tolerances."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from golden_kits import Kit, load_kit
from openpi.models_pytorch import loading
from openpi.models_pytorch.augment import Draws, Jitter, augment_images
from openpi.models_pytorch.model import Observation, make_attention_mask, resize_with_pad
from openpi.shared.tree import flatten

HIDDEN = 2e-4  # f32 hidden states, caches, velocities, and sampled actions
EMBEDDING = {"atol": 2e-5, "rtol": 1e-5}
LOSS = {"atol": 1e-4, "rtol": 1e-4}
GRADIENT = 1e-3  # relative
BF16 = 5e-2


@dataclasses.dataclass(frozen=True)
class Subject:
    kit: Kit
    model: Any

    def observation(self, **options: bool) -> Observation:
        return Observation.from_dict(self.kit.observation(**options))

    def array(self, name: str) -> Any:
        return torch.as_tensor(self.kit.inputs[name])

    def loss(self, *, all_cameras: bool = False) -> Any:
        arrays = (self.array(name) for name in ("actions", "loss_noise", "loss_time"))
        return self.model(self.observation(all_cameras=all_cameras), *arrays)

    def other(self, dtype: str, params: Any = None) -> "Subject":
        """The same weights in another model dtype."""
        config = dataclasses.replace(self.kit.config, dtype=dtype)
        options = {} if params is None else {"dtype": lambda row, stored: params}
        return Subject(self.kit, loading.from_tree(config, self.kit.params, **options))


@pytest.fixture(scope="module", params=["pi0", "pi05", "pi0_lora"])
def flow(request: pytest.FixtureRequest, golden: Path) -> Subject:
    kit = load_kit(golden / request.param)
    return Subject(kit, loading.from_tree(kit.config, kit.params))


@pytest.fixture(scope="module")
def fast(golden: Path) -> Subject:
    kit = load_kit(golden / "pi0_fast")
    return Subject(kit, loading.from_tree(kit.config, kit.params))


def close(actual: Any, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(actual.detach().float().numpy(), expected, atol=atol, rtol=rtol)


def close_where_real(actual: Any, every4: np.ndarray, mask: Any) -> None:
    """Tokens that are padding hold defined but meaningless numbers: only real ones are compared."""
    real = mask.numpy()[:, ::4]
    np.testing.assert_allclose(actual.detach().numpy()[:, ::4][real], every4[real], atol=HIDDEN, rtol=0)


def assert_gradients_equal_the_recording(subject: Subject) -> None:
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in subject.model.named_parameters()}
    gradients = flatten(loading.to_tree(subject.kit.config, found))
    recorded = subject.kit.meta["parameters"]
    assert gradients.keys() == recorded.keys()
    scale = max(leaf["grad_l2"] for leaf in recorded.values())
    for path, leaf in recorded.items():
        l2 = float(np.linalg.norm(gradients[path]))
        assert l2 == pytest.approx(leaf["grad_l2"], rel=GRADIENT, abs=1e-7 * scale), path


# --- pi0, pi0.5, LoRA ---------------------------------------------------------------------------------------------


def test_loss_and_gradients_equal_the_recording(flow: Subject) -> None:
    close(flow.loss(all_cameras=True), flow.kit.outputs["loss_all_cameras"], **LOSS)
    flow.model.zero_grad()
    loss = flow.loss()
    close(loss, flow.kit.outputs["loss"], **LOSS)
    loss.mean().backward()
    assert_gradients_equal_the_recording(flow)


@pytest.mark.parametrize("remat", ["dots", "none"])
def test_what_the_backward_pass_keeps_changes_no_gradient(flow: Subject, remat: str) -> None:
    config = dataclasses.replace(flow.kit.config, remat=remat)
    other = Subject(flow.kit, loading.from_tree(config, flow.kit.params))
    other.loss().mean().backward()
    assert_gradients_equal_the_recording(other)


def test_prefix_suffix_and_joint_pass_equal_the_recording(flow: Subject) -> None:
    model, out = flow.model, flow.kit.outputs
    observation, time = model.preprocess(flow.observation()), flow.array("loss_time")
    prefix = model.embed_prefix(observation)
    close(prefix.embedded[:, ::4], out["prefix_embs_every4"], **EMBEDDING)
    np.testing.assert_array_equal(prefix.mask, out["prefix_mask"])
    np.testing.assert_array_equal(prefix.ar_mask, out["prefix_ar_mask"])

    t = time[:, None, None]
    of_time = model.embed_time(time)
    suffix = model.embed_suffix(
        observation.state, t * flow.array("loss_noise") + (1 - t) * flow.array("actions"), of_time
    )
    close(suffix.embedded, out["suffix_embs"], **EMBEDDING)
    np.testing.assert_array_equal(suffix.mask, out["suffix_mask"])
    np.testing.assert_array_equal(suffix.ar_mask, out["suffix_ar_mask"])
    if flow.kit.config.pi05:
        close(of_time, out["adarms_cond"], **EMBEDDING)

    mask = torch.cat([prefix.mask, suffix.mask], dim=1)
    positions = torch.cumsum(mask, dim=1) - 1
    np.testing.assert_array_equal(positions, out["positions"])
    (prefix_out, suffix_out), _ = model.transformer(
        [prefix.embedded, suffix.embedded],
        places=model.places(positions, make_attention_mask(mask, torch.cat([prefix.ar_mask, suffix.ar_mask]))),
        of_time=of_time,
    )
    close(suffix_out, out["suffix_hidden_joint"], HIDDEN)
    close_where_real(prefix_out, out["prefix_hidden_joint_every4"], prefix.mask)
    close(model.velocity(suffix_out), out["v_t_loss"], HIDDEN)


def test_cached_prefix_and_first_step_equal_the_recording(flow: Subject) -> None:
    model, out = flow.model, flow.kit.outputs
    observation = model.preprocess(flow.observation())
    prefix = model.embed_prefix(observation)
    (hidden, _), cache = model.transformer(
        [prefix.embedded, None],
        places=model.places(torch.cumsum(prefix.mask, dim=1) - 1, make_attention_mask(prefix.mask, prefix.ar_mask)),
        of_time=None,
    )
    close_where_real(hidden, out["prefix_hidden_every4"], prefix.mask)
    for layer, pair in enumerate(cache):
        for found, name in zip(pair, ("kv_cache_k_every4", "kv_cache_v_every4"), strict=True):
            close_where_real(found, out[name][layer], prefix.mask)
    of_time = model.embed_time(torch.ones(2))
    for in_place in (False, True):
        context = model.context(prefix.mask, [(k.detach(), v.detach()) for k, v in cache], in_place=in_place)
        with torch.no_grad():
            v_t = model.denoise(observation.state, flow.array("sample_noise"), of_time, context)
        close(v_t, out["v_t_step0"], HIDDEN)


@pytest.mark.parametrize("num_steps", [10, 3])
def test_sampled_actions_equal_the_recording(flow: Subject, num_steps: int) -> None:
    actions = flow.model.sample_actions(flow.observation(), flow.array("sample_noise"), num_steps=num_steps)
    close(actions, flow.kit.outputs[f"sampled_actions_{num_steps}"], 1e-4)


def test_fused_weights_sample_the_same_actions(flow: Subject) -> None:
    model = loading.from_tree(flow.kit.config, flow.kit.params)
    for module in [module for module in model.modules() if hasattr(module, "fuse")]:
        module.fuse()
    actions = model.sample_actions(flow.observation(all_cameras=True), flow.array("sample_noise"))
    close(actions, flow.kit.outputs["sampled_actions_10_all_cameras"], 1e-4)


def test_bf16_serving_and_training_setups_agree_with_the_recording(flow: Subject) -> None:
    serving = flow.other("bfloat16", torch.bfloat16)
    actions = serving.model.sample_actions(flow.observation(), flow.array("sample_noise"))
    assert actions.dtype == torch.float32
    close(actions, flow.kit.outputs["bf16_sampled_actions_10"], BF16)
    loss = flow.other("bfloat16").loss()
    assert loss.dtype == torch.float32
    close(loss, flow.kit.outputs["bf16_train_loss"], BF16, BF16)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_outputs_of_the_reference_in_pytorch_are_met(family: str, golden: Path) -> None:
    kit = load_kit(golden / family)
    subject = Subject(kit, loading.from_tree(kit.config, kit.params))
    with np.load(golden / family / "torch" / "outputs.npz") as recorded:
        outputs = dict(recorded)
    actions = subject.model.sample_actions(subject.observation(), subject.array("sample_noise"))
    close(actions, outputs["sampled_actions_10"], 1e-4)


# --- pi0-FAST -----------------------------------------------------------------------------------------------------


def test_fast_loss_and_gradients_equal_the_recording(fast: Subject) -> None:
    close(fast.model(fast.observation()), fast.kit.outputs["loss_masked_cameras"], **LOSS)
    fast.model.zero_grad()
    loss = fast.model(fast.observation(all_cameras=True))
    close(loss, fast.kit.outputs["loss"], **LOSS)
    loss.mean().backward()
    assert_gradients_equal_the_recording(fast)
    in_bf16 = fast.other("bfloat16").model(fast.observation(all_cameras=True))
    assert in_bf16.dtype == torch.float32
    close(in_bf16, fast.kit.outputs["bf16_train_loss"], BF16, BF16)


@torch.no_grad()
def test_the_fast_training_pass_and_prefill_equal_the_recording(fast: Subject) -> None:
    model, out = fast.model, fast.kit.outputs
    tokens = model.embed(model.preprocess(fast.observation(all_cameras=True)))
    close(tokens.embedded[:, ::4], out["input_embs_every4"], **EMBEDDING)
    np.testing.assert_array_equal(tokens.mask, out["input_mask"])
    np.testing.assert_array_equal(tokens.ar_mask, out["ar_mask"])
    hidden = model.predictions(tokens, tokens.mask.shape[1] - 1)
    real = tokens.mask.numpy()[:, :-1:4, None]
    np.testing.assert_allclose(hidden[:, ::4].numpy() * real, out["prelogits_every4"] * real, atol=HIDDEN, rtol=0)

    prefix = model.embed(model.preprocess(fast.observation(all_cameras=True, decode=True)))
    mask, logits, cache = model._prefill(prefix, room=3)
    np.testing.assert_array_equal(mask, out["prefill_mask_right_aligned"])
    close(logits[:, :1021], out["prefill_last_logits"], HIDDEN, 1e-4)
    assert cache[0][0].shape == (2, prefix.mask.shape[1] + 3, 1, 16)


def test_greedy_tokens_equal_the_recording_to_the_last_one(fast: Subject) -> None:
    steps, out = fast.kit.meta["max_decoding_steps"], fast.kit.outputs

    def greedy(*, all_cameras: bool = True, rows: slice = slice(None), **options: bool) -> np.ndarray:
        observation = fast.observation(decode=True, all_cameras=all_cameras).rows(rows.start or 0, rows.stop or 2)
        return fast.model.sample_actions(observation, max_decoding_steps=steps, **options).numpy()

    np.testing.assert_array_equal(greedy(), out["greedy_tokens"])
    np.testing.assert_array_equal(greedy(exact_slots=True), out["greedy_tokens"])
    np.testing.assert_array_equal(greedy(all_cameras=False), out["greedy_tokens_masked_cameras"])
    for i in range(2):
        np.testing.assert_array_equal(greedy(rows=slice(i, i + 1)), out[f"greedy_tokens_single_{i}"])
    to_the_end = fast.model.sample_actions(fast.observation(decode=True, all_cameras=True), agree=lambda ended: True)
    assert to_the_end.shape[1] == fast.model.config.max_decoding_steps


# --- images -------------------------------------------------------------------------------------------------------


def test_device_resize_equals_the_recording_of_jax(golden: Path) -> None:
    with np.load(golden / "components" / "components.npz") as archive:
        recorded = dict(archive)
    cases = sorted({key.split("/")[1] for key in recorded if key.startswith("resize/")})
    assert cases
    for case in cases:
        _, _, height, width = recorded[f"resize/{case}/size"]
        image = torch.as_tensor(recorded[f"resize/{case}/in_u8"])
        as_uint8 = resize_with_pad(image, int(height), int(width)).numpy().astype(np.int32)
        assert np.abs(as_uint8 - recorded[f"resize/{case}/jax_u8"]).max() <= 1
        close(
            resize_with_pad(image.float() / 255 * 2 - 1, int(height), int(width)),
            recorded[f"resize/{case}/jax_f32"],
            1e-5,
        )


def test_augmentation_equals_the_recording_of_jax_for_its_draws(golden: Path) -> None:
    with np.load(golden / "components" / "components.npz") as archive:
        recorded = dict(archive)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    images = {key: torch.as_tensor(recorded[f"aug/in_u8/{key}"]).float() / 255 * 2 - 1 for key in cameras}
    augmented = augment_images(draws_of_jax(seed=5, count=3), images)
    for key in cameras:
        close(augmented[key], recorded[f"aug/out_key5/{key}"], 2e-4)
    assert not np.allclose(augmented["base_0_rgb"], images["base_0_rgb"], atol=0.01)


def draws_of_jax(*, seed: int, count: int) -> Draws:
    """What the JAX model's augmentation draws from `key(seed)`: one key per sample, split over nested chains."""
    import jax

    from openpi.models_pytorch import augment

    def draw(sample: jax.Array) -> dict[str, Any]:
        geometry, colours = jax.random.split(sample)
        crop, _, rotate = jax.random.split(geometry, 3)
        (scene,) = jax.random.split(colours, 1)
        (of_wrist,) = jax.random.split(sample, 1)
        (wrist,) = jax.random.split(of_wrist, 1)
        top = np.deg2rad(augment.MAX_ROTATION_DEG)
        return {
            "crop": jax.random.uniform(crop, (2,), minval=-1, maxval=1),
            "angle": jax.random.uniform(rotate, minval=-top, maxval=top),
            "scene": jitter(scene),
            "wrist": jitter(wrist),
        }

    def jitter(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 5)
        tops = (augment.BRIGHTNESS, augment.CONTRAST, augment.HUE)
        amounts = [jax.random.uniform(k, minval=-top, maxval=top) for k, top in zip(keys, tops, strict=False)]
        return (jax.random.bernoulli(key, augment.PROBABILITY), *amounts)

    drawn = [draw(key) for key in jax.random.split(jax.random.key(seed), count)]

    def stacked(values: list[Any]) -> Any:
        return torch.as_tensor(np.stack([np.asarray(value) for value in values]))

    jitters = [
        Jitter(*(stacked(list(part)) for part in zip(*(d[kind] for d in drawn), strict=True)))
        for kind in ("scene", "wrist")
    ]
    return Draws(stacked([d["crop"] for d in drawn]), stacked([d["angle"] for d in drawn]), *jitters)
