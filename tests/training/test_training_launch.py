"""Where a process stands in a run: flags, variables, launchers, and the roll call before the start."""

import sys
import threading

import pytest

import forked
import paths
from openpi.training.distributed import roll_call
from openpi.training.distributed.launch import Launch, find_launch, split_flags
from training_processes import environment, free_port

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny"
TORCHRUN = {
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "16",
    "RANK": "9",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}

LAUNCHERS = {
    "nothing said": ({}, None),
    "one process": ({"OPENPI_COORDINATOR_ADDRESS": "a:1", "OPENPI_NUM_PROCESSES": "1", "OPENPI_PROCESS_ID": "0"}, None),
    "a run of its own within srun": ({**SRUN, "OPENPI_NUM_PROCESSES": "1"}, None),
    "own variables": (
        {
            "OPENPI_COORDINATOR_ADDRESS": "node1:29400",
            "OPENPI_NUM_PROCESSES": "4",
            "OPENPI_PROCESS_ID": "3",
            "OPENPI_COORDINATOR_TIMEOUT_S": "20",
        },
        Launch(4, 3, "node1:29400", timeout_s=20),
    ),
    "torchrun, a process per GPU": (
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "1"},
        Launch(16, 9, "node1:29501", local_device_ids=(1,), agent_store="node1:29500"),
    ),
    "torchrun, a process per node": (
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "1"},
        Launch(16, 9, "node1:29501", agent_store="node1:29500"),
    ),
    "torchrun, whose port after its own is taken": (
        {**TORCHRUN, "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "1", "OPENPI_COORDINATOR_ADDRESS": "node1:400"},
        Launch(16, 9, "node1:400", local_device_ids=(1,)),
    ),
    "torchrun's variables without torchrun": (
        {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "", "LOCAL_WORLD_SIZE": "1"},
        Launch(16, 9, "node1:29500"),
    ),
    "torchrun alone": ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
    "srun, a task per node": ({**SRUN, "SLURM_GPUS_ON_NODE": "4"}, Launch(2, 1, local_device_ids=(0, 1, 2, 3))),
    "srun, a task per GPU, all visible": (
        {**SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_GPUS_ON_NODE": "4"},
        Launch(8, 5),
    ),
    "srun, a task per GPU, one visible": (
        {**SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1"},
        Launch(8, 5, local_device_ids=(0,)),
    ),
    "a batch script without srun": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
}


@pytest.mark.parametrize(("variables", "expected"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_a_process_learns_from_its_launcher_where_it_stands(variables, expected):
    assert find_launch({}, variables) == expected


def test_flags_complete_and_overrule_variables():
    flags, rest = split_flags(["recipe", "--process-id=2", "--num_processes", "3", "--exp-name=x"])
    assert rest == ["recipe", "--exp-name=x"]
    variables = {"OPENPI_COORDINATOR_ADDRESS": "node1:29400", "OPENPI_PROCESS_ID": "0", **TORCHRUN}
    assert find_launch(flags, variables) == Launch(3, 2, "node1:29400")


BAD = {
    "some are missing": (
        {"num_processes": "2"},
        r"num_processes=2 .* without --coordinator-address .* and --process-id",
    ),
    "no such process": (
        {"coordinator_address": "a:1", "num_processes": "2", "process_id": "2"},
        "process_id is 2 of 2 processes; ids run from 0 to 1",
    ),
    "no number": (
        {"coordinator_address": "a:1", "num_processes": "two", "process_id": "0"},
        "num_processes is 'two'; expected a whole number",
    ),
    "no port": (
        {"coordinator_address": "node1", "num_processes": "2", "process_id": "0"},
        "coordinator_address is 'node1'; expected host:port",
    ),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_contradictions_are_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        find_launch(flags, {})


def _meet(*places: tuple[int, int], timeout_s: float = 30) -> list[str | None]:
    """The errors of processes (id, count) that meet on loopback; None where there is none."""
    address = f"127.0.0.1:{free_port()}"
    errors: list[str | None] = [None] * len(places)

    def come(i: int, process_id: int, count: int) -> None:
        try:
            roll_call.meet(address, num_processes=count, process_id=process_id, timeout_s=timeout_s)
        except RuntimeError as error:
            errors[i] = str(error)

    threads = [threading.Thread(target=come, args=(i, *place)) for i, place in enumerate(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_processes_that_are_all_there_meet():
    assert _meet((2, 3), (0, 3), (1, 3)) == [None] * 3


def test_processes_of_torchrun_agree_on_a_free_port_in_each_of_its_attempts(monkeypatch):
    """The port after its own is often that of another job."""
    dist = pytest.importorskip("torch.distributed")
    from openpi.training.backends.pytorch import processes as processes_pytorch

    address = f"127.0.0.1:{free_port()}"
    host, port = address.split(":")
    store = dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        launches = [Launch(2, i, f"127.0.0.1:{int(port) + 1}", agent_store=address) for i in range(2)]
        first, second = [processes_pytorch.agreed(launch).coordinator_address for launch in launches]
        assert first == second
        assert first is not None and first != address
    assert store.check(["openpi/port/run/0", "openpi/port/run/1"])


def test_a_missing_process_is_named_to_all():
    errors = _meet((0, 4), (2, 4), timeout_s=1)
    assert all("no word of process 1, 3 of 4 in 1 s" in str(error) for error in errors)


def test_processes_that_disagree_about_their_number_are_named():
    errors = _meet((0, 2), (2, 3))
    assert all("process 2 (" in str(e) and "for 3 processes, process 0 for 2" in str(e) for e in errors)


def test_a_place_that_is_taken_is_named():
    first, *others = _meet((0, 3), (1, 3), (1, 3), timeout_s=3)
    assert "two processes have process_id=1" in str(first)
    assert any("two processes have process_id=1" in str(error) for error in others)


def test_a_second_process_0_is_refused():
    assert any("cannot listen on port" in str(error) for error in _meet((0, 2), (0, 2), timeout_s=1))


def test_a_coordinator_that_is_not_there_ends_training_with_one_line(tmp_path):
    """And leaves nothing behind."""
    address = f"127.0.0.1:{free_port()}"
    words = ["--exp-name=x", f"--checkpoint-base-dir={tmp_path}", "--process-id=1", "--num-processes=2"]
    limit = "--coordinator-timeout-s=1"
    done = forked.run(
        [sys.executable, "-m", "openpi.cli.main", "train", RECIPE, *words, f"--coordinator-address={address}", limit],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"no process 0 at {address} within 1 s" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tiny").exists()
