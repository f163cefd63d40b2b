"""Many clients, bad ones among them, and a server that dies: a short run of the load benchmark."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving_load.py"


def test_bad_clients_and_a_killed_server_cost_the_good_ones_no_error():
    done = subprocess.run([sys.executable, SCRIPT, "--seconds", "4"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| errors seen by good clients | 0 |" in done.stdout
