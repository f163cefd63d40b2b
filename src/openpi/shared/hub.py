"""`hf://[datasets/]<org>/<repository>[@<revision>][/<path>]`: files of the Hugging Face hub, in the hub's own cache.

The hub's library transfers, continues and shares them with other programs (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` hold).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from openpi.shared.errors import first_line

if TYPE_CHECKING:
    from huggingface_hub.utils import HfUri

SCHEME = "hf://"


def parse(url: str) -> HfUri:
    """Raises ValueError if the URL does not name a repository."""
    from huggingface_hub.utils import parse_hf_uri

    try:
        return parse_hf_uri(url.rstrip("/"))
    except ValueError as error:
        raise ValueError(
            f"{url} names no repository of the hub; expected {SCHEME}<org>/<repository>[@<revision>][/<path>] "
            f"({first_line(error)})"
        ) from error


def fetch(url: str, *, force_download: bool = False) -> Path:
    """The file or folder in the hub's cache, all of it.

    Raises:
        FileNotFoundError: the repository has no such path.
        ConnectionError: no such repository, none for us, or not reachable.
    """
    place = parse(url)
    with _own_errors() as library:
        snapshot = library.snapshot_download(
            place.id,
            repo_type=place.type,
            revision=place.revision,
            allow_patterns=[place.path_in_repo, f"{place.path_in_repo}/*"] if place.path_in_repo else None,
            force_download=force_download,
        )
    found = Path(snapshot) / place.path_in_repo
    if not found.exists():
        raise FileNotFoundError(f"{url} does not exist: repository '{place.id}' has no '{place.path_in_repo}'")
    return found


def sizes(url: str) -> list[int]:
    """Bytes of every file that `fetch` would bring; nothing is transferred. Errors as of `fetch`."""
    place = parse(url)
    with _own_errors() as library:
        info = library.HfApi().repo_info(place.id, repo_type=place.type, revision=place.revision, files_metadata=True)
    below = f"{place.path_in_repo}/" if place.path_in_repo else ""
    files = [file for file in info.siblings if file.rfilename == place.path_in_repo or file.rfilename.startswith(below)]
    if not files:
        raise FileNotFoundError(f"{url} does not exist: repository '{place.id}' has no '{place.path_in_repo}'")
    return [file.size or 0 for file in files]


@contextlib.contextmanager
def _own_errors() -> Iterator[ModuleType]:
    """The hub's library, whose errors are of its own types and of those of the HTTP library below it."""
    import huggingface_hub

    try:
        yield huggingface_hub
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {first_line(error)}") from error
