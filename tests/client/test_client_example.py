"""The example client, as a program against a real server."""

import importlib.util
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest

import paths
from openpi.policies import aloha_policy, droid_policy, libero_policy
from serving_live import TestPolicy, server_thread

PROGRAM = paths.ROOT / "examples" / "simple_client" / "main.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("simple_client_example", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("env", ["ALOHA_SIM", "droid"])
def test_the_example_prints_a_table_and_writes_its_times(tmp_path, env):
    timing_file = tmp_path / "times" / "times.parquet"
    with server_thread(TestPolicy) as (_, port):
        command = [sys.executable, str(PROGRAM), "--host", "127.0.0.1", "--port", str(port), "--env", env]
        options = ["--num_steps", "5", "--timing_file", str(timing_file)]
        result = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    for word in ("client_infer_ms", "server_infer_ms", "server_prev_total_ms", "P50", "P99"):
        assert word in result.stdout
    table = pyarrow.parquet.read_table(timing_file)
    assert table.column_names == ["client_infer_ms", "server_infer_ms", "server_prev_total_ms"]
    assert table.num_rows == 5


def test_series_of_unequal_length_are_aligned_at_their_end(example):
    timings = example.Timings()
    timings.add(3.0, {"server_timing": {"infer_ms": 1.0}})
    timings.add(5.0, {"server_timing": {"infer_ms": 2.0, "prev_total_ms": 4.0}})
    np.testing.assert_array_equal(timings.columns()["server_prev_total_ms"], [np.nan, 4.0])
    assert list(timings.columns()) == sorted(timings.columns())
    assert timings.statistics()["server_prev_total_ms"]["Mean"] == 4.0
    assert timings.statistics()["client_infer_ms"]["P50"] == 4.0


def test_the_table_is_aligned_and_has_one_decimal(example):
    statistics = {"a": {"Mean": 10.0, "P50": 9.96}, "longer": {"Mean": 1.0, "P50": 1234.56}}
    assert example.timing_table(statistics).splitlines() == [
        "ms      Mean     P50",
        "a       10.0    10.0",
        "longer   1.0  1234.6",
    ]


@pytest.mark.parametrize(
    ("env", "make_example"),
    [
        ("ALOHA", aloha_policy.make_aloha_example),
        ("DROID", droid_policy.make_droid_example),
        ("LIBERO", libero_policy.make_libero_example),
    ],
)
def test_the_observations_have_the_keys_and_shapes_of_the_robots(example, env, make_example):
    made, expected = example.OBSERVATIONS[example.EnvMode[env]](np.random.default_rng(0)), make_example()
    assert made.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            assert made[key].shape == value.shape and made[key].dtype == value.dtype
