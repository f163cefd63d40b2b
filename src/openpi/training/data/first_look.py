"""A few samples of each dataset when training starts: what does not pass the recipe is refused, and what would surprise
the owner is told, as `openpi explain` does.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from openpi import transforms
from openpi.data.dataset import Dataset, Sample
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import FASTTokenizer
from openpi.policies.contract import Contract
from openpi.policies.policy_config import stats_dims
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.shared.tree import Tree, flatten
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import dataset_look, sample_checks
from openpi.training.data.contract_of_data import contract_of, rate_of
from openpi.training.data.recipe_data import RecipeData
from openpi.training.data.sample_checks import Finding
from openpi.training.data.sample_trace import Stage, Step
from openpi.training.data.streams import Stream
from openpi.training.data_config import DataConfig
from openpi.training.distributed import processes
from openpi.transforms import DataTransformFn

logger = logging.getLogger(__name__)

_NUM_SAMPLES = 8
_MAX_WARNINGS = 8

Passed = tuple[Sample, Sample, Sample]
"""A sample under client keys, before normalisation, and as the model takes it."""


def check_samples(config: TrainConfig, data: RecipeData) -> Contract | None:
    """Runs samples from all over each dataset through the recipe; returns the contract of the data, see `contract_of`.

    Raises:
        ValueError: a transform fails, or its result is not what the model takes; the transform is named.
    """
    (data_config, dataset), *others = data.members
    _check_action_tokenizer(config, data_config)
    clients, raws, mades = zip(*_passed(config, data_config, dataset), strict=True)
    contract = contract_of(config, data, clients, raws)
    for member, mixed_in in others:
        for _, _, made in _passed(config, member, mixed_in):
            _check_alike(member, made, mades[0])
        _warn_of_another_rate(config, rate_of(dataset), member, mixed_in)
    return contract


def _passed(config: TrainConfig, data_config: DataConfig, dataset: Dataset | Stream) -> list[Passed]:
    """Samples of one dataset that have passed, after what is surprising about them was told."""
    chain = data_loader.input_transforms(data_config, dataset)
    surprises, passed = _Surprises(config, data_config), []
    for where, sample in samples_of(dataset, _NUM_SAMPLES):
        client, raw, made = run_chain(sample, chain, data_config, where=where, surprises=surprises)
        _check_model_inputs(config, data_config, made)
        surprises.round_trip(client, made)
        passed.append((client, raw, made))
    surprises.warn()
    if processes.is_first():
        dataset_look.warn_of_findings(dataset, data_config, config.model.action_horizon)
    return passed


def _check_alike(data_config: DataConfig, made: Tree, made_of_first: Tree) -> None:
    """Raises ValueError unless a sample of another dataset of a mixture can be in one batch with those of the first."""
    first, found = flatten(dict(made_of_first)), flatten(made)
    others = first.keys() ^ found.keys()
    others |= {key for key in first.keys() & found.keys() if np.shape(first[key]) != np.shape(found[key])}
    if others:
        raise ValueError(
            f"the samples of {data_config.dataset_name} are not like those of the first dataset of the mixture in "
            f"{sorted(others)}: {_described(made)}; the first has {_described(made_of_first)}. Make them alike in "
            "the transforms of the part"
        )


def _warn_of_another_rate(
    config: TrainConfig, served: float | None, data_config: DataConfig, dataset: Dataset | Stream
) -> None:
    """Of a mixture, whose robot gets all chunks at the rate of the first dataset."""
    rate = rate_of(dataset)
    if not rate or not served or rate == served:
        return
    steps = config.model.action_horizon
    logger.warning(
        "%s was recorded at %g Hz, and a checkpoint of the mixture serves at the %g Hz of its first dataset: what took "
        "%.2g s there is taught as a motion of %.2g s. Record or convert both at one rate, unless each has a robot and "
        "tasks of its own",
        data_config.dataset_name,
        rate,
        served,
        steps / rate,
        steps / served,
    )


def _check_action_tokenizer(config: TrainConfig, data_config: DataConfig) -> None:
    """Raises ValueError unless a model that writes its actions can write every one of them."""
    for step in data_config.model_transforms.inputs:
        if isinstance(step, transforms.TokenizeFASTInputs) and isinstance(step.tokenizer, FASTTokenizer):
            model: Any = config.model
            step.tokenizer.check_fits(model.expert.vocab_size)


def samples_of(dataset: Dataset | Stream, num_samples: int) -> list[tuple[str, Sample]]:
    """Samples from all over a dataset, before any transform, each with what to call it."""
    if isinstance(dataset, Stream):
        return dataset.spread(num_samples)
    return [(f"sample {row}", dataset[row]) for row in evenly_spaced(range(len(dataset)), num_samples)]


def run_chain(
    sample: Sample,
    chain: Sequence[DataTransformFn],
    data_config: DataConfig,
    *,
    where: str,
    surprises: _Surprises | None = None,
) -> Passed:
    """A sample after the recipe's transforms.

    Raises:
        ValueError: one of them fails; it is named.
    """
    behind = (*data_config.data_transforms.inputs, transforms.Normalize, *data_config.model_transforms.inputs)
    num_client = len(chain) - len(behind)
    client = raw = sample
    if surprises is not None:
        surprises.stage(None, sample)
    for i, transform in enumerate(chain):
        if isinstance(transform, transforms.Normalize):
            raw = sample
        before = sample
        try:
            sample = transform(before)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{where} of {data_config.dataset_name} does not pass {type(transform).__name__} (step {i + 1} of "
                f"{len(chain)}): {error}\nThe step was given: {_described(before)}"
            ) from error
        if surprises is not None:
            surprises.stage(before, sample, transform)
        if i + 1 == num_client:
            client = sample
    return client, raw, sample


def _described(sample: Tree) -> str:
    return ", ".join(
        f"{key} {np.asarray(value).dtype}{list(np.shape(value))}" for key, value in flatten(sample).items()
    )


def _check_model_inputs(config: TrainConfig, data_config: DataConfig, made: Mapping[str, object]) -> None:
    """Raises ValueError, naming every difference, unless the sample has the shapes of the model's inputs."""
    found = flatten(made)
    problems = [
        f"{key}: {_shape_text(found.get(key))}, the model takes {list(spec.shape)}"
        for key, spec in config.model.sample_spec().items()
        if key not in found or np.shape(found[key]) != spec.shape
    ]
    is_fast = config.model.model_type is ModelType.PI0_FAST
    problems = [] if is_fast and "actions" in found else problems  # takes any cameras, and the robot's own widths
    if problems:
        raise ValueError(
            f"the samples of {data_config.dataset_name} do not fit the model of recipe '{config.name}': "
            f"{'; '.join(problems)}. Found: {', '.join(found)}. Correct model.action_dim, model.image_keys, or the "
            "data transforms"
        )


def _shape_text(value: ArrayLike | None) -> str:
    return "missing" if value is None else f"shape {list(np.shape(value))}"


class _Surprises:
    """Those of samples on their way through the chain; `warn` tells those that are no exception."""

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
        to_robot = data_loader.back_to_robot(self._data_config, is_sampled=False)
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
