"""What a recipe reads from elsewhere: weights, statistics, tokenizers, the dataset; by URL, without fetching any."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from openpi.models.fast_codec import codec_urls
from openpi.models.tokenizer import PALIGEMMA_TOKENIZER_URL
from openpi.training.config import TrainConfig
from openpi.training.data_config import ModelTransformFactory

Kind = Literal["weights", "statistics", "tokenizer", "frame ranges", "dataset", "checkpoint", "files"]


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One file or folder; a dataset's URL is `hf://datasets/<user>/<name>`."""

    kind: Kind
    url: str


def requirements(config: TrainConfig) -> list[Requirement]:
    """What training the recipe takes that does not lie on this machine by its nature."""
    found = [Requirement("weights", url) for url in _urls(config.weight_loader)]
    for data in config.data.with_own_statistics:
        statistics = data.stats_dir(config.assets_dirs)
        if statistics is not None and "://" in statistics:
            found.append(Requirement("statistics", statistics))
    found += tokenizers(config)
    for dataset in getattr(config.data, "datasets", ()):
        found += [Requirement("frame ranges", url) for url in _urls(dataset)]
    for data in config.data.members:
        if (name := data.repo_id) is not None and _is_hub_name(name) and not hasattr(data, "rlds_data_dir"):
            found.append(Requirement("dataset", f"hf://datasets/{name}"))
    return found


def tokenizers(config: TrainConfig) -> list[Requirement]:
    """What the recipe needs besides a checkpoint, to serve it."""
    model: Any = config.model
    urls = [PALIGEMMA_TOKENIZER_URL] if getattr(model, "tokenizer_path", None) is None else []
    for transform in ModelTransformFactory()(model).inputs:
        path = getattr(getattr(transform, "tokenizer", None), "fast_tokenizer_path", None)
        if path is not None:
            urls += codec_urls(path)
    return [Requirement("tokenizer", url) for url in urls]


def _urls(value: object) -> Iterator[str]:
    """Of a dataclass's own fields; loaders of users are read too."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            text = getattr(value, field.name)
            if isinstance(text, str) and "://" in text:
                yield text


def _is_hub_name(repo_id: str) -> bool:
    is_folder = repo_id.startswith(("/", ".", "~")) or Path(repo_id).is_dir()
    return "/" in repo_id and not is_folder
