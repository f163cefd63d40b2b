"""Locks on files: `flock` where the file system has it, else a lock file that names its owner.

Lustre without `-o flock`, some NFS and FUSE mounts have no `flock`. There a `SoftFileLock` of the library `filelock` is
taken beside the file: it is left over after a sudden death, and broken by the next one on the same host who finds its
owner gone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from filelock import SoftFileLock, Timeout

logger = logging.getLogger(__name__)

# Of `flock`, where the file system does not have it: no such call, not for this file, no lock server.
_NOT_THERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_SUFFIX = ".held"


class HeldElsewhereError(BlockingIOError):
    """Another process has the lock; the message says how to tell where a lock file is left over."""


class FileLock:
    """Held until `release`, or until the process ends. A context manager around an acquired lock.

    Args:
        path: the file that is locked; it is created, and stays.
        is_shared: others may share it. Without `flock` they wait instead.
    """

    def __init__(self, path: Path, *, is_shared: bool = False):
        self.path = path
        self._kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
        self._file: IO[str] | None = None
        self._soft: SoftFileLock | None = None

    def acquire(self, *, wait: bool) -> None:
        """Takes the lock.

        Raises:
            HeldElsewhereError: somebody else has it, and `wait` is false.
        """
        file = self.path.open("w")
        try:
            fcntl.flock(file, self._kind if wait else self._kind | fcntl.LOCK_NB)
            self._file = file
        except BlockingIOError as error:
            file.close()
            raise HeldElsewhereError(errno.EAGAIN, "another process holds the lock", str(self.path)) from error
        except OSError as error:
            file.close()
            if error.errno not in _NOT_THERE:
                raise
            self._acquire_soft(wait=wait)
        except BaseException:
            file.close()
            raise

    def _acquire_soft(self, *, wait: bool) -> None:
        soft = SoftFileLock(f"{self.path}{_SUFFIX}", timeout=-1 if wait else 0)
        logger.debug("%s: the file system has no flock; using %s", self.path, soft.lock_file)
        try:
            soft.acquire()
        except Timeout as error:
            hint = f"another process holds the lock, or was killed on another host: then remove {soft.lock_file}"
            raise HeldElsewhereError(errno.EAGAIN, hint, str(self.path)) from error
        self._soft = soft

    def release(self) -> None:
        if self._soft is not None:
            self._soft.release()
        if self._file is not None:
            self._file.close()
        self._file = self._soft = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
