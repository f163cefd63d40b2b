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
