"""Locks on files, and where the file system has no `flock`."""

import errno
import fcntl
import subprocess
import sys

import pytest

from openpi.convert.work_folder import WorkFolder
from openpi.shared.locks import FileLock, HeldElsewhereError
from openpi.training.checkpoints import Checkpoints

DIE_WITH_THE_LOCK = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(file, operation):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
from openpi.shared.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire(wait=False)
os._exit(0)
"""


@pytest.fixture(params=["flock", "no flock", "no lock server"])
def file_system(request, monkeypatch):
    """One that has `flock`, and two that answer as Lustre and NFS do."""
    number = {"no flock": errno.ENOSYS, "no lock server": errno.ENOLCK}.get(request.param)

    def flock(file, operation):
        raise OSError(number, "as the file system says")

    if number is not None:
        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_one_at_a_time_has_the_lock(file_system, tmp_path):
    first, second = FileLock(tmp_path / "x"), FileLock(tmp_path / "x")
    first.acquire(wait=False)
    with pytest.raises(HeldElsewhereError, match="another process holds the lock"):
        second.acquire(wait=False)
    first.release()
    second.acquire(wait=True)
    second.release()


def test_locks_of_different_files_do_not_meet(file_system, tmp_path):
    with FileLock(tmp_path / "x") as first, FileLock(tmp_path / "y", is_shared=True) as second:
        first.acquire(wait=False)
        second.acquire(wait=False)


def test_a_run_and_a_conversion_are_locked_on_any_file_system(file_system, tmp_path):
    with Checkpoints(tmp_path / "run"), pytest.raises(RuntimeError, match="another process is training"):
        Checkpoints(tmp_path / "run")
    with Checkpoints(tmp_path / "run"):
        pass  # released
    with WorkFolder(tmp_path / "out"), pytest.raises(ValueError, match="another conversion is writing"):
        WorkFolder(tmp_path / "out").__enter__()
    assert not (tmp_path / ".out.converting").exists()


def test_an_error_that_is_not_about_locking_is_told_as_it_is(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        FileLock(tmp_path / "x").acquire(wait=True)


def test_a_lock_file_that_a_killed_process_has_left_is_no_obstacle(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-c", DIE_WITH_THE_LOCK, tmp_path / "x"], check=True)
    assert (tmp_path / "x.held").exists()

    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock(tmp_path / "x")
    lock.acquire(wait=True)
    lock.release()
