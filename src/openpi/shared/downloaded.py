"""Whether a file came from elsewhere: code that lies beside a checkpoint is run only where somebody vouches for it."""

from __future__ import annotations

from pathlib import Path

from openpi.shared import download

# Both caches, ours and that of the Hugging Face hub, keep their locks in their root, wherever that was when they were
# filled; a download of the hub's tools into a folder of the user's leaves notes in it.
_MARKS = (".locks", ".cache/huggingface/download")
_HUB_FOLDERS = ("models--", "datasets--", "spaces--")


def is_downloaded(path: Path | str) -> bool:
    """Whether it lies in a download cache, in a folder that the hub's tools filled, or in a mirror of URLs.

    What was copied or unpacked by hand cannot be told from what was made here.
    """
    places = {Path(path).absolute(), Path(path).resolve()}  # a name in the cache, and what it is a link to
    folders = {folder for place in places for folder in (place, *place.parents)}
    roots = {download.get_cache_dir(), *(mirror.resolve() for mirror in download.local_mirrors())}
    return not folders.isdisjoint(roots) or any(map(_is_marked, folders))


def _is_marked(folder: Path) -> bool:
    if folder.name.startswith(_HUB_FOLDERS):
        return True
    try:
        return any((folder / mark).is_dir() for mark in _MARKS)
    except OSError:  # a folder above that we may not look into
        return False
