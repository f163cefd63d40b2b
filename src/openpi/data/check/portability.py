"""Whether the folder is whole, and stays so when it is copied or opened elsewhere: `portability.*`."""

import os
from collections.abc import Iterator
from pathlib import Path

from openpi.data.check.findings import Finding, Severity
from openpi.data.lerobot.files import check_inside
from openpi.shared.file_kinds import found_instead, is_stand_in

_PARTS = ("meta", "data", "videos", "images")
_LEFT_BEHIND = (".tmp", ".part", ".partial", ".incomplete", ".lock")


def check(root: Path) -> Iterator[Finding]:
    names: dict[str, Path] = {}
    for path in _files(root):
        shown = path.relative_to(root)
        yield from _content(path, shown)
        try:
            check_inside(root, path)
        except ValueError as error:
            yield Finding.of_error("portability.link", error)
        if path.suffix in _LEFT_BEHIND:
            yield Finding("portability.leftover", Severity.INFO, f"{shown} was left by a copy that was cut")
        twin = names.setdefault(str(shown).casefold(), shown)
        if twin != shown:
            found = f"{shown} and {twin} differ in case only"
            fix = "Name one of them otherwise: on Windows and macOS they are one file"
            yield Finding("portability.case", Severity.WARNING, found, "", fix)


def _files(root: Path) -> Iterator[Path]:
    for part in _PARTS:
        for folder, _, files in os.walk(root / part, followlinks=False):
            yield from (Path(folder, name) for name in sorted(files))


def _content(path: Path, shown: Path) -> Iterator[Finding]:
    try:
        if not is_stand_in(path):
            return
    except OSError as error:
        yield Finding("portability.unreadable", Severity.ERROR, f"{shown}: {error.strerror}", "a file that can be read")
        return
    code = "portability.lfs-pointer" if path.stat().st_size else "portability.empty-file"
    yield Finding(code, Severity.ERROR, f"{shown}: {found_instead(path)}", "the file itself")
