"""Many clients, bad ones among them, and a server that dies: a short run of the load benchmark."""

import subprocess
import sys

import paths

BENCHMARKS = paths.ROOT / "benchmarks"


def test_bad_clients_and_a_killed_server_cost_the_good_ones_no_error():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "serving_load.py", "--seconds", "4"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| errors seen by good clients | 0 |" in done.stdout


def test_beside_hostile_clients_a_robot_sees_no_error_and_the_server_stays_healthy():
    """How long it waits is the benchmark's to say, on a calm machine."""
    command = [
        sys.executable,
        BENCHMARKS / "hostile.py",
        "--seconds",
        "1",
        "--only",
        "100,000 levels",
        "3 million numbers",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:4]]
    assert [(row[4], row[-1]) for row in rows] == 2 * [("0", "yes |")], done.stdout + done.stderr
