"""What a file that cannot be read is instead: looked up in its first bytes, so that no error has to guess."""

from __future__ import annotations

from pathlib import Path

_HEAD_BYTES = 512

_LFS_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # a pointer is some 130
_FETCH_POINTER = (
    "run `git lfs pull` in its repository, or download it (`openpi fetch RECIPE`; of a recipe's dataset, "
    "`openpi fetch RECIPE --dataset`)"
)
# Offset and bytes at which a format can be told.
_SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("Parquet", 0, b"PAR1"),
    ("MP4", 4, b"ftyp"),
    ("Matroska", 0, b"\x1a\x45\xdf\xa3"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("HDF5", 0, b"\x89HDF\r\n\x1a\n"),
    ("NumPy", 0, b"\x93NUMPY"),
    ("ZIP", 0, b"PK\x03\x04"),
    ("gzip", 0, b"\x1f\x8b"),
    ("Zstandard", 0, b"\x28\xb5\x2f\xfd"),
    ("Arrow", 0, b"ARROW1"),
)


def is_lfs_pointer(content: bytes) -> bool:
    """True for the text that Git keeps in place of a large file that was not pulled."""
    return content.startswith(_LFS_POINTER)


def is_stand_in(file: Path) -> bool:
    """True for a file that only holds the place of another: a Git LFS pointer, or nothing.

    Raises:
        OSError: it cannot be read.
    """
    if file.stat().st_size > _POINTER_BYTES:
        return False
    content = file.read_bytes()
    return not content or is_lfs_pointer(content)


def found_instead(file: Path, expected: str = "") -> str | None:
    """What is in a file of another kind than it should be, and the fix, as a clause for the end of a message.

    Args:
        file: that could not be read.
        expected: its format if that has a signature, such as `Parquet`; `any` = one of those that have.
    Returns:
        None where the content looks like what it should be, or like nothing that is known here.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except OSError as error:
        return f"it cannot be opened ({error.strerror or error})"
    return content_instead(head, expected)


def content_instead(content: bytes, expected: str = "") -> str | None:
    """As `found_instead`, of what a file or a cell holds."""
    if not content:
        return "it is empty (0 bytes): what wrote or copied it was cut. Bring it here again"
    if is_lfs_pointer(content):
        return f"it is a Git LFS pointer, a short text in place of the file: {_FETCH_POINTER}"
    start = content[:_HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page (HTML), such as a server's error or login page. Download it again"
    if start.startswith(b"<?xml"):
        return "it is an XML document, such as a server's error message. Download it again"
    if not any(content[:_HEAD_BYTES]):
        return "it begins with zeros: the disk was full, or a download was cut. Bring it here again"
    for name, offset, signature in _SIGNATURES:
        if content[offset : offset + len(signature)] == signature:
            return None if expected in (name, "any") else f"it is a file of another format, {name}"
    return None
