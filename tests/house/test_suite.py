"""What the suite promises about itself: wherever it is started, and that nothing is left of it."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

import forked

fork = functools.partial(forked.Popen, preloads=())
SLEEP = "import time; print('here', flush=True); time.sleep(600)"


@pytest.mark.parametrize("start", [subprocess.Popen, fork])
def test_a_process_that_outlives_its_test_is_found_with_the_test_that_started_it(start):
    with start([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        found = dict(conftest._processes_with(os.environ["OPENPI_TESTS_MARK"]))
        child.kill()
    assert "time.sleep(600)" in found[child.pid]
    assert "test_a_process_that_outlives_its_test" in found[child.pid]


# What a process can tell about its start.
TELL = """
import json, logging, os, signal, sys, warnings
logging.basicConfig(level=logging.INFO)
logging.info("words")
main = sys.modules["__main__"]
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "path": sys.path[0], "heard": sys.stdin.read(),
    "variables": {k: v for k, v in os.environ.items() if k not in ("_", "LC_CTYPE")},
    "main": [__name__, getattr(main, "__file__", None)],
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "open": sorted(os.listdir("/proc/self/fd"))[:-1], "session": os.getsid(0) == os.getpid(),
    "errors": [filter[0] for filter in warnings.filters][:1] == ["error"],
}))
print("more words", file=sys.stderr)
if sys.argv[-1] == "fails":
    1 / 0
sys.exit(7)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")
@pytest.mark.parametrize("form", ["-c", "-m", "file", "-W"])
def test_a_forked_process_is_as_one_that_was_started(form, tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    words = {
        "-c": ["-c", TELL, "a b", "fails"],
        "-m": ["-m", "tell", "x"],
        "file": [tmp_path / "tell.py"],
        "-W": ["-W", "error", tmp_path / "tell.py"],
    }[form]
    options = {"cwd": tmp_path, "env": {**os.environ, "X": "é"}, "start_new_session": form == "file"}
    found = []
    for start in (subprocess.Popen, fork):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with start([sys.executable, *map(str, words)], **pipes, **options, text=True) as process:
            output, errors = process.communicate("ah")
        found.append((process.returncode, json.loads(output), errors.splitlines()[0], errors.splitlines()[-1]))
    assert found[0] == found[1]


def test_a_forked_process_ends_by_signals_and_can_be_waited_for():
    with fork([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        assert Path(f"/proc/{process.pid}").exists() or sys.platform == "darwin"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT


def test_processes_of_tests_take_ctrl_c_also_in_the_background_of_a_script():
    program = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        conftest.take_ctrl_c()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGINT, ignoring)
    assert done.stdout == "True\n"
