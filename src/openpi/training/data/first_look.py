"""What would surprise the owner of a dataset, said when training starts: `openpi explain` over a few samples."""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence

import numpy as np

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.models.model_config import ModelType
from openpi.policies.policy_config import stats_dims
from openpi.training.config import TrainConfig
from openpi.training.data import sample_checks
from openpi.training.data.robot_actions import robot_actions
from openpi.training.data.sample_checks import Finding
from openpi.training.data.sample_trace import Stage, Step
from openpi.training.data_config import DataConfig

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 8


class FirstLook:
    """Collects the surprises of samples on their way through the chain; `warn` tells those that are no exception."""

    def __init__(self, config: TrainConfig, data_config: DataConfig):
        self._data_config = data_config
        self._context = sample_checks.Context(config.model, stats_dims(data_config).names)
        self._found: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        self._num_samples = 0

    def stage(self, before: Sample | None, sample: Sample, transform: transforms.DataTransformFn | None = None) -> None:
        """A sample before the first transform (`before` is None), or after one."""
        step = None if transform is None else Step("", transform)
        title = "the dataset" if step is None else step.name
        self._num_samples += before is None
        self._note(title, sample_checks.check_stage(Stage(title, sample, step), before, self._context))

    def round_trip(self, client: Sample, made: Sample) -> None:
        """What was recorded must come back from the transforms that answer the robot; tokens are not exact."""
        if self._context.model.model_type is ModelType.PI0_FAST or "actions" not in client:
            return
        to_robot = robot_actions(self._data_config, is_sampled=False)
        try:
            returned = to_robot(made["state"], made["actions"])
        except Exception:  # Those of users may need what is not here; that is told once, and costs no run.
            return
        recorded = np.asarray(client["actions"])
        if returned.shape == recorded.shape:  # widths are checked elsewhere
            self._note("the output transforms", [sample_checks.check_round_trip(recorded, returned)])

    def warn(self) -> None:
        """Logs each surprise that at least half of the samples have, with what was found in the first."""
        common = {where: told for where, told in self._found.items() if 2 * len(told) >= self._num_samples}
        for (title, key), messages in list(common.items())[:_MAX_WARNINGS]:
            share = f"{len(messages)} of {self._num_samples}"
            logger.warning("in %s samples, at %s: %s %s", share, title, key, messages[0])
        if common:
            logger.warning("`openpi explain` shows a sample stage by stage")

    def _note(self, title: str, findings: Sequence[Finding]) -> None:
        for key, message in {finding.key: finding.message for finding in findings if finding.is_surprise}.items():
            self._found[title, key].append(message)
