"""Statistics of evaluations, their videos, and the table-top's policy transforms."""

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openpi.evaluation.play import _holds
from openpi.evaluation.stats import Paired, mean_interval, wilson_interval
from openpi.evaluation.video import tile, write_video
from openpi.policies.tabletop_policy import TabletopInputs, TabletopOutputs, make_tabletop_example
from openpi_demo.tabletop import PICK, TabletopEnv, tabletop_observation

# --- statistics


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Computed by solving Wilson's quadratic by hand; 0/10 and 10/10 have the closed forms 0, z2/(n+z2).
    [(0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (5, 10, 0.236593, 0.763407)],
)
def test_wilson_intervals_match_the_formula(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_intervals_hold_the_observed_rate_and_mirror(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= successes / trials + 1e-12
    assert successes / trials - 1e-12 <= high <= 1.0
    mirrored = wilson_interval(trials - successes, trials)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 5)])
def test_impossible_counts_are_refused(successes, trials):
    with pytest.raises(ValueError, match=f"successes={successes} of trials={trials}"):
        wilson_interval(successes, trials)


OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(OUTCOMES)
def test_a_paired_difference_lies_in_its_interval_and_turns_its_sign_with_the_policies(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    forth, back = Paired.of(a, b), Paired.of(b, a)
    difference, low, high = forth.difference
    assert -1 - 1e-9 <= low <= difference + 1e-9 and difference - 1e-9 <= high <= 1 + 1e-9
    assert back.difference == pytest.approx((-difference, -high, -low), abs=1e-9)
    assert forth.p_value == pytest.approx(back.p_value)


@pytest.mark.parametrize(
    ("both", "only_a", "only_b", "neither", "interval"),
    [
        (20, 12, 2, 16, (-0.3292, -0.0562)),  # D. Altman et al., "Statistics with confidence", 2000, page 52
        (1, 1, 7, 12, (0.0256, 0.5069)),  # M. Fagerland et al., "Statistical analysis of contingency tables", chapter 8
        (25, 0, 0, 25, (-0.0378, 0.0378)),  # equal outcomes do not prove policies equal
    ],
)
def test_the_interval_of_a_paired_difference_is_that_of_textbooks(both, only_a, only_b, neither, interval):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    assert Paired.of(a, b).difference[1:] == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"), [(0, 0, 1.0), (3, 3, 1.0), (0, 6, 2 / 64), (1, 9, 2 * 11 / 1024), (0, 1, 1.0)]
)
def test_the_sign_test_counts_only_episodes_in_which_the_policies_differ(only_a, only_b, p_value):
    a, b = [True] * only_a + [False] * only_b, [False] * only_a + [True] * only_b
    assert Paired.of([*a, True, False], [*b, True, False]).p_value == pytest.approx(p_value)


@pytest.mark.parametrize("num_groups", [2, 3, 5, 20])
def test_the_interval_of_a_mean_holds_it_in_95_of_100_cases_however_few_the_groups(num_groups):
    rng = np.random.default_rng(0)
    counts = np.full(num_groups, 7)
    intervals = [mean_interval(7 * rng.normal(1.0, 2.0, num_groups), counts) for _ in range(1000)]
    held = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.93 < held < 0.97


def test_groups_count_by_their_values_in_the_interval_of_a_mean():
    low, high = mean_interval(np.array([10.0, 1.0, 2.0]), np.array([10, 2, 2]))
    assert (low + high) / 2 == pytest.approx(13 / 14)
    # Of 0 and 1, by hand: the variance is 1/2, its share of the mean 1/4.
    assert mean_interval(np.array([0.0, 1.0]), np.ones(2)) == pytest.approx((0.5 - 6.353, 0.5 + 6.353))


# --- videos


@pytest.fixture
def clip():
    frames = np.zeros((8, 48, 64, 3), np.uint8)
    for i, frame in enumerate(frames):
        frame[:, 8 * i : 8 * i + 8] = (250, 40, 40)
    return frames


def test_mp4_files_decode_to_the_frames_that_were_written(tmp_path, clip):
    path = write_video(tmp_path / "sub" / "clip.mp4", clip, fps=10)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 10
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == clip.shape
    assert np.abs(decoded.astype(int) - clip).mean() < 8  # lossy, chroma at half resolution
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_keep_every_frame(tmp_path, clip, suffix):
    with Image.open(write_video(tmp_path / f"clip{suffix}", clip, fps=10)) as image:
        assert getattr(image, "n_frames", 1) == len(clip)
        assert image.size == (64, 48)


def test_videos_with_odd_sides_are_cropped_to_even_ones(tmp_path):
    path = write_video(tmp_path / "odd.mp4", np.zeros((2, 33, 35, 3), np.uint8), fps=10)
    with av.open(str(path)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (34, 32)


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("clip.avi", np.zeros((1, 8, 8, 3), np.uint8), r"ends in '\.avi'; expected \.mp4"),
        ("clip.mp4", np.zeros((1, 8, 8, 3), np.float32), "frames are float32"),
        ("clip.mp4", np.zeros((0, 8, 8, 3), np.uint8), "expected uint8"),
    ],
)
def test_bad_videos_are_refused_and_leave_nothing_behind(tmp_path, name, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, fps=10)
    assert not list(tmp_path.iterdir())


def test_tiled_clips_play_side_by_side_and_rest_on_their_last_frame():
    short, long = np.full((2, 4, 6, 3), 10, np.uint8), np.full((5, 4, 6, 3), 20, np.uint8)
    tiled = tile([short, long, short], columns=2)
    assert tiled.shape == (5, 8, 12, 3)
    assert (tiled[4, :4, :6] == 10).all()
    assert (tiled[:, :4, 6:] == 20).all()
    assert (tiled[:, 4:, 6:] == 0).all()


# --- the robot's policy transforms


def test_the_robot_inputs_fill_two_camera_slots_and_pass_labels_through():
    example = {**make_tabletop_example(), "actions": np.ones((12, 6), np.float32)}
    inputs = TabletopInputs()(example)
    assert inputs["image"].keys() == inputs["image_mask"].keys() == {"base_0_rgb", "left_wrist_0_rgb"}
    np.testing.assert_array_equal(inputs["image"]["base_0_rgb"], example["observation/image"])
    np.testing.assert_array_equal(inputs["actions"], example["actions"])
    assert inputs["prompt"] == example["prompt"]
    assert "actions" not in TabletopInputs()(make_tabletop_example())


def test_float_channel_first_images_equal_byte_images():
    example = make_tabletop_example()
    as_float = np.moveaxis(example["observation/image"], -1, 0).astype(np.float64) / 255 + 1e-6
    inputs = TabletopInputs()({**example, "observation/image": as_float})
    np.testing.assert_array_equal(inputs["image"]["base_0_rgb"], example["observation/image"])


def test_the_robot_outputs_cut_the_padding():
    actions = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
    np.testing.assert_array_equal(TabletopOutputs()({"actions": actions})["actions"], actions[..., :6])


def test_the_example_has_the_keys_and_shapes_that_the_world_sends():
    observation, _ = TabletopEnv(PICK).reset(seed=0)
    sent, example = tabletop_observation(observation), make_tabletop_example()
    assert sent.keys() == example.keys()
    for key in ("observation/image", "observation/wrist_image", "observation/state"):
        assert (sent[key].shape, sent[key].dtype) == (example[key].shape, example[key].dtype)


def test_a_joint_at_zero_is_a_place_and_a_command_of_zeros_is_none():
    """An ALOHA that holds must not turn its waists back to where they began."""
    assert _holds(np.array([0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.0])) == ["stay"] * 7
    assert _holds(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])) == ["zero"] * 6 + ["stay"]
