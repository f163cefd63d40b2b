"""What a server says it has, limited and checked before any of it names a path here or a thread reads for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse

from openpi.shared.errors import first_line, shown_url
from openpi.shared.remote.files import PART, CutError, RemoteFile

MAX_FILES = 2**20  # 50,000 episodes of three cameras are 200,000
MAX_DEPTH = 64  # folders in folders
_MAX_PAGE_BYTES = 2**26
_MAX_NAME_BYTES = 255  # of one folder or file, as file systems have it
_MAX_SHOWN = 80


def read_page(response: HTTPResponse) -> bytes:
    """One page of a listing.

    Raises:
        CutError: it did not come whole.
        ConnectionError: it is longer than any that a server makes.
    """
    try:
        content = response.read(_MAX_PAGE_BYTES + 1)
    except (OSError, HTTPException) as error:
        raise CutError(f"{shown_url(response.url)}: {type(error).__name__}: {first_line(error)}") from error
    if len(content) > _MAX_PAGE_BYTES:
        raise ConnectionError(f"{shown_url(response.url)} lists more than {_MAX_PAGE_BYTES:,} bytes in one page")
    return content


def check_count(url: str, count: int) -> None:
    """
    Raises:
        ConnectionError: so many files that nobody has put them there.
    """
    if count > MAX_FILES:
        raise ConnectionError(f"{shown_url(url)} lists more than {MAX_FILES:,} files; name a folder inside it")


def check_names(url: str, files: Sequence[RemoteFile]) -> None:
    """
    Raises:
        ValueError: a name leads out of the folder, is none that a file can have, or is there twice, as a folder too.
    """
    if [file.name for file in files] == [""]:
        return
    names = [file.name for file in files]
    for name in names:
        if ".." in name.split("/") or name.startswith("/"):
            raise ValueError(f"{shown_url(url)} lists a file {_shown(name)}, which lies outside of it")
        if trouble := _trouble(name):
            raise ValueError(f"{shown_url(url)} lists a file {_shown(name)}, which cannot be kept here: {trouble}")
    counts = Counter(names)
    if len(counts) < len(names):
        twice = max(counts, key=counts.__getitem__)
        raise ValueError(f"{shown_url(url)} lists the file {_shown(twice)} twice")
    folders = {name[:end] for name in names for end, letter in enumerate(name) if letter == "/"}
    if both := sorted(counts.keys() & folders):
        raise ValueError(f"{shown_url(url)} lists {_shown(both[0])} as a file and as a folder; name one of them")


def _trouble(name: str) -> str:
    parts = name.split("/")
    if {"", "."} & set(parts):
        return "a part of its path is empty"
    if any(letter < " " or letter == "\\" for letter in name):
        return "it has a backslash or a control character"
    if any(len(part.encode(errors="replace")) > _MAX_NAME_BYTES for part in parts) or len(parts) > MAX_DEPTH:
        return "it is too long"
    if parts[-1].endswith(PART):
        return f"{PART} marks what is not all there"
    return ""


def _shown(name: str) -> str:
    return repr(name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}...")
