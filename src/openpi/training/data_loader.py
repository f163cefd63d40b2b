"""From a recipe to batches of model inputs.

    dataset -> prompt from task -> repack -> robot inputs, delta -> normalise -> resize, tokenise, pad -> batch

The transforms are those of serving; only the first two are training's own. Source: the training specification,
sections 3 and 8. No JAX here, and none in the worker processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openpi import transforms
from openpi.data.batch_loader import BatchLoader, SourceLoader
from openpi.data.dataset import Dataset, Sample, TransformedDataset
from openpi.data.lerobot.home import locate_dataset
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.mixture_order import ConcatenatedDataset, MixedIn, MixtureSource, shares
from openpi.models.model_config import ArraySpec, BaseModelConfig
from openpi.shared import published
from openpi.shared.errors import missing_key
from openpi.shared.tree import unflatten
from openpi.training.data_config import DataConfig
from openpi.training.streams import Encoded, Stream, open_stream

FAKE_REPO_ID = "fake"
FAKE_TOKEN_RANGE = 2048

Split = Literal["train", "val", "all"]


def __getattr__(name: str) -> Any:
    """`create_data_loader` and the other published names, which bring in a framework."""
    return published.attribute(__name__, name, "openpi.training.published_loader", PUBLISHED)


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
    config: Any,
    *,
    split: Split = "train",
    shuffle: bool = True,
    num_batches: int | None = None,
    num_workers: int | None = None,
    skip_norm_stats: bool = False,
    keep_padding_flags: bool = False,
    part: tuple[int, int] = (0, 1),
    data_config: DataConfig | None = None,
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
        data_config: the recipe's, expanded, where it exists already.
    Raises:
        ValueError: statistics are missing, the dataset is too small, the recipe names none, or it wants episodes held
            out of data in RLDS form.
        FileNotFoundError, KeyError: the dataset is missing, or lacks a feature that the recipe reads.
    """
    data_config = expanded(config) if data_config is None else data_config
    choices = {"skip_norm_stats": skip_norm_stats, "keep_padding_flags": keep_padding_flags}
    order: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "shuffle": shuffle, "part": part}
    work: dict[str, Any] = {
        "num_workers": config.num_workers if num_workers is None else num_workers,
        "num_batches": num_batches,
        "name": data_config.dataset_name,
    }
    if data_config.mixture:
        return _mixture_loader(config, data_config, split, choices, order, work)
    dataset, chain = _opened(config, data_config, split, **choices)
    if isinstance(dataset, Stream):
        return SourceLoader(dataset.batches(**order), DecodeAndTransform(chain), **work)
    return BatchLoader(TransformedDataset(dataset, chain), **order, **work)


def _opened(
    config: Any, data_config: DataConfig, split: Split, *, skip_norm_stats: bool, keep_padding_flags: bool
) -> tuple[Dataset | Stream, Sequence[Callable[[Sample], Sample]]]:
    """One dataset, and what its samples go through."""
    dataset = create_dataset(data_config, config.model, _episodes_of(config, data_config, split))
    chain = input_transforms(data_config, dataset, skip_norm_stats=skip_norm_stats)
    if keep_padding_flags:
        chain = (KeepPaddingFlags(chain, f"{data_config.action_sequence_keys[0]}_is_pad"),)
    return dataset, chain


def _mixture_loader(
    config: Any,
    data_config: DataConfig,
    split: Split,
    choices: Mapping[str, bool],
    order: Mapping[str, Any],
    work: Mapping[str, Any],
) -> SourceLoader:
    """Of `val`, the parts that hold something out."""
    parts = [part for part in data_config.mixture if split != "val" or holds_out(config, part.config)]
    datasets = []
    for part in parts:
        dataset, chain = _opened(config, part.config, split, **choices)
        assert not isinstance(dataset, Stream)
        datasets.append(TransformedDataset(dataset, chain))
    mixed = [
        MixedIn(str(part.config.repo_id), len(dataset), share)
        for part, dataset, share in zip(parts, datasets, shares([part.share for part in parts]), strict=True)
    ]
    return SourceLoader(MixtureSource(mixed, **order), ConcatenatedDataset(datasets).__getitem__, **work)


def create_dataset(
    data_config: DataConfig, model_config: BaseModelConfig, episodes: Sequence[int] | None = None
) -> Dataset | Stream:
    """The samples of a recipe before any transform; of a mixture, those of its first dataset.

    Cameras that the repack transform does not mention are not decoded. Data in RLDS form have no random access, only
    an order.

    Args:
        episodes: numbers of the episodes to read; None = all but those that the recipe excludes. Not for data in
            RLDS form.
    Raises:
        ImportError: what reads the data's form is not installed.
        ValueError: the recipe names no dataset, or a column that it reads holds numbers that are not finite.
    """
    if data_config.stream_format is not None:
        return open_stream(data_config, model_config.action_horizon)
    if data_config.repo_id == FAKE_REPO_ID:
        return FakeDataset(model_config)
    metadata = open_metadata(data_config)
    steps_s = [step / metadata.fps for step in range(model_config.action_horizon)]
    dataset = LeRobotDataset(
        metadata.root,
        episodes=kept_episodes(data_config, metadata) if episodes is None else episodes,
        delta_timestamps=dict.fromkeys(data_config.action_sequence_keys, steps_s),
        columns=features_read(data_config, metadata),
        metadata=metadata,
    )
    dataset.check_finite()
    return dataset


def kept_episodes(data_config: DataConfig, metadata: LeRobotMetadata) -> list[int] | None:
    """Numbers of the episodes that the recipe does not exclude; None = it excludes none.

    Raises:
        ValueError: it excludes all; or as `Selection.excluded`.
    """
    return data_config.selection.kept(metadata) if data_config.selection else None


def samples_of(dataset: Dataset | Stream, num_samples: int) -> list[tuple[str, Sample]]:
    """Samples from all over a dataset, before any transform, each with what to call it."""
    if isinstance(dataset, Stream):
        return dataset.spread(num_samples)
    rows = np.unique(np.linspace(0, len(dataset) - 1, num_samples).round().astype(int))
    return [(f"sample {row}", dataset[int(row)]) for row in rows]


def open_metadata(data_config: DataConfig) -> LeRobotMetadata:
    """The description of the recipe's dataset in LeRobot form.

    Raises:
        ValueError: as `open_root`; or the description is spoilt.
    """
    return LeRobotMetadata.load(open_root(data_config))


def open_root(data_config: DataConfig) -> Path:
    """The folder of the recipe's dataset in LeRobot form, fetched if it is not on this machine.

    Raises:
        ValueError: the recipe names no dataset, random data, or one in RLDS form.
    """
    if data_config.rlds_data_dir is not None:
        raise ValueError(
            f"the recipe reads data in RLDS form ({data_config.rlds_data_dir}), which have no LeRobot metadata"
        )
    if data_config.repo_id is None or data_config.repo_id == FAKE_REPO_ID:
        raise ValueError(
            f"the recipe names no recorded dataset (repo_id is {data_config.repo_id!r}); set --data.repo-id to a hub "
            f"id or a folder"
        )
    return locate_dataset(data_config.repo_id, may_download=not data_config.local_files_only)


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
        *prompt_transforms(data_config, dataset),
        *model_side_transforms(data_config, skip_norm_stats=skip_norm_stats),
    )


def prompt_transforms(data_config: DataConfig, dataset: Dataset | Stream) -> tuple[Callable[[Sample], Sample], ...]:
    """What puts the text of a task under `prompt`, if the recipe wants it there.

    Raises:
        ValueError: the repack transform drops it.
    """
    if not data_config.prompt_from_task or not isinstance(dataset, LeRobotDataset):  # frames of a stream carry a prompt
        return ()
    _check_prompt_survives(data_config)
    return (transforms.PromptFromLeRobotTask(dataset.metadata.tasks),)


def model_side_transforms(
    data_config: DataConfig, *, skip_norm_stats: bool = False
) -> tuple[Callable[[Sample], Sample], ...]:
    """Everything that follows the prompt, up to what the model takes.

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


def features_read(data_config: DataConfig, metadata: LeRobotMetadata) -> list[str] | None:
    """Features that the repack transform looks up, so that nothing else is decoded; None = cannot be told.

    Raises:
        KeyError: it looks up what the dataset does not have.
        ValueError: it looks up a picture that is no 8-bit RGB.
    """
    first = next(iter(data_config.repack_transforms.inputs), None)
    if not isinstance(first, transforms.RepackTransform):
        return None
    made = {"prompt", "task", *(f"{key}_is_pad" for key in metadata.features)}
    paths = set(_leaves(first.structure))
    known = {*metadata.features, *metadata.annotation_keys}
    for path in sorted(paths - made - known):
        raise missing_key(
            path,
            known,
            wanted_by="the recipe's repack transform",
            fix=f"Change its structure to the names in {metadata.root}, take what is not there out of the recipe (in a "
            "file of `openpi init`: None for a camera), or choose another dataset.",
            in_use=paths,
        )
    metadata.check_readable(sorted(paths))
    return sorted(paths & known)


def split_episodes(total: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to train on, and of those held out, both ascending.

    Args:
        holdout: how many to hold out, or below 1 the fraction (at least one episode, if above 0).
        seed: chooses which; a larger hold-out of the same seed contains the smaller one.
    Raises:
        ValueError: nothing would be left to train on.
    """
    num_held = int(holdout) if holdout >= 1 else int(np.ceil(holdout * total))
    if not 0 <= num_held < total:
        raise ValueError(
            f"holdout_episodes={holdout:g} of {total} episodes leaves {total - num_held} to train on; hold out fewer"
        )
    order = np.random.default_rng(seed).permutation(total)
    return sorted(order[num_held:].tolist()), sorted(order[:num_held].tolist())


@dataclass(frozen=True)
class DecodeAndTransform:
    """From an encoded frame of the stream to a sample for the model."""

    chain: Sequence[Callable[[Sample], Sample]]

    def __call__(self, frame: Encoded) -> Sample:
        return transforms.compose(self.chain)(frame.decode())


class FakeDataset:
    """Random samples of the shapes that a model takes: floats in [-1, 1), tokens below 2048, all masks true.

    Sample i is a function of i only.
    """

    def __init__(self, model_config: BaseModelConfig, num_samples: int = 1024):
        self._spec = model_config.sample_spec()
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        rng = np.random.default_rng(index)
        return unflatten({path: _draw(spec, rng) for path, spec in self._spec.items()})


@dataclass(frozen=True)
class KeepPaddingFlags:
    """Runs `chain`, which drops the padding flags of the actions, and puts them back as `actions_is_pad`."""

    chain: Sequence[Callable[[Sample], Sample]]
    source: str

    def __call__(self, sample: Sample) -> Sample:
        return {**transforms.compose(self.chain)(sample), "actions_is_pad": sample[self.source]}


def expanded(config: Any) -> DataConfig:
    """The data half of a recipe, with its statistics."""
    return config.data.create(config.assets_dirs, config.model)


def _episodes_of(config: Any, data_config: DataConfig, split: Split) -> list[int] | None:
    """None = all. Fake data has no episodes, and so nothing to hold out."""
    check_holdout(config, data_config)
    if split == "all" or not holds_out(config, data_config) or data_config.repo_id in (None, FAKE_REPO_ID):
        return None
    train, held = holdout_split(config, open_metadata(data_config), data_config)
    return train if split == "train" else held


def holds_out(config: Any, data_config: DataConfig) -> bool:
    """Whether a recipe keeps episodes for validation, by number or by name, in any of its datasets."""
    return bool(config.holdout_episodes or any(member.validation_episodes for member in data_config.members))


def holdout_split(config: Any, metadata: LeRobotMetadata, data_config: DataConfig) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to train on, and of those held out.

    Which are held out does not depend on which are excluded: who leaves out a spoilt one keeps the others' roles.

    Raises:
        ValueError: nothing is left of either.
    """
    numbers = [episode.index for episode in metadata.episodes]
    excluded = data_config.selection.excluded(metadata)
    held = _held_out(config, numbers, data_config, metadata.root)
    train = [number for number in numbers if number not in held and number not in excluded]
    validation = [number for number in numbers if number in held and number not in excluded]
    if not train or not validation:
        raise ValueError(
            f"{data_config.selection or 'holding out'} leaves {len(train)} episodes to train on and {len(validation)} "
            f"of those held out ({len(held)} of {len(numbers)}); exclude fewer, or hold out others"
        )
    return train, validation


def _held_out(config: Any, numbers: Sequence[int], data_config: DataConfig, root: Path) -> set[int]:
    """Numbers of the episodes held out, those that are excluded too among them."""
    if not data_config.validation_episodes:
        return {numbers[i] for i in split_episodes(len(numbers), config.holdout_episodes, config.seed)[1]}
    if unknown := sorted(set(data_config.validation_episodes) - set(numbers)):
        raise ValueError(
            f"validation_episodes has {unknown}, and {root} has no such episodes; expected some of its {len(numbers)} "
            f"numbers, {min(numbers)} to {max(numbers)}"
        )
    return set(data_config.validation_episodes)


def check_holdout(config: Any, data_config: DataConfig) -> None:
    """Raises ValueError where episodes cannot be held out, or are in two ways."""
    if config.holdout_episodes and any(member.validation_episodes for member in data_config.members):
        raise ValueError(
            f"holdout_episodes={config.holdout_episodes:g} draws episodes to hold out, and data.validation_episodes "
            "names some; set one of the two"
        )
    if holds_out(config, data_config) and data_config.rlds_data_dir is not None:
        names = list(data_config.validation_episodes)
        field = f"data.validation_episodes={names}" if names else f"holdout_episodes={config.holdout_episodes:g}"
        raise ValueError(
            f"{field}, but data in RLDS form are a stream without a list of episodes to choose from; leave it out"
        )


def _leaves(structure: Any) -> Iterator[str]:
    if isinstance(structure, str):
        yield structure
    else:
        for part in structure.values() if isinstance(structure, Mapping) else structure:
            yield from _leaves(part)


def _check_prompt_survives(data_config: DataConfig) -> None:
    for transform in data_config.repack_transforms.inputs:
        if isinstance(transform, transforms.RepackTransform) and "prompt" not in _leaves(transform.structure):
            raise ValueError(
                "prompt_from_task is set, but the repack transform drops the prompt; add 'prompt': 'prompt' to its "
                "structure, or turn prompt_from_task off"
            )


def _draw(spec: ArraySpec, rng: np.random.Generator) -> Any:
    shape, dtype = spec
    if dtype.kind == "f":
        return rng.uniform(-1, 1, shape).astype(dtype)
    if dtype.kind == "i":
        return rng.integers(0, FAKE_TOKEN_RANGE, shape, dtype=dtype)
    return np.ones(shape, dtype)  # masks: with everything real, a step takes what it takes on data
