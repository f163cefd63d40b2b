"""Before several processes become one run: are they all there, and does each have a place of its own?

JAX's own start aborts the process with a stack trace when a process is missing, or two have the same id. Here the
processes meet first, at the same address: each says who it is in a line of JSON and is told what is wrong, if
anything. Nothing stays open. No JAX here.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping

from openpi.shared.strict_json import Json

_RETRY_S = 0.2
_PATIENCE_S = 10
_MAX_LINE = 4096


def meet(address: str, *, num_processes: int, process_id: int, timeout_s: float) -> None:
    """Returns in every process once all have come.

    Args:
        address: `host:port` of process 0.
    Raises:
        RuntimeError: one did not come in time, two have the same id, or they disagree about how many they are; the
            message says which.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if process_id == 0:
        _wait_for_all(int(port), num_processes, deadline, timeout_s)
    else:
        _report(host.strip("[]"), int(port), num_processes, process_id, deadline, timeout_s)


def _wait_for_all(port: int, num_processes: int, deadline: float, timeout_s: float) -> None:
    present: dict[int, socket.socket] = {}
    problem = None
    with _listen(port) as server:
        while problem is None and len(present) < num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, (peer, *_) = server.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num_processes)) - present.keys())
                problem = f"no word of process {', '.join(map(str, missing))} of {num_processes} in {timeout_s:g} s"
                break
            connection.settimeout(_PATIENCE_S)
            said = _read(connection)
            if said is None or "process_id" not in said:  # a port scanner, or a health check
                connection.close()
                continue
            problem = _objection(said, peer, num_processes, present)
            present[said["process_id"] if problem is None else -1] = connection
        for connection in present.values():
            _write(connection, {"problem": problem})
    for connection in present.values():
        # The other side closes first: the port is free for JAX at once.
        _read(connection)
        connection.close()
    if problem is not None:
        raise RuntimeError(f"the processes of the run did not meet: {problem}")


def _listen(port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise RuntimeError(
            f"process 0 cannot listen on port {port} ({error.strerror}); choose another port in the coordinator's "
            "address, or end what uses it (another process 0?)"
        ) from error


def _objection(said: dict[str, int], peer: str, num_processes: int, present: dict[int, socket.socket]) -> str | None:
    process_id, count = said.get("process_id"), said.get("num_processes")
    if not isinstance(process_id, int) or not isinstance(count, int):
        return f"{peer} called without process_id and num_processes; is it another version of openpi?"
    if count != num_processes:
        return f"process {process_id} ({peer}) was started for {count} processes, process 0 for {num_processes}"
    if process_id in present:
        return f"two processes have process_id={process_id} (the second: {peer}); every process needs its own"
    return None


def _report(host: str, port: int, num_processes: int, process_id: int, deadline: float, timeout_s: float) -> None:
    with _connect(host, port, deadline, timeout_s) as connection:
        _write(connection, {"process_id": process_id, "num_processes": num_processes})
        connection.settimeout(timeout_s + _PATIENCE_S)  # process 0 waits for the others as long, and came later
        answer = _read(connection)
    if answer is None or "problem" not in answer:
        raise RuntimeError(
            f"what listens at {host}:{port} is no process 0 that waits for process {process_id}; correct the "
            "coordinator's address, or end a run that has started there without this process"
        )
    if answer["problem"] is not None:
        raise RuntimeError(f"the processes of the run did not meet: {answer['problem']}")


def _connect(host: str, port: int, deadline: float, timeout_s: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1))
        except OSError as error:  # not there yet, or never
            if time.monotonic() + _RETRY_S > deadline:
                raise RuntimeError(
                    f"no process 0 at {host}:{port} within {timeout_s:g} s ({error}); start it, correct the "
                    "coordinator's address, or open the port between the nodes"
                ) from error
            time.sleep(_RETRY_S)


def _write(connection: socket.socket, message: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError):  # gone; it will be missed elsewhere
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket) -> Json | None:
    """One message; None if the other side closed, or speaks something else."""
    try:
        line = connection.makefile("rb").readline(_MAX_LINE)
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
