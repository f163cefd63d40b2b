"""A recipe's data, expanded and opened once: who needs them is handed `RecipeData`.

    data = recipe_data.open_recipe(config)      the only call of `create`, and the only opening, when training starts
    for member, dataset in data.members: ...    of a mixture several

Source: the training specification, sections 3 and 8. No JAX here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from openpi import transforms
from openpi.data.dataset import Dataset, Sample
from openpi.data.lerobot.home import locate_dataset
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.models.model_config import ArraySpec, BaseModelConfig
from openpi.shared.errors import missing_key
from openpi.shared.normalize import NormStats
from openpi.shared.tree import unflatten
from openpi.training.config import TrainConfig
from openpi.training.data.streams import Stream, open_stream
from openpi.training.data_config import DataConfig

FAKE_REPO_ID = "fake"
FAKE_TOKEN_RANGE = 2048


@dataclass(frozen=True)
class RecipeData:
    """Attributes:
    config: the data half of the recipe, expanded.
    datasets: of its members, one each: samples before any transform, of all episodes that are not excluded.
    """

    config: DataConfig
    datasets: tuple[Dataset | Stream, ...]

    @property
    def members(self) -> tuple[tuple[DataConfig, Dataset | Stream], ...]:
        """Each dataset with what the recipe says of it."""
        return tuple(zip(self.config.members, self.datasets, strict=True))

    def with_stats(self, stats: Sequence[dict[str, NormStats] | None]) -> RecipeData:
        """With other statistics, one set for each member."""
        parts = [
            replace(part, config=replace(part.config, norm_stats=own))
            for part, own in zip(self.config.mixture, stats if self.config.mixture else (), strict=True)
        ]
        return replace(self, config=replace(self.config, norm_stats=stats[0], mixture=tuple(parts)))


def open_recipe(config: TrainConfig, data_config: DataConfig | None = None, *, cameras: bool = True) -> RecipeData:
    """Opens what a `TrainConfig` reads.

    Args:
        data_config: its data half, where it is expanded already.
        cameras: whether samples have pictures; without, no file of theirs is opened.
    Raises:
        ImportError, ValueError, FileNotFoundError, KeyError: as `create_dataset`, of any member.
    """
    data_config = expanded(config) if data_config is None else data_config
    datasets = tuple(create_dataset(member, config.model, cameras=cameras) for member in data_config.members)
    return RecipeData(data_config, datasets)


def expanded(config: TrainConfig) -> DataConfig:
    """The data half of a recipe, with its statistics."""
    return config.data.create(config.assets_dirs, config.model)


def with_dataset(config: TrainConfig, dataset: str | None) -> TrainConfig:
    """The recipe on another dataset, with the statistics it had before, if it had any, and without the episodes that it
    names, which are those of its own.
    """
    if dataset is None:
        return config
    assets = replace(config.data.assets, asset_id=config.data.asset_id)
    data = replace(config.data, repo_id=dataset, assets=assets)
    if not are_same(config.data.repo_id, dataset):
        none: dict[str, Any] = {"exclude_episodes": (), "exclude_findings": None, "validation_episodes": ()}
        base = data.base_config and replace(data.base_config, **none)
        data = replace(data, base_config=base, **none)
    return replace(config, data=data)


def are_same(dataset: str | None, other: str) -> bool:
    """Whether two names are of one folder, or where one of them is not here, the same word."""
    try:
        first, second = (locate_dataset(name or "", may_download=False).resolve() for name in (dataset, other))
    except (OSError, ValueError):  # one of them is not here
        return dataset == other
    return first == second


def create_dataset(
    data_config: DataConfig,
    model_config: BaseModelConfig,
    episodes: Sequence[int] | None = None,
    *,
    cameras: bool = True,
) -> Dataset | Stream:
    """The samples of a recipe before any transform; of a mixture, those of its first dataset.

    Cameras that the repack transform does not mention are not decoded. Data in RLDS form have no random access, only
    an order.

    Args:
        episodes: numbers of the episodes to read; None = all but those that the recipe excludes. Not for data in
            RLDS form.
        cameras: whether samples have pictures. Not for data in RLDS form.
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
        columns=_columns_read(data_config, metadata, cameras=cameras),
        metadata=metadata,
    )
    dataset.check_finite()
    return dataset


def open_lerobot(
    data_config: DataConfig, model_config: BaseModelConfig, episodes: Sequence[int] | None = None
) -> LeRobotDataset:
    """`create_dataset` for who needs frames by number of episode.

    Raises:
        ValueError: it is in another form; or as `create_dataset`.
    """
    dataset = create_dataset(data_config, model_config, episodes)
    if not isinstance(dataset, LeRobotDataset):
        raise ValueError(f"{data_config.dataset_name} is not a dataset in LeRobot form, which has frames by number")
    return dataset


def _columns_read(data_config: DataConfig, metadata: LeRobotMetadata, *, cameras: bool) -> list[str] | None:
    """None = all."""
    read = features_read(data_config, metadata)
    if cameras:
        return read
    wanted = {*metadata.column_keys} if read is None else {*read, *data_config.action_sequence_keys}
    return [key for key in (*metadata.column_keys, *metadata.annotation_keys) if key in wanted]


def kept_episodes(data_config: DataConfig, metadata: LeRobotMetadata) -> list[int] | None:
    """Numbers of the episodes that the recipe does not exclude; None = it excludes none.

    Raises:
        ValueError: it excludes all; or as `Selection.excluded`.
    """
    return data_config.selection.kept(metadata) if data_config.selection else None


def sources(data_config: DataConfig, names: Collection[str]) -> dict[str, str]:
    """Which column each key of the robot is taken from, by the repack transform; without one, that of its name."""
    repacks = [step for step in data_config.repack_transforms.inputs if isinstance(step, transforms.RepackTransform)]
    return transforms.flatten_dict(repacks[-1].structure) if repacks else {name: name for name in names}


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
    paths = set(leaves(first.structure))
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


def leaves(structure: Any) -> Iterator[str]:
    """Names of features in the structure of a repack transform."""
    if isinstance(structure, str):
        yield structure
    else:
        for part in structure.values() if isinstance(structure, Mapping) else structure:
            yield from leaves(part)


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


def _draw(spec: ArraySpec, rng: np.random.Generator) -> object:
    shape, dtype = spec
    if dtype.kind == "f":
        return rng.uniform(-1, 1, shape).astype(dtype)
    if dtype.kind == "i":
        return rng.integers(0, FAKE_TOKEN_RANGE, shape, dtype=dtype)
    return np.ones(shape, dtype)  # masks: with everything real, a step takes what it takes on data
