"""`hf://[datasets/]<org>/<repository>[@<revision>][/<path>]`: files of the Hugging Face hub, in the hub's own cache.

The hub's library transfers, continues and shares them with other programs (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` hold).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from openpi.shared.errors import first_line

SCHEME = "hf://"


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """What a hub URL names.

    Attributes:
        repo_type: `model` or `dataset`.
        revision: branch, tag or commit; None = the default branch as it is when first fetched.
        path: file or folder inside; empty for the whole repository.
    """

    repo_id: str
    repo_type: str
    revision: str | None
    path: str


def parse(url: str) -> HubPlace:
    """Raises ValueError if the URL does not name a repository."""
    parts = PurePosixPath(url.removeprefix(SCHEME)).parts
    repo_type = "model"
    if parts and parts[0] in ("datasets", "models"):
        repo_type, parts = parts[0].removesuffix("s"), parts[1:]
    if len(parts) < 2:
        raise ValueError(
            f"{url} names no repository of the hub; expected hf://<org>/<repository>[@<revision>][/<path>]"
        )
    name, _, revision = parts[1].partition("@")
    return HubPlace(f"{parts[0]}/{name}", repo_type, revision or None, "/".join(parts[2:]))


def fetch(url: str, *, force_download: bool = False) -> Path:
    """The file or folder in the hub's cache, all of it.

    Raises:
        FileNotFoundError: the repository has no such path.
        ConnectionError: no such repository, none for us, or not reachable.
    """
    place = parse(url)
    with _own_errors() as library:
        snapshot = library.snapshot_download(
            place.repo_id,
            repo_type=place.repo_type,
            revision=place.revision,
            allow_patterns=[place.path, f"{place.path}/*"] if place.path else None,
            force_download=force_download,
        )
    found = Path(snapshot) / place.path
    if not found.exists():
        raise FileNotFoundError(f"{url} does not exist: repository '{place.repo_id}' has no '{place.path}'")
    return found


def sizes(url: str) -> list[int]:
    """Bytes of every file that `fetch` would bring; nothing is transferred. Errors as of `fetch`."""
    place = parse(url)
    with _own_errors() as library:
        info = library.HfApi().repo_info(
            place.repo_id, repo_type=place.repo_type, revision=place.revision, files_metadata=True
        )
    below = f"{place.path}/" if place.path else ""
    files = [file for file in info.siblings if file.rfilename == place.path or file.rfilename.startswith(below)]
    if not files:
        raise FileNotFoundError(f"{url} does not exist: repository '{place.repo_id}' has no '{place.path}'")
    return [file.size or 0 for file in files]


@contextlib.contextmanager
def _own_errors() -> Iterator[Any]:
    """The hub's library, whose errors are of its own types and of those of the HTTP library below it."""
    import huggingface_hub

    try:
        yield huggingface_hub
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {first_line(error)}") from error
