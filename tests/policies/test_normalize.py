"""Statistics: the file byte for byte, the recorded values, and what one pass over the data promises."""

import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from openpi import transforms
from openpi.shared import normalize
from openpi.shared.normalize import NormStats, RunningStats, floor_degenerate

RECORDED = [
    "constant_dims",
    "gauss_f32",
    "growing_range_f64",
    "heavy_tail",
    "integers",
    "one_vector_at_a_time",
    "single_batch",
]
F32_SUM = 1e-5  # the recordings of float32 data were accumulated in float32


def recorded(golden, case):
    arrays = dict(np.load(golden / "data" / f"running_stats_{case}.npz"))
    return [arrays[key] for key in sorted(arrays) if key.startswith("batch")], arrays


def statistics(batches) -> NormStats:
    running = RunningStats()
    for batch in batches:
        running.update(batch)
    return running.get_statistics()


def vectors_of(batches) -> np.ndarray:
    return np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in batches]).astype(np.float64)


@pytest.mark.parametrize("case", RECORDED)
def test_mean_and_std_agree_with_the_recording_where_float32_did_not_cancel(golden, case):
    batches, arrays = recorded(golden, case)
    stats = statistics(batches)
    # The reference gets std 0 for motion of 1e-3 around 100 in float32; the truth is below.
    sound = np.ones(stats.width, dtype=bool)
    if case == "gauss_f32":
        sound[-1] = False
    np.testing.assert_allclose(stats.mean, arrays["mean"], rtol=F32_SUM, atol=F32_SUM)
    np.testing.assert_allclose(stats.std[sound], arrays["std"][sound], rtol=F32_SUM, atol=F32_SUM)


def test_small_motion_around_a_large_offset_keeps_its_deviation(golden):
    batches, arrays = recorded(golden, "gauss_f32")
    assert arrays["std"][-1] == 0
    truth = vectors_of(batches)[:, -1].std()
    assert truth == pytest.approx(1e-3, rel=0.05)
    assert statistics(batches).std[-1] == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("case", ["constant_dims", "integers", "one_vector_at_a_time", "single_batch"])
def test_quantiles_agree_with_the_recorded_histogram_to_one_bin(golden, case):
    batches, arrays = recorded(golden, case)
    stats, vectors = statistics(batches), vectors_of(batches)
    bin_width = (np.ptp(vectors, axis=0) + 2e-10) / 5000
    assert (np.abs(stats.q01 - arrays["q01"]) <= 1.001 * bin_width).all()
    assert (np.abs(stats.q99 - arrays["q99"]) <= 1.001 * bin_width).all()


@pytest.mark.parametrize("case", ["gauss_f32", "growing_range_f64", "heavy_tail"])
def test_quantiles_are_exact_where_the_recorded_histogram_drifted(golden, case):
    """Re-binning moves old counts by whole bins, so the recording is only near in rank."""
    batches, arrays = recorded(golden, case)
    stats, vectors = statistics(batches), vectors_of(batches)
    for q, found, drifted in ((0.01, stats.q01, arrays["q01"]), (0.99, stats.q99, arrays["q99"])):
        np.testing.assert_array_equal(found, np.quantile(vectors, q, axis=0, method="inverted_cdf"))
        np.testing.assert_allclose((vectors <= drifted).mean(axis=0), q, atol=0.01)


finite = st.floats(-1e6, 1e6, width=32)
batches_of_vectors = st.integers(1, 4).flatmap(
    lambda d: st.lists(
        hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.just(d)), elements=finite), min_size=2, max_size=5
    )
)


@hypothesis.given(batches=batches_of_vectors)
def test_one_pass_equals_the_statistics_of_the_whole(batches):
    stats, vectors = statistics(batches), vectors_of(batches)
    scale = np.abs(vectors).max() + 1
    np.testing.assert_allclose(stats.mean, vectors.mean(axis=0), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose(stats.std, vectors.std(axis=0), rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_array_equal(stats.q01, np.quantile(vectors, 0.01, axis=0, method="inverted_cdf"))
    np.testing.assert_array_equal(stats.q99, np.quantile(vectors, 0.99, axis=0, method="inverted_cdf"))
    np.testing.assert_array_equal(stats.min, vectors.min(axis=0))
    np.testing.assert_array_equal(stats.max, vectors.max(axis=0))


@hypothesis.given(batches=batches_of_vectors, cut=st.integers(0, 5), max_distinct=st.sampled_from([3, 8, 1000]))
def test_merged_parts_equal_the_whole_in_any_order(batches, cut, max_distinct):
    def run(parts):
        running = RunningStats(max_distinct=max_distinct)
        for batch in parts:
            running.update(batch)
        return running

    whole, merged, other = run(batches), run(batches[:cut]), run(batches[cut:])
    merged.merge(other)
    backwards = run(batches[::-1])
    for stats in (merged.get_statistics(), backwards.get_statistics()):
        expected = whole.get_statistics()
        np.testing.assert_array_equal(stats.q01, expected.q01)
        np.testing.assert_array_equal(stats.q99, expected.q99)
        scale = np.abs(vectors_of(batches)).max() + 1
        np.testing.assert_allclose(stats.mean, expected.mean, atol=1e-12 * scale)
        np.testing.assert_allclose(stats.std, expected.std, atol=1e-9 * scale)


def test_too_many_distinct_values_cost_a_bounded_relative_error():
    values = np.random.default_rng(0).normal(size=(200_000, 2)) * [1.0, 1e-3] + [0.0, 100.0]
    running = RunningStats(max_distinct=4096)
    for part in np.array_split(values, 7):
        running.update(part)
    stats = running.get_statistics()
    for q, found in ((0.01, stats.q01), (0.99, stats.q99)):
        exact = np.quantile(values, q, axis=0, method="inverted_cdf")
        assert abs(found[0] / exact[0] - 1) <= 2**-7
        # Around a large offset the bits are spent where the values are.
        assert abs(found[1] - exact[1]) <= 1e-5


def test_leading_axes_are_all_counted():
    chunks = np.random.default_rng(0).normal(size=(4, 5, 6, 3))
    assert statistics([chunks]) == statistics([chunks.reshape(-1, 3)])


def test_an_update_keeps_nothing_of_a_batch_that_changes_later():
    batch = np.arange(6.0).reshape(3, 2)
    running = RunningStats()
    running.update(batch)
    batch[:] = 1e9
    assert running.get_statistics().max.tolist() == [4, 5]


def test_statistics_of_fewer_than_two_vectors_are_refused():
    running = RunningStats()
    running.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 vectors, got 1"):
        running.get_statistics()


def test_vectors_of_another_width_are_refused():
    running = RunningStats()
    running.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="width 4 after vectors of width 3"):
        running.update(np.zeros((2, 4)))
    other = RunningStats()
    other.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="width 4 after vectors of width 3"):
        running.merge(other)


def test_values_that_are_not_finite_are_refused_with_their_dimension():
    with pytest.raises(ValueError, match=r"dimensions \[1\]"):
        RunningStats().update(np.array([[0.0, np.nan], [1.0, 2.0]]))


# --- degenerate dimensions ------------------------------------------------------------------------------------------


def normalised(stats: NormStats, data: np.ndarray) -> list[np.ndarray]:
    """The data by z-score and by quantiles."""
    return [
        transforms.Normalize({"x": stats}, use_quantiles=quantiles)({"x": data})["x"] for quantiles in (False, True)
    ]


def test_a_constant_dimension_is_named_and_a_deviation_from_it_keeps_its_size():
    data = np.stack([np.linspace(-1, 1, 100), np.full(100, 3.7)], axis=-1)
    stats, messages = floor_degenerate(statistics([data]), ["shoulder", "elbow"])
    assert len(messages) == 1
    assert "elbow" in messages[0]
    for values in normalised(stats, np.array([0.0, 3.75])):
        assert values[1] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("at", [3.7, 0.0, -1000.3])
def test_what_a_model_is_off_hardly_moves_what_nobody_moved(at):
    """Such as an arm that was parked: in units of 1, half a hundredth of noise would be as many radians."""
    data = np.stack([np.linspace(-1, 1, 100), np.full(100, np.float32(at))], axis=-1)
    stats, messages = floor_degenerate(statistics([data]), ["shoulder", "elbow"], are_commands=True)
    assert len(messages) == 1 and "elbow is constant" in messages[0]
    for quantiles, values in enumerate(normalised(stats, data)):
        np.testing.assert_allclose(values[:, 1], 0, atol=1e-3)
        unnormalize = transforms.Unnormalize({"x": stats}, use_quantiles=bool(quantiles))
        assert abs(unnormalize({"x": np.array([0.0, 0.05])})["x"][1] - at) <= 1e-4 * max(1, abs(at))


def test_a_rarely_used_gripper_stays_within_one_unit():
    data = np.zeros((1000, 1))
    data[:5] = 1.0
    raw = statistics([data])
    assert np.abs(normalised(raw, data)[1]).max() > 1e5
    stats, messages = floor_degenerate(raw)
    assert len(messages) == 1
    assert np.abs(normalised(stats, data)[1]).max() <= 1


@hypothesis.given(
    data=hnp.arrays(np.float64, st.tuples(st.integers(2, 40), st.integers(1, 3)), elements=finite),
    repeats=st.integers(1, 60),
)
def test_floored_statistics_bound_every_training_value(data, repeats):
    data = np.concatenate([data, np.repeat(data[:1], repeats, axis=0)])
    before = statistics([data])
    stats, _ = floor_degenerate(before, are_commands=bool(repeats % 2))
    for values in normalised(stats, data):
        assert np.abs(values).max() <= normalize.MAX_NORMALIZED * 1.001
    assert (stats.std >= before.std).all()


def test_ordinary_statistics_are_left_as_they_are(golden):
    for case in ("gauss_f32", "growing_range_f64", "heavy_tail", "single_batch"):
        stats = statistics(recorded(golden, case)[0])
        floored, messages = floor_degenerate(stats)
        assert floored == stats
        assert messages == []


def test_statistics_from_a_file_can_be_floored_too():
    stats = NormStats(mean=[0.0, 2.0], std=[1.0, 0.0], q01=None, q99=None)
    floored, messages = floor_degenerate(stats, ["a", "b"])
    assert floored.std.tolist() == [1.0, 1.0]
    assert floored.q01 is None
    assert messages[0].startswith("b is constant at 2")


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_file_is_written_byte_for_byte_as_recorded(golden, tmp_path):
    text = (golden / "data" / "norm_stats_sample.json").read_text()
    stats = normalize.deserialize_json(text)
    assert normalize.serialize_json(stats) == text
    normalize.save(tmp_path / "assets" / "robot", stats)
    assert (tmp_path / "assets" / "robot" / "norm_stats.json").read_text() == text
    assert [path.name for path in (tmp_path / "assets" / "robot").iterdir()] == ["norm_stats.json"]
    assert normalize.load(tmp_path / "assets" / "robot") == stats


def test_quantiles_may_be_absent_from_a_file():
    stats = normalize.deserialize_json('{"norm_stats": {"state": {"mean": [1], "std": [2]}}}')
    assert stats["state"].q01 is None


def test_a_folder_without_statistics_is_named_with_the_fix(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json; compute them with `openpi stats`"):
        normalize.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "norm_stats"),
        ('{"norm_stats": {"state": {"mean": [1]}}}', "'state'.*'std'"),
        ('{"norm_stats": {"state": {"mean": [1, 2], "std": [1]}}}', "'state'.*differ in shape"),
        ('{"norm_stats": {"state": {"mean": null, "std": [1]}}}', "must be an object with 'mean' and 'std'"),
        ('{"norm_stats": {"state": {"mean": ["a"], "std": [1]}}}', "'state' are damaged"),
        (f'{{"norm_stats": {{"state": {{"mean": [{10**400}], "std": [1]}}}}}}', "'state' are damaged"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_file_is_refused_with_its_path_and_what_is_wrong(tmp_path, text, told):
    (tmp_path / "norm_stats.json").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        normalize.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_only_what_the_published_tools_read_is_in_the_file(tmp_path):
    normalize.save(tmp_path, {"state": statistics([np.random.default_rng(0).normal(size=(9, 2))])})
    entry = json.loads((tmp_path / "norm_stats.json").read_text())["norm_stats"]["state"]
    assert list(entry) == ["mean", "std", "q01", "q99"]
