"""Files of any fsspec file system: Amazon's buckets, Google's with credentials, and others by their URL schemes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from openpi.shared.errors import first_line, install_hint, shown_url
from openpi.shared.remote.files import Body, CutError, RefusedError, RemoteFile
from openpi.shared.strict_json import Json

_BLOCK_BYTES = 16 << 20  # each is a request of its own
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}


def fsspec_files(url: str, options: Mapping[str, object]) -> list[RemoteFile]:
    """The file at a URL, or all below it; `options` are those of the scheme's file system."""
    opened = filesystem(urlsplit(url).scheme, options)
    with _own_errors(url):
        opened.invalidate_cache()
        root = str(opened._strip_protocol(url)).rstrip("/")
        if not opened.exists(root):
            raise FileNotFoundError(f"{shown_url(url)} does not exist")
        info = opened.info(root)
        found = {root: info} if info["type"] == "file" else opened.find(root, detail=True)
    return [
        RemoteFile(
            path.removeprefix(root).strip("/"),
            info["size"],
            _info_version(info),
            functools.partial(_open, opened, path, info),
        )
        for path, info in found.items()
    ]


@contextlib.contextmanager
def _open(filesystem: object, path: str, info: Json, start: int) -> Iterator[Body]:
    yield Body(start, info["size"], _blocks(filesystem, path, info, start))


def _blocks(filesystem: Any, path: str, info: Json, start: int) -> Iterator[bytes]:
    with _own_errors(path):
        while start < info["size"]:
            block = filesystem.cat_file(path, start=start, end=min(start + _BLOCK_BYTES, info["size"]))
            if not block:
                return
            yield block
            start += len(block)
        filesystem.invalidate_cache()
        is_same = _info_version(info) in (None, _info_version(filesystem.info(path)))  # listings may say less
    if not is_same:  # and what was read is of both
        raise ConnectionError(f"{path} was changed while it was read; try again")


def _info_version(info: Mapping[str, object]) -> str | None:
    """Each file system has its own name for it."""
    known = (info.get(key) for key in ("ETag", "etag", "generation", "mtime"))
    return next((str(value) for value in known if value is not None), None)


@contextlib.contextmanager
def _own_errors(url: str) -> Iterator[None]:
    """Every file system raises its own types."""
    try:
        yield
    except (FileNotFoundError, CutError):
        raise
    except PermissionError as error:
        raise RefusedError(f"{shown_url(url)}: {first_line(error)}") from error
    except Exception as error:
        raise CutError(f"{type(error).__name__}: {first_line(error)}") from error


def filesystem(scheme: str, options: Mapping[str, object]) -> Any:
    """The file system of a scheme.

    Raises:
        ImportError: it needs an extra that is not installed; it is named.
    """
    extra = _EXTRAS.get(scheme)
    hint = install_hint(extra) if extra else "install fsspec and its backend"
    try:
        import fsspec

        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ImportError(f"{scheme}:// needs a package that is missing ({error}); {hint}") from error
