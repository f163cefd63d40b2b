"""A folder of this machine to a URL: the way back of `download`, over fsspec, with this machine's credentials."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from openpi.shared.errors import first_line, shown_url
from openpi.shared.remote import file_systems
from openpi.shared.remote.files import NUM_CONNECTIONS

logger = logging.getLogger(__name__)


def is_remote(place: str) -> bool:
    """Whether it is a URL, not a path."""
    return "://" in place and not place.startswith("file://")


def upload_folder(
    folder: Path,
    url: str,
    *,
    skip: Collection[Path] = (),
    last: str = "",
    options: Mapping[str, object] | None = None,
) -> None:
    """Puts every file of a folder below a URL, several at once; files that are there under these names are replaced.

    Args:
        skip: relative paths that are there already.
        last: relative path of the file that is sent when all others are there, so that nobody takes a part for the
            whole.
        options: of the fsspec file system, such as `endpoint_url`.
    Raises:
        ConnectionError: a file could not be sent.
        ImportError: the scheme needs an extra that is not installed; it is named.
    """
    filesystem = file_systems.filesystem(urlsplit(url).scheme, options or {})
    root = str(filesystem._strip_protocol(url)).rstrip("/")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in skip]

    def send(name: Path) -> None:
        try:
            filesystem.put_file(str(folder / name), f"{root}/{name.as_posix()}")
        except Exception as error:  # every file system raises its own types
            raise ConnectionError(
                f"cannot upload {name} to {shown_url(url)}: {type(error).__name__}: {first_line(error)}"
            ) from error

    logger.info("uploading %d files to %s", len(names), shown_url(url))
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        for _ in pool.map(send, [name for name in names if name.as_posix() != last]):
            pass
    if Path(last) in names:
        send(Path(last))
