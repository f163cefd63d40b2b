"""Remote files to local ones: several at once, continued after a cut, checked when they end."""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import rich
from rich import filesize

from openpi.shared.remote.files import NUM_CONNECTIONS, PART, CutError, RemoteFile

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (0, 1, 4)  # before the tries that follow one without progress
_SECONDS_PER_LINE = 30
_RESERVE_BYTES = 2**29  # of the disk, left by what does not say how large it is


def fetch_files(files: Sequence[RemoteFile], folder: Path, *, label: str) -> None:
    """Brings every file to `folder / name`, except those that are there with the right size.

    A file that is not complete has another name, `<name>.openpi-part`, and is continued by the next call if the remote
    file has a version; the caller sees to it that the folder is of the same versions.

    Args:
        label: names the whole in progress reports.
    Raises:
        ConnectionError, FileNotFoundError: of the first file that failed; the others stop.
        OSError: the disk is too small; nothing is transferred, or kept of a file that did not say how large it is.
    """
    _check_space(files, folder)
    progress = _Progress(label, total=total_size(files), present=sum(_present(file, folder) for file in files))
    with progress, ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        running = [pool.submit(_fetch, file, local_path(file, folder), progress) for file in files]
        try:
            for future in as_completed(running):
                future.result()
        finally:
            progress.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def local_path(file: RemoteFile, folder: Path) -> Path:
    """Where `fetch_files` puts a file; that of a URL which is a file itself is `folder / "file"`."""
    return folder / (file.name or "file")


def total_size(files: Iterable[RemoteFile]) -> int | None:
    """In bytes; None if one is unknown."""
    sizes = [file.size for file in files]
    return None if None in sizes else sum(size or 0 for size in sizes)


def as_text(num_bytes: int | None) -> str:
    """`12.3 GB`."""
    return "unknown size" if num_bytes is None else filesize.decimal(num_bytes)


def _fetch(file: RemoteFile, path: Path, progress: _Progress) -> None:
    """One file, with as many tries as bring it further."""
    if path.exists() and file.size in (None, path.stat().st_size):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    if file.version is None:
        part.unlink(missing_ok=True)
    farthest, failed = _size(part), 0
    while True:
        try:
            _continue(file, part, progress)
            break
        except CutError as error:
            reached = _size(part)
            failed = 0 if reached > farthest else failed + 1
            farthest = max(farthest, reached)
            if failed > len(RETRY_DELAYS_S):
                raise
            logger.info("%s: cut at %s (%s); continuing", path.name, as_text(reached), error)
            progress.stop.wait(RETRY_DELAYS_S[failed - 1] if failed else 0)
    part.rename(path)


def _continue(file: RemoteFile, part: Path, progress: _Progress) -> None:
    """Appends what is missing, and checks the whole.

    Raises:
        CutError: it is not all there yet.
        ConnectionError: it is more than there should be.
    """
    part.touch()
    start, size = _size(part), file.size
    if size is None or start != size:
        with file.open(start) as body:
            if body.start != start:
                progress.advance(-start)
            size = body.size if size is None else size
            with part.open("ab" if start and body.start == start else "wb") as sink:
                for chunk in body.chunks:
                    sink.write(chunk)
                    progress.advance(len(chunk))
                    if size is None:
                        _check_reserve(part)
                    elif sink.tell() > size:
                        break  # it may go on for ever
    found = _size(part)
    if size is not None and found < size:
        raise CutError(f"the server sent {found} of {size} bytes")
    is_damaged = file.md5 is not None and _md5(part) != file.md5
    if (size is not None and found > size) or is_damaged:
        part.unlink()
        progress.advance(-found)
        raise CutError("its digest is wrong" if is_damaged else f"the server sent {found} bytes instead of {size}")


def _check_reserve(part: Path) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < _RESERVE_BYTES:
        part.unlink()
        message = f"{as_text(free)} free, and the server does not say how much is to come"
        raise OSError(errno.ENOSPC, message, str(part.parent))


def is_same(file: RemoteFile, path: Path) -> bool:
    """Whether a file here has the content of the remote one, for sure."""
    return file.md5 is not None and path.stat().st_size == file.size and _md5(path) == file.md5


def _md5(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).digest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _present(file: RemoteFile, folder: Path) -> int:
    path = local_path(file, folder)
    return _size(path) or _size(path.with_name(path.name + PART))


def _check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    total = total_size(files)
    if total is None:
        return
    missing = total - sum(_present(file, folder) for file in files)
    free = shutil.disk_usage(folder).free
    if missing > free:
        message = f"{as_text(missing)} to download, {as_text(free)} free"
        raise OSError(errno.ENOSPC, message, str(folder))


class _StoppedError(Exception):
    """Raised in threads whose result nobody waits for any more."""


class _Progress:
    """A bar on a terminal, else a log line now and then; also how the threads are told to stop."""

    def __init__(self, label: str, *, total: int | None, present: int):
        self.stop = threading.Event()
        self._label, self._total, self._done = label, total, present
        self._lock = threading.Lock()
        self._started = self._reported = time.monotonic()
        self._present = present
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        import rich.progress as bars
        from rich.console import Console

        console = rich.get_console()
        console = console if console.stderr else Console(stderr=True)
        if console.is_terminal:
            columns = ("{task.description}", bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn())
            self._bar = bars.Progress(*columns, bars.TimeRemainingColumn(), console=console, transient=True)
            self._bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if failed is None:
            took_s = time.monotonic() - self._started
            logger.info("%s: %s in %.0f s", self._label, as_text(self._done - self._present), took_s)

    def advance(self, num_bytes: int) -> None:
        """Called from the threads; ends them once one has failed, or the whole was interrupted."""
        if self.stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            is_due = self._bar is None and now - self._reported > _SECONDS_PER_LINE
            self._reported = now if is_due else self._reported
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif is_due:
            speed = (self._done - self._present) / (now - self._started)
            done, total = as_text(self._done), as_text(self._total)
            logger.info("%s: %s of %s, %s/s", self._label, done, total, as_text(int(speed)))
