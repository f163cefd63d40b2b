"""What the suite promises about itself: wherever it is started, and that nothing is left of it."""

import os
import signal
import subprocess
import sys

import conftest


def test_a_process_that_outlives_its_test_is_found_with_the_test_that_started_it():
    with subprocess.Popen(["sleep", "600"]) as child:
        found = dict(conftest._processes_with(os.environ["OPENPI_TESTS_MARK"]))
        child.kill()
    assert "sleep 600 " in found[child.pid]
    assert "test_a_process_that_outlives_its_test" in found[child.pid]


def test_processes_of_tests_take_ctrl_c_also_in_the_background_of_a_script():
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        conftest.take_ctrl_c()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGINT, ignoring)
    assert done.stdout == "True\n"
