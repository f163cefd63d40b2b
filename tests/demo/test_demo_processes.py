"""The demo's child processes: what they print, how they fail, and that none is left."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from openpi.shared.children import Children, Command, CommandFailedError, wait, wait_for_file
from openpi_demo.plan import FULL, Plan
from openpi_demo.stages import StageRunner, progress_parser
from openpi_demo.terminal import Terminal

PATIENCE_S = 60.0
UNBUFFERED = {**os.environ, "PYTHONUNBUFFERED": "1"}
RECORD = ("demo", "record", "--episodes=2", "--num-workers=0")


def record_command(folder: Path, *more: str) -> Command:
    return Command((*RECORD, f"--output={folder / 'data'}", *more))


def test_a_command_is_printed_as_a_user_would_type_it():
    command = Command(("serve", "my folder", "--port=0"), in_background=True)
    assert str(command) == "openpi serve 'my folder' --port=0 &"
    assert command.argv == [sys.executable, "-m", "openpi.cli.main", "serve", "my folder", "--port=0"]


def test_a_command_logs_its_output_and_tells_its_progress_and_memory(tmp_path):
    seen = []
    with Children() as children:
        child = children.start(
            record_command(tmp_path), tmp_path / "logs" / "x.log", progress_parser(lambda *at: seen.append(at))
        )
        wait(child)
    assert [count for count, _ in seen] == [1, 2]
    assert seen[0][1].startswith("put the ")
    log = child.log.read_text()
    assert log.startswith(f"$ {child.command}\n[1/2] put the ")
    assert 2**24 < child.peak_memory_bytes < 2**34


def test_the_trainer_s_log_lines_are_progress_too():
    seen = []
    parse = progress_parser(lambda *at: seen.append(at))
    parse("12:00:01 INFO    Step 119: loss=0.25, grad_norm=1.5")
    parse("12:00:02 INFO    the checkpoint is in a/b")
    assert seen == [(120, "loss=0.25, grad_norm=1.5")]


def test_a_failure_names_the_command_its_last_words_and_the_log(tmp_path):
    with Children() as children, pytest.raises(CommandFailedError) as failure:
        wait(children.start(Command(("recrod",)), tmp_path / "x.log"))
    message = str(failure.value)
    assert message.startswith("openpi recrod\nended with exit code 2")
    assert "unknown command 'recrod'" in message
    assert str(tmp_path / "x.log") in message


def test_a_command_stops_being_waited_for_when_the_server_it_needs_ends(tmp_path):
    with Children() as children:
        server = children.start(Command(("nonsense",)), tmp_path / "server.log")
        client = children.start(endless(tmp_path), tmp_path / "client.log")
        with pytest.raises(CommandFailedError, match="openpi nonsense"):
            wait(client, needs=[server])
    assert client.poll() is not None


def test_a_server_that_ends_before_it_has_a_port_is_noticed(tmp_path):
    with Children() as children:
        server = children.start(Command(("nonsense",)), tmp_path / "server.log")
        with pytest.raises(CommandFailedError, match="openpi nonsense"):
            wait_for_file(tmp_path / "port", written_by=server)


def endless(folder: Path) -> Command:
    """Records for longer than anyone waits, in processes of its own."""
    return Command(("demo", "record", f"--output={folder / 'endless'}", "--episodes=100000", "--num-workers=2"))


def test_leaving_early_ends_a_command_and_the_processes_it_started(tmp_path):
    is_recording = threading.Event()
    children = Children()
    with pytest.raises(ZeroDivisionError), children:
        child = children.start(endless(tmp_path), tmp_path / "x.log", lambda line: is_recording.set())
        assert is_recording.wait(PATIENCE_S)
        assert len(members_of_group(child.pid)) > 1
        raise ZeroDivisionError
    (child,) = children.all
    assert child.poll() == -signal.SIGTERM
    assert members_of_group(child.pid) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_and_everything_it_started(tmp_path, signum):
    output = tmp_path / "out"
    argv = [sys.executable, "-m", "openpi.cli.main", "demo", f"--output={output}", "--demonstrations=100000"]
    demo = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=UNBUFFERED)
    try:
        assert demo.stdout is not None
        assert any("$ openpi demo record" in line for line in demo.stdout)
        demo.send_signal(signum)
        _, err = demo.communicate(timeout=PATIENCE_S)
    finally:
        demo.terminate()  # it ends what it has started
        demo.wait(PATIENCE_S)
    assert demo.returncode == 128 + signum
    assert "stopped; nothing keeps running" in err
    assert processes_about(output) == []


def members_of_group(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group_id = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(group_id) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


def processes_about(path: Path) -> list[int]:
    """Processes whose command line names `path`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(path).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def test_a_stage_counts_its_time_and_the_memory_of_its_processes(tmp_path, capsys):
    plan = Plan(tmp_path, FULL)
    with Children() as children:
        runner = StageRunner(plan, children, Terminal(1))
        with runner.stage("record", "Record"):
            runner.run(record_command(tmp_path), log="record", total=2)
    (stage,) = runner.stages
    assert stage.seconds > 0
    assert stage.peak_memory_bytes > stage.children[0].peak_memory_bytes > 0
    printed = capsys.readouterr().out
    assert "1/1  Record" in printed
    assert f"  $ {record_command(tmp_path)}\n" in printed
