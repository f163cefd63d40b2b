"""Image tools of the client against recordings, and what they promise beyond them."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from openpi_client import image_tools


def recorded_input(height: int, width: int) -> np.ndarray:
    """The synthetic image the recordings were made from: uint8[h, w, 3]."""
    y, x = np.mgrid[:height, :width]
    checker = (x // 16 + y // 16) % 2
    return np.stack([(2 * x + 3 * y) % 256, x * y // 16 % 256, (5 * x + y + 64 * checker) % 256], -1).astype(np.uint8)


def test_resize_with_pad_gives_the_recorded_pixels(golden):
    recorded = np.load(golden / "data" / "resize_with_pad.npz")
    cases = [key.split("/")[1] for key in recorded.files if key.startswith("pil/")]
    assert cases
    for case in cases:
        source, target = ([int(n) for n in size.split("x")] for size in case.split("_to_"))
        resized = image_tools.resize_with_pad(recorded_input(*source), *target)
        np.testing.assert_array_equal(resized, recorded["pil/" + case], err_msg=case)


def test_resize_with_pad_agrees_with_the_data_path_recordings(golden):
    recorded = np.load(golden / "components" / "components.npz")
    cases = sorted({key.split("/")[1] for key in recorded.files if key.startswith("resize/")})
    assert cases
    for case in cases:
        height, width = recorded[f"resize/{case}/size"][2:]
        resized = image_tools.resize_with_pad(recorded[f"resize/{case}/in_u8"], int(height), int(width))
        np.testing.assert_array_equal(resized, recorded[f"resize/{case}/client_u8"], err_msg=case)


def test_resize_with_pad_keeps_leading_axes(golden):
    recorded = np.load(golden / "data" / "resize_with_pad_batch.npz")
    batch = recorded["in"]
    np.testing.assert_array_equal(image_tools.resize_with_pad(batch, 16, 16), recorded["pil"])
    nested = image_tools.resize_with_pad(batch[:, None], 16, 16)
    np.testing.assert_array_equal(nested, recorded["pil"][:, None])


def test_images_of_the_right_size_are_returned_as_they_are():
    image = recorded_input(24, 32)
    assert image_tools.resize_with_pad(image, 24, 32) is image


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_alpha_images_are_resized_too(channels):
    image = np.repeat(recorded_input(20, 30)[..., :1], channels, axis=-1)
    assert image_tools.resize_with_pad(image, 10, 10).shape == (10, 10, channels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 20, 30), np.uint8), "channels last"),
        (np.zeros((20, 30), np.uint8), "channels last"),
        (np.zeros((20, 30, 3), np.int32), r"astype\(np.uint8\)"),
        (np.full((20, 30, 3), 1.5), r"floats in \[0, 1\]"),
        (np.zeros((0, 30, 3), np.uint8), "channels last"),
    ],
)
def test_images_that_cannot_be_resized_are_refused_with_the_fix(image, message):
    with pytest.raises(ValueError, match=message):
        image_tools.resize_with_pad(image, 10, 10)


@hypothesis.given(
    image=hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 40)] * 2, st.just(3))),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_image_fits_any_target_and_is_left_unchanged(image, height, width):
    before = image.copy()
    resized = image_tools.resize_with_pad(image, height, width)
    assert resized.shape == (height, width, 3) and resized.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(image_tools.resize_with_pad(resized, height, width), resized)


def test_convert_to_uint8_truncates_like_the_recording(golden):
    recorded = np.load(golden / "data" / "convert_to_uint8.npz")
    np.testing.assert_array_equal(image_tools.convert_to_uint8(recorded["x"]), recorded["out"])


def test_convert_to_uint8_leaves_integers_alone():
    image = np.arange(12, dtype=np.int32).reshape(2, 2, 3)
    assert image_tools.convert_to_uint8(image) is image


@pytest.mark.parametrize("value", [200.0, -0.5, 1.01, np.nan])
def test_convert_to_uint8_refuses_what_would_wrap_around(value):
    with pytest.raises(ValueError, match=r"wants floats in \[0, 1\]"):
        image_tools.convert_to_uint8(np.full((2, 2, 3), value, np.float32))


# --- memory layouts, cameras that are not there, other kernels --------------------------------------------------


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size_hw", [(48, 64), (64, 48), (90, 31), (20, 20)])
def test_pixels_do_not_depend_on_how_they_lie_in_memory(size_hw):
    image = random_image(*size_hw)
    expected = image_tools.resize_with_pad(image, 32, 32)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    planes.flags.writeable = False  # as messages are decoded
    larger = np.zeros((3, *np.multiply(size_hw, 2)), np.uint8)
    larger[:, ::2, ::2] = planes
    for other in (
        planes.transpose(1, 2, 0),
        larger[:, ::2, ::2].transpose(1, 2, 0),
        image[..., ::-1].copy()[..., ::-1],
    ):
        np.testing.assert_array_equal(image_tools.resize_with_pad(other, 32, 32), expected)
    stacked = np.stack([planes, planes]).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(image_tools.resize_with_pad(stacked, 32, 32), [expected, expected])


def test_colors_are_weighted_by_alpha_however_pixels_lie():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    expected = image_tools.resize_with_pad(image, 20, 20)
    np.testing.assert_array_equal(image_tools.resize_with_pad(planes, 20, 20), expected)


def test_a_black_image_without_memory_becomes_an_ordinary_one():
    black = np.broadcast_to(np.zeros((), np.uint8), (2, 480, 640, 3))
    resized = image_tools.resize_with_pad(black, 28, 28)
    assert resized.shape == (2, 28, 28, 3) and resized.flags.writeable and not resized.any()
    gray = np.broadcast_to(np.full((), 7, np.uint8), (480, 640, 3))
    np.testing.assert_array_equal(
        image_tools.resize_with_pad(gray, 28, 28), image_tools.resize_with_pad(np.array(gray), 28, 28)
    )


@pytest.fixture
def defaults():
    yield
    image_tools.use_kernel("exact")
    image_tools.use_threads(1)


def test_cameras_resized_at_once_are_those_resized_one_by_one(defaults):
    images = {name: random_image(40 + i, 60) for i, name in enumerate(("top", "left", "right"))}
    images["small"] = random_image(16, 16)
    alone = image_tools.resize_each(images, 16, 16)
    image_tools.use_threads(3)
    together = image_tools.resize_each(images, 16, 16)
    assert list(together) == list(images)
    for name, image in images.items():
        np.testing.assert_array_equal(together[name], alone[name])
        np.testing.assert_array_equal(alone[name], image_tools.resize_with_pad(image, 16, 16))


def test_the_kernel_of_pytorch_is_one_gray_level_off_at_most_and_never_the_default(defaults):
    pytest.importorskip("torch")
    assert image_tools._kernel == "exact"
    image = random_image(120, 160)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
    image.flags.writeable = planes.flags.writeable = False
    cases = [image, planes, image[..., ::-1], image[::2, ::2]]
    exact = [image_tools.resize_with_pad(case, 56, 56).astype(int) for case in cases]
    image_tools.use_kernel("torch")
    for case, expected in zip(cases, exact, strict=True):
        difference = np.abs(image_tools.resize_with_pad(case, 56, 56) - expected)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_a_kernel_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected one of exact, torch"):
        image_tools.use_kernel("fast")
