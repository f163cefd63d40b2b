"""An action tokenizer (FAST) for a recipe's own actions: `openpi tokenizer fit`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpi import transforms
from openpi.models.fast_codec import FastCodec, fit_codec
from openpi.shared import normalize
from openpi.training import norm_stats
from openpi.training.norm_stats import TabularFrames

_HELD_OUT = 10  # every tenth chunk is for measuring only
_MAX_MEASURED = 1000


@dataclass(frozen=True)
class FitReport:
    """How well a codec does on chunks that it was not trained on.

    Attributes:
        path: the processor folder.
        num_chunks: trained on.
        vocab_size: reached; below the asked size when the data holds no more pairs.
        tokens_mean, tokens_max: per chunk.
        values_per_chunk: numbers that these tokens stand for.
        error: root mean square of the reconstruction, in normalised units.
    """

    path: Path
    num_chunks: int
    vocab_size: int
    tokens_mean: float
    tokens_max: int
    values_per_chunk: int
    error: float


def fit(
    config: Any, output: Path, *, vocab_size: int = 1024, scale: float = 10, max_frames: int | None = 50_000
) -> FitReport:
    """Trains a codec on the normalised chunks of a recipe's dataset and writes its processor folder.

    The statistics are the recipe's; they are computed first if there are none.

    Args:
        config: a `TrainConfig`.
        output: folder, which must not exist.
        max_frames: train on the chunks of so many frames, drawn from the whole dataset; None = all.
    Raises:
        FileExistsError: `output` is there.
        ValueError, KeyError, FileNotFoundError: the recipe or its data do not fit; see `fit_codec`.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another --output, or move it away")
    chunks = _normalised_chunks(config, max_frames)
    is_held_out = np.arange(len(chunks)) % _HELD_OUT == _HELD_OUT - 1
    measured = _spread(chunks[is_held_out] if is_held_out.any() else chunks)
    codec = fit_codec(chunks[~is_held_out], vocab_size=vocab_size, scale=scale)
    report = _measure(codec, measured, output, num_chunks=int((~is_held_out).sum()))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    codec.save(partial)
    partial.rename(output)
    return report


def _spread(chunks: np.ndarray) -> np.ndarray:
    """At most `_MAX_MEASURED` of them, from all over the dataset."""
    return chunks[:: -(-len(chunks) // _MAX_MEASURED)]


def _normalised_chunks(config: Any, max_frames: int | None) -> np.ndarray:
    """float64[n, t, d]"""
    data_config = config.data.create(config.assets_dirs, config.model)
    if data_config.norm_stats is None:
        norm_stats.compute(config)
        data_config = config.data.create(config.assets_dirs, config.model)
    stats: dict[str, normalize.NormStats] = data_config.norm_stats
    chunks = norm_stats.action_chunks(TabularFrames(data_config, config.model), max_frames=max_frames)
    to_model = transforms.Normalize({"actions": stats["actions"]}, use_quantiles=data_config.use_quantile_norm)
    return np.asarray(to_model({"actions": chunks})["actions"], np.float64)


def _measure(codec: FastCodec, chunks: np.ndarray, path: Path, *, num_chunks: int) -> FitReport:
    ids = [codec.encode(chunk) for chunk in chunks]
    restored = np.stack([codec.decode(i, *chunks.shape[1:]) for i in ids])
    lengths = [len(i) for i in ids]
    return FitReport(
        path=path,
        num_chunks=num_chunks,
        vocab_size=codec.bpe.get_vocab_size(),
        tokens_mean=float(np.mean(lengths)),
        tokens_max=max(lengths),
        values_per_chunk=int(np.prod(chunks.shape[1:])),
        error=float(np.sqrt(np.mean((restored - chunks) ** 2))),
    )
