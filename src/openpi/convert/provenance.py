"""Where the episodes of a converted dataset come from, written into it: `run_metadata_<UTC>.yaml`.

The content is JSON, which is YAML as well.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from openpi.codecs.codec import Codec
from openpi.data.raw_episodes import Episode

_KINDS = ("run", "append")
_SHOWN = 5


def record(
    folder: Path, episodes: Sequence[Path], *, is_append: bool, codec: Codec, fps: float, task: str | None
) -> Path:
    """Writes the command line, versions, git state and recordings of one conversion into a dataset."""
    now = datetime.now(UTC)
    content = {
        "created": now.isoformat(timespec="seconds"),
        "command": sys.argv,
        "openpi": metadata.version("openpi"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": _git_state(),
        "codec": repr(codec),
        "fps": fps,
        "task": task,
        "recordings": [{"id": recording_id(path), "path": str(path.absolute())} for path in episodes],
    }
    kind = _KINDS[is_append]
    stamp = now.strftime("%Y%m%d_%H%M%S")
    path = folder / f"{kind}_metadata_{stamp}.yaml"
    number = 1
    while path.exists():  # two within one second
        path, number = folder / f"{kind}_metadata_{stamp}_{number}.yaml", number + 1
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def refuse_repeats(dataset: Path, episodes: Sequence[Path]) -> None:
    """
    Raises:
        ValueError: recordings are in the dataset already.
    """
    known = _recorded_ids(dataset)
    repeated = [path for path in episodes if recording_id(path) in known]
    if repeated:
        shown = ", ".join(str(path) for path in repeated[:_SHOWN])
        raise ValueError(
            f"{len(repeated)} of {len(episodes)} recordings are in {dataset} already, such as {shown}. Name only the "
            "new ones, or append them again with repeat (--repeat)"
        )


def recording_id(episode: Path) -> str:
    """The same wherever the episode lies: its number, and when it was recorded."""
    return f"{episode.name}-{Episode(episode).meta.get('created_ts_ns', 0)}"


def _recorded_ids(dataset: Path) -> set[str]:
    ids = set()
    for kind in _KINDS:
        for path in dataset.glob(f"{kind}_metadata_*.yaml"):
            ids |= {entry["id"] for entry in _read(path).get("recordings", [])}
    return ids


def _read(path: Path) -> dict[str, Any]:
    """Empty for a file of another tool."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _git_state() -> dict[str, Any] | None:
    """Commit of the folder that the command runs in, and whether it has changes; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "is_changed": bool(git("status", "--porcelain"))}
