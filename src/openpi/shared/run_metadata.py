"""What made a folder, written into it: `run_metadata_<UTC>.yaml`. The content is JSON, which is YAML as well."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def write(folder: Path, content: Mapping[str, object], *, kind: str = "run") -> Path:
    """Writes the command line, versions and git state of this run, and `content`, into a folder. Keys, and logins and
    signatures of URLs, are left out of the command line: such folders are handed on.

    Args:
        kind: what the file's name begins with.
    """
    now = datetime.now(UTC)
    everything = {
        "created": now.isoformat(timespec="seconds"),
        "command": [*_without_secrets(sys.argv)],
        "openpi": metadata.version("openpi"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(),
        **content,
    }
    stamp = now.strftime("%Y%m%d_%H%M%S")
    path = folder / f"{kind}_metadata_{stamp}.yaml"
    number = 1
    while path.exists():  # two within one second
        path, number = folder / f"{kind}_metadata_{stamp}_{number}.yaml", number + 1
    path.write_text(json.dumps(everything, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


_SECRET = re.compile(r"-.*(?:api[-_]?key|token|secret|password|credentials?)", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@?#]*(?=@)")
_SIGNATURE = re.compile(r"([?&][^=&]*(?:sig|token|key|secret|password|credential)[^=&]*=)[^&#]*", re.IGNORECASE)
_HIDDEN = "***"


def _without_secrets(command: Iterable[str]) -> Iterator[str]:
    is_secret = False
    for word in command:
        name, equals, _ = word.partition("=")
        names_secret = bool(_SECRET.fullmatch(name))
        if is_secret or (names_secret and equals):
            yield f"{name}={_HIDDEN}" if names_secret else _HIDDEN
        else:
            yield _SIGNATURE.sub(rf"\1{_HIDDEN}", _LOGIN.sub(_HIDDEN, word))
        is_secret = names_secret and not equals


def _git_state() -> dict[str, object] | None:
    """Commit of the folder that the command runs in, and whether it has changes; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "is_changed": bool(git("status", "--porcelain"))}
