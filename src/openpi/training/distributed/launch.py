"""Which process of a run this one is, as the command line or the launcher says. No JAX here.

--coordinator-address, --num-processes, --process-id     flags of `openpi train`, on every node by hand
OPENPI_COORDINATOR_ADDRESS, OPENPI_NUM_PROCESSES, ...    the same from the environment; flags win
MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK               as torchrun sets them; an address of one's own wins
SLURM_*                                                  inside `srun`
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

_ENVIRONMENT_PREFIX = "OPENPI_"
_REQUIRED = {
    "coordinator_address": "host:port of process 0, where the processes meet; the port must be free there",
    "num_processes": "processes of the run, all nodes together; 1 = this one alone, whatever the launcher says",
    "process_id": "which one this is, from 0",
}
_OPTIONS = {**_REQUIRED, "coordinator_timeout_s": "seconds to wait for the other processes at the start"}
_DEFAULT_TIMEOUT_S = 300
_TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
# What JAX's own detection reads; all of them are there only inside `srun`.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Launch:
    """One process among several.

    Attributes:
        num_processes: of the run, at least 2.
        process_id: of this one, in [0, num_processes).
        coordinator_address: `host:port` of process 0; None = JAX finds it (SLURM).
        local_device_ids: accelerators of this node that are this process's; None = all, but under SLURM the one
            with the number of the task on its node.
        timeout_s: how long to wait for the others at the start.
        agent_store: `host:port` of the store that torchrun keeps, in which processes of PyTorch agree on a free port
            instead of that of `coordinator_address`, which others may use; None = there is none.
    """

    num_processes: int
    process_id: int
    coordinator_address: str | None = None
    local_device_ids: tuple[int, ...] | None = None
    timeout_s: int = _DEFAULT_TIMEOUT_S
    agent_store: str | None = None


def split_flags(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The flags of this module by field name, and the other words."""
    parser = argparse.ArgumentParser(
        prog="openpi train", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    for name in _OPTIONS:
        parser.add_argument(_flag(name), f"--{name}")
    flags, rest = parser.parse_known_args(list(argv))
    return vars(flags), rest


def flags_help() -> str:
    """A line for each flag, with the variable that stands for it."""
    return "\n".join(f"  {_flag(name)}, {_variable(name)}: {text}" for name, text in _OPTIONS.items())


def find_launch(flags: Mapping[str, str], environ: Mapping[str, str]) -> Launch | None:
    """Where this process stands; None = it is the only one, as `num_processes` of 1 says whatever the launcher says.

    Raises:
        ValueError: some of the three values are given and others are not, or one of them is no such thing.
    """
    given = {name: environ[_variable(name)] for name in _OPTIONS if environ.get(_variable(name))} | dict(flags)
    timeout_s = _number(given.pop("coordinator_timeout_s", str(_DEFAULT_TIMEOUT_S)), "coordinator_timeout_s", least=1)
    if given.get("num_processes") == "1":
        return None
    is_torchrun = all(environ.get(name) for name in _TORCHRUN)
    if is_torchrun and given.keys() <= {"coordinator_address"}:
        launch = _torchrun(environ, **given)
    elif given:
        launch = _explicit(given)
    elif all(environ.get(name) for name in _SLURM):
        launch = _slurm(environ)
    else:
        return None
    return dataclasses.replace(launch, timeout_s=timeout_s) if launch.num_processes > 1 else None


def _explicit(given: Mapping[str, str]) -> Launch:
    missing = [f"{_flag(name)} (or {_variable(name)})" for name in _REQUIRED if name not in given]
    if missing:
        found = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"{found} is given without {' and '.join(missing)}; a run of several processes needs all three, in every "
            "process"
        )
    address = given["coordinator_address"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator_address is '{address}'; expected host:port of process 0, as in node1:29400")
    num_processes = _number(given["num_processes"], "num_processes", least=1)
    process_id = _number(given["process_id"], "process_id", least=0)
    if process_id >= num_processes:
        raise ValueError(
            f"process_id is {process_id} of {num_processes} processes; ids run from 0 to {num_processes - 1}"
        )
    return Launch(num_processes, process_id, address)


def _torchrun(environ: Mapping[str, str], coordinator_address: str | None = None) -> Launch:
    host, port = environ["MASTER_ADDR"], _number(environ["MASTER_PORT"], "MASTER_PORT", least=1)
    # torchrun itself listens on MASTER_PORT of the first node; launchers that only set its variables do not.
    has_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    launch = _explicit(
        {
            "coordinator_address": coordinator_address or f"{host}:{port + has_store}",
            "num_processes": environ["WORLD_SIZE"],
            "process_id": environ["RANK"],
        }
    )
    if has_store and coordinator_address is None:
        launch = dataclasses.replace(launch, agent_store=f"{host}:{port}")
    if environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return launch
    local_rank = _number(environ.get("LOCAL_RANK", ""), "LOCAL_RANK", least=0)
    return dataclasses.replace(launch, local_device_ids=(local_rank,))


def _slurm(environ: Mapping[str, str]) -> Launch:
    num_tasks = _number(environ["SLURM_NTASKS"], "SLURM_NTASKS", least=1)
    one_task_per_node = num_tasks == _number(environ.get("SLURM_STEP_NUM_NODES", "0"), "SLURM_STEP_NUM_NODES", least=0)
    num_visible = _visible_gpus(environ)
    # Bound to its own GPUs, a task has all that it sees; otherwise all tasks of a node see the same.
    is_bound = any(environ.get(name) for name in ("SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"))
    takes_all = num_visible is not None and (one_task_per_node or is_bound or num_visible == 1)
    return Launch(
        num_tasks,
        _number(environ["SLURM_PROCID"], "SLURM_PROCID", least=0),
        local_device_ids=tuple(range(num_visible)) if takes_all and num_visible else None,
    )


def _visible_gpus(environ: Mapping[str, str]) -> int | None:
    """GPUs that SLURM lets this task see; None if it does not say."""
    if visible := environ.get("CUDA_VISIBLE_DEVICES"):
        return len(visible.split(","))
    count = environ.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdigit() else None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _variable(name: str) -> str:
    return _ENVIRONMENT_PREFIX + name.upper()


def _number(text: str, name: str, *, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name} is '{text}'; expected a whole number of at least {least}")
    return int(text)
