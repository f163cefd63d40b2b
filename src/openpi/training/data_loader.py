"""From a recipe to batches of model inputs.

    dataset -> layout, prompt from task -> repack -> robot inputs, delta -> normalise -> resize, tokenise, pad -> batch

The transforms are those of serving; only the first two are training's own. Source: the training specification,
sections 3 and 8. No JAX here, and none in the worker processes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from openpi import transforms
from openpi.data.batch_loader import BatchLoader, SourceLoader
from openpi.data.batch_order import Stretches
from openpi.data.dataset import Dataset, Sample, TransformedDataset
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.mixture_order import ConcatenatedDataset, MixedIn, MixtureSource, shares
from openpi.policies.robot_spec import find_spec
from openpi.shared import published
from openpi.shared.strict_json import Json
from openpi.training.config import TrainConfig
from openpi.training.data import holdout
from openpi.training.data.recipe_data import FakeDataset, RecipeData, leaves, open_recipe
from openpi.training.data.streams import Encoded, Stream
from openpi.training.data_config import DataConfig

logger = logging.getLogger(__name__)

Split = Literal["train", "val", "all"]


def __getattr__(name: str) -> object:
    """`create_data_loader` and the other published names, which bring in a framework."""
    return published.attribute(__name__, name, "openpi.training.data.published_loader", PUBLISHED)


PUBLISHED = (
    "DataLoader",
    "DataLoaderImpl",
    "IterableDataset",
    "IterableTransformedDataset",
    "RLDSDataLoader",
    "TorchDataLoader",
    "create_data_loader",
    "create_rlds_data_loader",
    "create_rlds_dataset",
    "create_torch_data_loader",
    "create_torch_dataset",
    "transform_dataset",
    "transform_iterable_dataset",
)


def create_batch_loader(
    config: TrainConfig,
    *,
    split: Split = "train",
    shuffle: bool = True,
    num_batches: int | None = None,
    num_workers: int | None = None,
    skip_norm_stats: bool = False,
    keep_padding_flags: bool = False,
    part: tuple[int, int] = (0, 1),
    data: RecipeData | None = None,
) -> SourceLoader:
    """The loader of a recipe, as training iterates over it; `create_data_loader` gives what was published.

    Batches are model inputs, as nested dicts of stacked NumPy arrays with `actions` among them.

    Args:
        config: a `TrainConfig`; `batch_size` is that of all processes together.
        split: `train` leaves out the episodes held out for validation, `val` reads only those.
        num_batches: stop after so many; None = endless.
        num_workers: None = the recipe's.
        skip_norm_stats: feed un-normalised values.
        keep_padding_flags: add `actions_is_pad`, bool[b ah], true for steps beyond the end of the episode.
        part: (process, number of processes) of a distributed run.
        data: of the recipe, where they are open already.
    Raises:
        ValueError: statistics are missing, the dataset is too small, the recipe names none, or it wants episodes held
            out of data in RLDS form.
        FileNotFoundError, KeyError: the dataset is missing, or lacks a feature that the recipe reads.
    """
    data = open_recipe(config) if data is None else data
    choices = {"skip_norm_stats": skip_norm_stats, "keep_padding_flags": keep_padding_flags}
    order: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "shuffle": shuffle, "part": part}
    work: dict[str, Any] = {
        "num_workers": config.num_workers if num_workers is None else num_workers,
        "num_batches": num_batches,
        "name": data.config.dataset_name,
    }
    if config.frames_per_pass > 1 and (data.config.mixture or isinstance(data.datasets[0], Stream)):
        logger.warning("frames_per_pass=%d is for one dataset in LeRobot form; not used here", config.frames_per_pass)
    if data.config.mixture:
        return _mixture_loader(config, data, split, choices, order, work)
    dataset, chain = _of_split(config, *data.members[0], split, **choices)
    if isinstance(dataset, Stream):
        return SourceLoader(dataset.batches(**order), DecodeAndTransform(chain), **work)
    stretches = _stretches(config, dataset) if split == "train" and shuffle else None
    return BatchLoader(TransformedDataset(dataset, chain), **order, **work, stretches=stretches)


# Closer than this, a frame costs less than the order that would save it.
_FAR_APART = 8


def _stretches(config: TrainConfig, dataset: Dataset) -> Stretches | None:
    """Between key frames, where the recipe reads several frames of a stretch in one pass."""
    if not isinstance(dataset, LeRobotDataset):
        return None
    interval, per_pass = dataset.key_frame_interval(), config.frames_per_pass
    if per_pass > 1 and interval > 1:
        return Stretches.of_episodes(dataset.episode_bounds, interval, min(per_pass, interval))
    if per_pass == 1 and interval >= _FAR_APART:
        logger.info(
            "only every %dth frame of the videos decodes alone, so a frame costs many; --frames-per-pass=16 reads "
            "several in one pass, and `openpi dataset shrink` writes videos made for training",
            interval,
        )
    return None


def _of_split(
    config: TrainConfig,
    data_config: DataConfig,
    dataset: Dataset | Stream,
    split: Split,
    *,
    skip_norm_stats: bool,
    keep_padding_flags: bool,
) -> tuple[Dataset | Stream, Sequence[Callable[[Sample], Sample]]]:
    """The episodes of one dataset, and what their samples go through."""
    holdout.check_holdout(config, data_config)
    if split != "all" and isinstance(dataset, LeRobotDataset):
        train, held = holdout.split_dataset(config, data_config, dataset)
        dataset = dataset.select(train if split == "train" else held) if held else dataset
    chain = input_transforms(data_config, dataset, skip_norm_stats=skip_norm_stats)
    if keep_padding_flags:
        chain = (KeepPaddingFlags(chain, f"{data_config.action_sequence_keys[0]}_is_pad"),)
    return dataset, chain


def _mixture_loader(
    config: TrainConfig,
    data: RecipeData,
    split: Split,
    choices: Mapping[str, bool],
    order: Json,
    work: Json,
) -> SourceLoader:
    """Of `val`, the parts that hold something out."""
    opened = zip(data.config.mixture, data.datasets, strict=True)
    used = [(part, whole) for part, whole in opened if split != "val" or holdout.holds_out(config, part.config)]
    datasets = []
    for part, whole in used:
        dataset, chain = _of_split(config, part.config, whole, split, **choices)
        assert not isinstance(dataset, Stream)
        datasets.append(TransformedDataset(dataset, chain))
    mixed = [
        MixedIn(str(part.config.repo_id), len(dataset), share)
        for (part, _), dataset, share in zip(used, datasets, shares([part.share for part, _ in used]), strict=True)
    ]
    return SourceLoader(MixtureSource(mixed, **order), ConcatenatedDataset(datasets).__getitem__, **work)


def input_transforms(
    data_config: DataConfig, dataset: Dataset | Stream, *, skip_norm_stats: bool = False
) -> tuple[Callable[[Sample], Sample], ...]:
    """Everything between a sample of `create_dataset` and the model, in order.

    Raises:
        ValueError: statistics are missing, or the repack transform drops the prompt that is to come from the task.
    """
    if isinstance(dataset, FakeDataset):
        return ()
    return (
        *dataset_transforms(data_config, dataset),
        *model_side_transforms(data_config, skip_norm_stats=skip_norm_stats),
    )


def dataset_transforms(data_config: DataConfig, dataset: Dataset | Stream) -> tuple[Callable[[Sample], Sample], ...]:
    """What a recipe adds to a sample as it is recorded: the prompt, where that is the text of a task, and the layout of
    the cameras that the robot's transforms expect.

    Transforms written for the published loader turn [3, h, w] round without looking; they have no spec. Ours take both.

    Raises:
        ValueError: the repack transform drops the prompt.
    """
    if not isinstance(dataset, LeRobotDataset):  # frames of a stream carry a prompt, and are published as they are
        return ()
    steps: list[Callable[[Sample], Sample]] = []
    if find_spec(data_config.data_transforms.inputs) is None:
        steps.append(transforms.ChannelsFirst(dataset.metadata.camera_keys))
    if data_config.prompt_from_task:
        _check_prompt_survives(data_config)
        steps.append(transforms.PromptFromLeRobotTask(dataset.metadata.tasks))
    return tuple(steps)


def model_side_transforms(
    data_config: DataConfig, *, skip_norm_stats: bool = False
) -> tuple[Callable[[Sample], Sample], ...]:
    """Everything that follows `dataset_transforms`, up to what the model takes.

    Raises:
        ValueError: statistics are missing.
    """
    if data_config.norm_stats is None and not skip_norm_stats:
        raise ValueError(
            f"no normalisation statistics for asset id '{data_config.asset_id}'; compute them with `openpi stats`, or "
            f"point assets.assets_dir and assets.asset_id of the recipe to existing ones"
        )
    normalize = transforms.Normalize(
        None if skip_norm_stats else data_config.norm_stats, use_quantiles=data_config.use_quantile_norm
    )
    return (
        *data_config.repack_transforms.inputs,
        *data_config.data_transforms.inputs,
        normalize,
        *data_config.model_transforms.inputs,
    )


def back_to_robot(data_config: DataConfig, *, is_sampled: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(state, actions) as the model has them -> actions of the robot, by the transforms that serving uses.

    Args:
        is_sampled: the actions are what the model returned, which pi0-FAST's output transform decodes first.
    """
    chain = transforms.compose(
        (
            *(data_config.model_transforms.outputs if is_sampled else ()),
            transforms.Unnormalize(data_config.norm_stats, use_quantiles=data_config.use_quantile_norm),
            *data_config.data_transforms.outputs,
        )
    )
    return lambda state, actions: np.asarray(chain({"state": state, "actions": actions})["actions"])


@dataclass(frozen=True)
class DecodeAndTransform:
    """From an encoded frame of the stream to a sample for the model."""

    chain: Sequence[Callable[[Sample], Sample]]

    def __call__(self, frame: Encoded) -> Sample:
        return transforms.compose(self.chain)(frame.decode())


@dataclass(frozen=True)
class KeepPaddingFlags:
    """Runs `chain`, which drops the padding flags of the actions, and puts them back as `actions_is_pad`."""

    chain: Sequence[Callable[[Sample], Sample]]
    source: str

    def __call__(self, sample: Sample) -> Sample:
        return {**transforms.compose(self.chain)(sample), "actions_is_pad": sample[self.source]}


def _check_prompt_survives(data_config: DataConfig) -> None:
    for transform in data_config.repack_transforms.inputs:
        if isinstance(transform, transforms.RepackTransform) and "prompt" not in set(leaves(transform.structure)):
            raise ValueError(
                "prompt_from_task is set, but the repack transform drops the prompt; add 'prompt': 'prompt' to its "
                "structure, or turn prompt_from_task off"
            )
