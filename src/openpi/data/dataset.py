"""What a dataset is to the rest of the project: a length and samples by index."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

Sample: TypeAlias = dict[str, Any]
"""One time step: a possibly nested dict of NumPy arrays and strings, without a batch axis."""


@runtime_checkable
class Dataset(Protocol):
    """Random access to samples. `dataset[i]` returns a new sample each time; the caller owns it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class TransformedDataset:
    """A dataset whose samples have passed through `transforms`, in order.

    An error of a sample has a note with its place, where the dataset knows it (`place_of`).
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[Callable[[Sample], Sample]]):
        self._dataset = dataset
        self._transforms = tuple(transforms)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Sample:
        try:
            sample = self._dataset[index]
            for transform in self._transforms:
                sample = transform(sample)
        except Exception as error:
            if (place_of := getattr(self._dataset, "place_of", None)) is not None:
                error.add_note(place_of(index))
            raise
        return sample
