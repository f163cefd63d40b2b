"""Files from elsewhere, fetched once: `$OPENPI_DATA_HOME` or `~/.cache/openpi`, then bucket and path."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openpi.shared.errors import install_hint

logger = logging.getLogger("openpi")

_PACKAGE = "package:"
_PART = ".openpi-part"  # in folders of the cache that were made for something inside them
_TIMEOUT_S = 60  # without any byte
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


def get_cache_dir() -> Path:
    """The cache's root, which need not exist yet."""
    return Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser().resolve()


def cache_path(url: str) -> Path:
    """Where the cache keeps a URL: `<cache>/<bucket>/<path>`.

    Raises:
        ValueError: the path would leave the cache.
    """
    parts = urlsplit(url)
    if ".." in parts.path.split("/"):
        raise ValueError(f"{url} has '..' in its path; write the path out")
    return get_cache_dir() / parts.netloc / parts.path.strip("/")


def maybe_download(url: str | Path, *, force_download: bool = False, **kwargs: Any) -> Path:
    """A local path of a file or folder, downloaded if it is remote and not cached.

    A download appears under its name only when it is complete; a second process that wants the same waits for
    it.

    Args:
        url: local path, `file://`, `https://`, a bucket (`gs://`, `s3://`), or `package:<package>[/<path>]` for what
            lies inside an installed Python package.
        force_download: fetch again even if cached.
        kwargs: per scheme, options for the fsspec file system, as in `gs={"token": "anon"}`.
    Raises:
        FileNotFoundError: nothing there.
        ConnectionError: not cached and not reachable; the message says where to put it by hand.
        ImportError: the scheme needs an extra that is not installed; it is named.
    """
    url = str(url)
    if url.startswith(_PACKAGE):
        return _packaged(url)
    if "://" not in url or url.startswith("file://"):
        return _local(Path(url.removeprefix("file://")))
    target = cache_path(url)
    if _is_whole(target) and not force_download:
        return target
    _make_parents(target)
    with _lock(target):
        if force_download or not _is_whole(target):
            _fetch_whole(url, target, kwargs)
    return target


def _is_whole(target: Path) -> bool:
    """Whether a file or folder was fetched as such, or put there by hand, not only for something inside it."""
    return target.exists() and not (target / _PART).exists()


def _make_parents(target: Path) -> None:
    """Creates the folders above a target, each marked as holding only a part of what is there remotely."""
    missing = []
    folder = target.parent
    while not folder.exists() and folder != get_cache_dir():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _PART).touch()
    target.parent.mkdir(parents=True, exist_ok=True)


def _packaged(url: str) -> Path:
    package, _, inside = url.removeprefix(_PACKAGE).partition("/")
    try:
        path = Path(str(resources.files(package).joinpath(inside)))
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"'{url}' names the package '{package}', which is not installed") from error
    if not path.exists():
        raise FileNotFoundError(f"'{url}' is not there: {path} does not exist in the installed package")
    return path


def _local(path: Path) -> Path:
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (absolute: {path.absolute()})")
    return path.resolve()


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fetch_whole(url: str, target: Path, options: dict[str, Any]) -> None:
    """Downloads beside the target, then renames; leaves nothing behind when it fails."""
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)  # of a process that was killed; the lock says that nobody writes it now
    logger.info("downloading %s to %s", url, target)
    try:
        _fetch(url, partial, options)
        _remove(target)
        partial.rename(target)
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # every fsspec backend raises its own types
        raise ConnectionError(
            f"cannot download {url}: {type(error).__name__}: {error}. Without a network, put it at {target} by hand"
        ) from error
    finally:
        _remove(partial)


def _fetch(url: str, destination: Path, options: dict[str, Any]) -> None:
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, destination.open("wb") as file:
            shutil.copyfileobj(response, file)
        return
    filesystem = _filesystem(scheme, options.get(scheme, {}))
    if not filesystem.exists(url):
        raise FileNotFoundError(f"{url} does not exist")
    filesystem.get(url.rstrip("/"), str(destination), recursive=filesystem.isdir(url))


def _filesystem(scheme: str, options: dict[str, Any]) -> Any:
    extra = _EXTRAS.get(scheme)
    hint = install_hint(extra) if extra else "install fsspec and its backend"
    try:
        import fsspec

        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ImportError(f"reading {scheme}:// needs a package that is missing ({error}); {hint}") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
