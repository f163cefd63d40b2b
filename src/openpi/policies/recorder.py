"""Records what a policy was asked and what it answered, one file per call."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.shared.tree import flatten
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger(__name__)


class PolicyRecorder(BasePolicy):
    """Passes calls on, and writes `step_<n>.npy` for each.

    A file is a 0-d object array around one flat dict with keys such as `inputs/images/cam_high` and
    `outputs/actions`: `np.load(path, allow_pickle=True).item()`. Numbering goes on where the folder ends, so
    that neither a restarted server nor a second one overwrites anything. What cannot be written, as to a full disk,
    is lost and logged, once until it can be again: the robot gets its answer.
    """

    def __init__(self, policy: BasePolicy, record_dir: str | Path) -> None:
        self._policy = policy
        self._dir = Path(record_dir)
        self._dir.mkdir(parents=True, exist_ok=True)
        self._is_lost = False
        self._step = 1 + max((_step_of(path) for path in self._dir.iterdir()), default=-1)

    def infer(self, obs: dict, **kwargs: object) -> dict:
        """The wrapped policy's answer; recorded before it is returned."""
        result = self._policy.infer(obs, **kwargs)
        self._write(flatten({"inputs": obs, "outputs": result}))
        return result

    def infer_batch(self, observations: Sequence[dict], **kwargs: object) -> list[dict | Exception]:
        """The wrapped policy's answers, each recorded before they are returned; those that failed are not."""
        results = self._policy.infer_batch(observations, **kwargs)  # type: ignore[attr-defined]
        for obs, result in zip(observations, results, strict=True):
            if not isinstance(result, Exception):
                self._write(flatten({"inputs": obs, "outputs": result}))
        return results

    def reset(self) -> None:
        self._policy.reset()

    def __getattr__(self, name: str) -> object:
        """`metadata`, `contract`, ...: the wrapped policy's."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._policy, name)

    def _write(self, record: Mapping[str, object]) -> None:
        try:
            while not write_record(self._dir / f"step_{self._step}.npy", record):
                self._step += 1
            self._step, self._is_lost = self._step + 1, False
        except OSError as error:
            if not self._is_lost:
                logger.error("Requests are not recorded any more: %s", error)
            self._is_lost = True


def write_record(path: Path, record: Mapping[str, object]) -> bool:
    """Writes one record in the documented form, complete or not at all.

    Returns:
        False: there is one already, or another process is writing it.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        file = partial.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            if path.exists():
                return False
            np.save(file, np.asarray(record, dtype=object))
        partial.replace(path)
        return True
    finally:
        partial.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    match = re.fullmatch(r"step_(\d+)\.npy", path.name)
    return int(match.group(1)) if match else -1
