"""Records what a policy was asked and what it answered, one file per call."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared.tree import flatten
from openpi_client.base_policy import BasePolicy


class PolicyRecorder(BasePolicy):
    """Passes calls on, and writes `step_<n>.npy` for each.

    A file is a 0-d object array around one flat dict with keys such as `inputs/images/cam_high` and
    `outputs/actions`: `np.load(path, allow_pickle=True).item()`. Numbering goes on where the folder ends, so
    a restarted server overwrites nothing.
    """

    def __init__(self, policy: BasePolicy, record_dir: str | Path) -> None:
        self._policy = policy
        self._dir = Path(record_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._step = 1 + max((_step_of(path) for path in self._dir.iterdir()), default=-1)

    def infer(self, obs: dict, **kwargs: Any) -> dict:
        """The wrapped policy's answer; written before it is returned."""
        result = self._policy.infer(obs, **kwargs)
        self._write(flatten({"inputs": obs, "outputs": result}))
        return result

    def reset(self) -> None:
        self._policy.reset()

    @property
    def metadata(self) -> dict:
        """The wrapped policy's."""
        return getattr(self._policy, "metadata", {})

    def _write(self, record: dict[str, Any]) -> None:
        path = self._dir / f"step_{self._step}.npy"
        partial = self._dir / f".{path.name}.{os.getpid()}"
        with partial.open("wb") as file:
            np.save(file, np.asarray(record, dtype=object))
        partial.replace(path)
        self._step += 1


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step_(\d+)\.npy", path.name)
    return int(match.group(1)) if match else -1
