"""The data loader as it was published: batches as `(Observation, actions)`, in arrays of JAX or tensors of PyTorch.

    for observation, actions in create_data_loader(config, num_batches=10): ...

Programs import these names from `openpi.training.data_loader`, where the training loop's own loader is. The order of
samples, the workers and the transforms are the same; only what a batch is made of at the end differs.
Source: the training specification, section 8.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from openpi import transforms
from openpi.data.batch_loader import Batch, BatchLoader, SourceLoader, stack
from openpi.data.batch_order import BatchSource, State
from openpi.data.dataset import Dataset, Sample, TransformedDataset
from openpi.models.model_config import BaseModelConfig
from openpi.models.observation import Observation
from openpi.shared.tree import Tree
from openpi.training import data_loader
from openpi.training.data import recipe_data
from openpi.training.data.batch_arrays import Framework, model_side_placer, placer, process_part
from openpi.training.data.streams import Encoded, open_stream
from openpi.training.data_config import DataConfig
from openpi.training.recipe.adopted import as_recipe

if TYPE_CHECKING:
    from openpi.training.data.batch_arrays import Sharding


# Frames that training uses of DROID 1.0.1, about: the published length of data in RLDS form, whatever they are.
RLDS_LENGTH = 20_000_000

T_co = TypeVar("T_co", covariant=True)


class IterableDataset(Protocol[T_co]):
    """Samples, or batches of them, in an order of their own."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __len__(self) -> int: ...


class DataLoader(Protocol[T_co]):
    """What `create_data_loader` returns."""

    def data_config(self) -> DataConfig:
        """The expanded data half of the recipe, with the statistics in use."""
        ...

    def __iter__(self) -> Iterator[T_co]: ...


class DataLoaderImpl:
    """Batches as `(Observation, actions)`.

    Args:
        batches: model-side dicts with `actions`; what else the model does not take is left out.
    """

    def __init__(self, data_config: DataConfig, batches: Iterable[Batch]) -> None:
        self._data_config = data_config
        self._batches = batches

    def data_config(self) -> DataConfig:
        return self._data_config

    def __iter__(self) -> Iterator[tuple[object, object]]:
        for batch in self._batches:
            yield Observation.from_dict(batch), batch["actions"]


class TorchDataLoader:
    """Batches of a dataset with random access; the name is the published one, PyTorch loads nothing here.

    Args:
        local_batch_size: samples that this process gets.
        sharding: of JAX: where rows of a batch lie; None = split over the devices of this process.
        sampler: indices of samples, in the order in which they are taken, again and again.
        num_batches: of each iteration; None = endless. Without `shuffle` every iteration begins anew; with it, goes on.
        num_workers: processes; 0 = threads of this one.
        framework: what batches are made of.
    Raises:
        ValueError: the dataset is smaller than a batch; (when iterated) a batch holds texts.
    """

    def __init__(
        self,
        dataset: Dataset,
        local_batch_size: int,
        *,
        sharding: Sharding | None = None,
        shuffle: bool = False,
        sampler: Iterable[int] | None = None,
        num_batches: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        framework: Framework = "jax",
    ) -> None:
        loader: SourceLoader
        if sampler is None:
            loader = BatchLoader(
                dataset, batch_size=local_batch_size, seed=seed, shuffle=shuffle, num_workers=num_workers
            )
        else:
            source = _SamplerSource(sampler, local_batch_size)
            loader = SourceLoader(source, dataset.__getitem__, num_workers=num_workers)
        restart = None if shuffle or sampler is not None else loader.restart
        self._batches = _Placed(loader, num_batches, placer(framework, sharding), restart)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class RLDSDataLoader:
    """Batches of `create_rlds_dataset`, transformed or not, as JAX arrays."""

    def __init__(
        self, dataset: Iterable[Batch], *, sharding: Sharding | None = None, num_batches: int | None = None
    ) -> None:
        self._batches = _Placed(dataset, num_batches, placer("jax", sharding))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


class IterableTransformedDataset:
    """An iterable dataset whose samples have passed through `transforms`, in order.

    Args:
        is_batched: the dataset gives batches; transforms see their samples one at a time.
    """

    def __init__(
        self,
        dataset: Iterable[Sample],
        transforms: Sequence[Callable[[Sample], Sample]],
        *,
        is_batched: bool = False,
    ) -> None:
        self._dataset = dataset
        self._transforms = tuple(transforms)
        self._is_batched = is_batched

    def __len__(self) -> int:
        return len(cast(Sized, self._dataset))

    def __iter__(self) -> Iterator[Sample]:
        chain = transforms.compose(self._transforms)
        for sample in self._dataset:
            yield stack([chain(each) for each in _unstack(sample)]) if self._is_batched else chain(sample)


def create_data_loader(
    config: object,
    *,
    sharding: Sharding | None = None,
    shuffle: bool = False,
    num_batches: int | None = None,
    skip_norm_stats: bool = False,
    framework: Framework = "jax",
) -> DataLoaderImpl:
    """The loader of a recipe: `(Observation, actions)`, images as f32 in [-1, 1].

    Args:
        config: a `TrainConfig`, or a copy of it; `batch_size` is that of all processes together.
        sharding: of JAX: where rows of a batch lie; None = split over all devices.
        num_batches: of each iteration; None = endless.
        skip_norm_stats: feed un-normalized values.
        framework: `jax`, or `pytorch`, whose images have their channels first.
    Raises:
        ValueError, FileNotFoundError, KeyError: see `data_loader.create_batch_loader`.
    """
    place = model_side_placer(framework, sharding)
    recipe = as_recipe(config)
    data = recipe_data.open_recipe(recipe)
    loader = data_loader.create_batch_loader(
        recipe,
        shuffle=shuffle,
        skip_norm_stats=skip_norm_stats,
        part=process_part(framework),
        data=data,
    )
    placed = _Placed(loader, num_batches, place, None if shuffle else loader.restart)
    return DataLoaderImpl(data.config, placed)


def create_torch_data_loader(
    data_config: DataConfig,
    model_config: BaseModelConfig,
    action_horizon: int,
    batch_size: int,
    *,
    sharding: Sharding | None = None,
    skip_norm_stats: bool = False,
    shuffle: bool = False,
    num_batches: int | None = None,
    num_workers: int = 0,
    seed: int = 0,
    framework: Framework = "jax",
) -> DataLoaderImpl:
    """As `create_data_loader`, from the parts of a recipe, for a dataset with random access."""
    dataset = create_torch_dataset(data_config, action_horizon, model_config)
    loader = BatchLoader(
        transform_dataset(dataset, data_config, skip_norm_stats=skip_norm_stats),
        batch_size=batch_size,
        seed=seed,
        shuffle=shuffle,
        num_workers=num_workers,
        part=process_part(framework),
    )
    place = model_side_placer(framework, sharding)
    return DataLoaderImpl(data_config, _Placed(loader, num_batches, place, None if shuffle else loader.restart))


def create_rlds_data_loader(
    data_config: DataConfig,
    action_horizon: int,
    batch_size: int,
    *,
    sharding: Sharding | None = None,
    skip_norm_stats: bool = False,
    shuffle: bool = False,
    num_batches: int | None = None,
    framework: Framework = "jax",
) -> DataLoaderImpl:
    """As `create_data_loader`, from the parts of a recipe, for data in RLDS form."""
    dataset = create_rlds_dataset(data_config, action_horizon, batch_size, shuffle=shuffle)
    batches = transform_iterable_dataset(dataset, data_config, skip_norm_stats=skip_norm_stats, is_batched=True)
    return DataLoaderImpl(data_config, _Placed(batches, num_batches, model_side_placer(framework, sharding)))


def create_torch_dataset(data_config: DataConfig, action_horizon: int, model_config: BaseModelConfig) -> Dataset:
    """The samples of a recipe after `data_loader.dataset_transforms`, before any other transform.

    Raises:
        ValueError: the recipe names no dataset, or one in RLDS form.
    """
    if data_config.rlds_data_dir is not None:
        raise ValueError(
            f"the recipe reads data in RLDS form ({data_config.rlds_data_dir}), which have no random access; use "
            "create_rlds_dataset"
        )
    if data_config.mixture:
        raise ValueError(
            "the recipe has a mixture of datasets, each with transforms of its own; use create_data_loader"
        )
    of_horizon = dataclasses.replace(model_config, action_horizon=action_horizon)
    dataset = cast(Dataset, recipe_data.create_dataset(data_config, of_horizon))
    first = data_loader.dataset_transforms(data_config, dataset)
    return TransformedDataset(dataset, first) if first else dataset


def create_rlds_dataset(
    data_config: DataConfig, action_horizon: int, batch_size: int, *, shuffle: bool = False
) -> IterableDataset[Batch]:
    """Batches of the frames of a recipe's mixture, without end, before any transform.

    Raises:
        ValueError: the recipe reads no data in RLDS form.
    """
    if data_config.stream_format is None:
        raise ValueError(f"the recipe reads no data in RLDS form ({data_config.repo_id}); use create_torch_dataset")
    stream = open_stream(data_config, action_horizon)
    return _Frames(stream.batches(batch_size=batch_size, seed=0, shuffle=shuffle))


def transform_dataset(dataset: Dataset, data_config: DataConfig, *, skip_norm_stats: bool = False) -> Dataset:
    """A dataset of `create_torch_dataset` with everything that follows, up to what the model takes.

    Raises:
        ValueError: statistics are missing.
    """
    return TransformedDataset(dataset, _after_the_prompt(data_config, skip_norm_stats))


def transform_iterable_dataset(
    dataset: Iterable[Sample], data_config: DataConfig, *, skip_norm_stats: bool = False, is_batched: bool = False
) -> IterableTransformedDataset:
    """As `transform_dataset`, of a dataset of `create_rlds_dataset`."""
    return IterableTransformedDataset(dataset, _after_the_prompt(data_config, skip_norm_stats), is_batched=is_batched)


def _after_the_prompt(data_config: DataConfig, skip_norm_stats: bool) -> Sequence[Callable[[Sample], Sample]]:
    is_fake = data_config.repo_id == recipe_data.FAKE_REPO_ID
    return () if is_fake else data_loader.model_side_transforms(data_config, skip_norm_stats=skip_norm_stats)


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Iterations over batches, `num_batches` each, as arrays of a framework.

    Attributes:
        restart: makes the next iteration begin with the first batch; None = they go on, or begin anew by themselves.
    """

    batches: Iterable[Batch]
    num_batches: int | None
    place: Callable[[Batch], Batch]
    restart: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self.restart is not None:
            self.restart()
        return map(self.place, itertools.islice(self.batches, self.num_batches))


@dataclasses.dataclass(frozen=True)
class _Frames:
    """Decoded batches of a stream; each iteration begins anew."""

    source: BatchSource

    def __len__(self) -> int:
        return RLDS_LENGTH

    def __iter__(self) -> Iterator[Batch]:
        return iter(SourceLoader(self.source, _decoded))


def _decoded(item: Encoded) -> Sample:
    return item.decode()


class _SamplerSource:
    """Batches of indices that a sampler gives; the last ones of a round that fill no batch are left out."""

    def __init__(self, sampler: Iterable[int], batch_size: int) -> None:
        self.identity: Mapping[str, Any] = {}
        self._sampler = sampler
        self._batch_size = batch_size

    def start(self) -> State:
        return {"next_batch": 0}

    def start_after(self, state: Mapping[str, object]) -> State:
        return self.start()  # the sampler has its own order

    def describe(self, item: int) -> str:
        return f"sample {item}"

    def batches(self, state: Tree) -> Generator[tuple[Sequence[int], State], None, None]:
        number = int(state["next_batch"])
        while True:
            indices = [int(index) for index in self._sampler]
            if len(indices) < self._batch_size:
                raise ValueError(f"the sampler gives {len(indices)} samples, fewer than a batch of {self._batch_size}")
            for begin in range(0, len(indices) - self._batch_size + 1, self._batch_size):
                number += 1
                yield indices[begin : begin + self._batch_size], {"next_batch": number}


def _unstack(batch: Mapping[str, object]) -> Iterator[Sample]:
    """Inverse of `stack`."""
    flat = transforms.flatten_dict(batch)
    for row in range(len(next(iter(flat.values())))):
        yield transforms.unflatten_dict({key: value[row] for key, value in flat.items()})
