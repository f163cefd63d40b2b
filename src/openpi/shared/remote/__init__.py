"""What lies at a URL, file by file, each readable from any byte on; `transfer` brings them here."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from openpi.shared.errors import shown_url
from openpi.shared.remote.file_systems import fsspec_files
from openpi.shared.remote.files import CutError, RefusedError, RemoteFile
from openpi.shared.remote.google_bucket import google_files
from openpi.shared.remote.http_files import http_files
from openpi.shared.remote.listings import check_count, check_names

__all__ = ["CutError", "RefusedError", "RemoteFile", "find_files"]


def find_files(url: str, options: Mapping[str, object] | None = None) -> list[RemoteFile]:
    """The file at a URL, or all files below it.

    Args:
        options: of the fsspec file system, such as credentials. None = anonymously.
    Raises:
        FileNotFoundError: a bucket has nothing there, or a folder is empty.
        RefusedError: it is not for us.
        ConnectionError: no server, or one that answers something else, or without an end.
        ImportError: the scheme needs an extra that is not installed; it is named.
        ValueError: a file's name leads out of the folder, or is none that can be kept here.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        files = http_files(url)
    elif scheme in ("gs", "gcs") and options is None:
        files = google_files(url)
    else:
        files = fsspec_files(url, {"anon": True} if scheme == "s3" and options is None else options or {})
    if not files:
        raise FileNotFoundError(f"{shown_url(url)} is a folder without files")
    check_count(url, len(files))
    check_names(url, files)
    return files
