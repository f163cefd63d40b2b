"""An action tokenizer (FAST) for a recipe's own actions: `openpi tokenizer fit`."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi import transforms
from openpi.models.fast_codec import FastCodec, fit_codec
from openpi.models.model_config import ModelType
from openpi.training.config import TrainConfig
from openpi.training.data import norm_stats, recipe_data
from openpi.training.data.tabular_frames import frames_of

logger = logging.getLogger(__name__)

_HELD_OUT = 10  # every tenth episode is for measuring only


@dataclass(frozen=True)
class FitReport:
    """How well a codec does on chunks that it was not trained on.

    Attributes:
        path: the processor folder.
        num_chunks: trained on.
        vocab_size: reached; below the asked size when the data holds no more pairs.
        tokens_mean: per chunk.
        tokens_max: of any chunk of the dataset, those trained on included.
        values_per_chunk: numbers that these tokens stand for.
        error: root mean square of the reconstruction, in normalised units.
        share_beyond: of the measured chunks, that go beyond the codec's range.
    """

    path: Path
    num_chunks: int
    vocab_size: int
    tokens_mean: float
    tokens_max: int
    values_per_chunk: int
    error: float
    share_beyond: float


def fit(
    config: TrainConfig, output: Path, *, vocab_size: int = 1024, scale: float = 10, max_frames: int | None = 50_000
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
    if config.model.model_type is not ModelType.PI0_FAST:
        raise ValueError(
            f"the model of recipe '{config.name}' is {config.model.model_type.value}, which takes no action tokenizer; "
            "name a recipe of pi0-FAST (`openpi configs` lists them), or replace its model by a Pi0FASTConfig"
        )
    chunks, episodes = _normalised_chunks(config, max_frames)
    # Whole episodes: the chunks of neighbouring frames are nearly the same. A single one measures itself.
    is_measured = episodes % _HELD_OUT == min(_HELD_OUT - 1, episodes.max())
    trained_on = chunks if is_measured.all() else chunks[~is_measured]
    codec = fit_codec(trained_on, vocab_size=vocab_size, scale=scale)
    report = _measure(codec, chunks, is_measured, output, num_chunks=len(trained_on))
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    codec.save(partial)
    partial.rename(output)
    return report


def _normalised_chunks(config: TrainConfig, max_frames: int | None) -> tuple[np.ndarray, np.ndarray]:
    """float64[n, t, d] chunks, and int[n], the episode of each."""
    data_config = recipe_data.expanded(config)
    if data_config.mixture:
        raise ValueError(
            "an action tokenizer is fitted to one dataset, and the recipe has a mixture; name a recipe of one of its "
            "parts, and give its action_tokenizer_path to the mixture's model"
        )
    data = recipe_data.open_recipe(config, data_config, cameras=False)
    stats = data_config.norm_stats
    if stats is None:
        computed = norm_stats.compute_of(data, config.model.action_horizon, norm_stats.norm_stats_path(config))
        logger.info("normalisation statistics of %d frames written to %s", computed.num_frames, computed.path)
        stats = computed.stats
    ((_, frames),) = frames_of(data, config.model.action_horizon)
    chunks, episodes = norm_stats.action_chunks(frames, max_frames=max_frames)
    to_model = transforms.Normalize({"actions": stats["actions"]}, use_quantiles=data_config.use_quantile_norm)
    return np.asarray(to_model({"actions": chunks})["actions"], np.float64), episodes


def _measure(
    codec: FastCodec, chunks: np.ndarray, is_measured: np.ndarray, path: Path, *, num_chunks: int
) -> FitReport:
    ids = [codec.ids_of(chunk) for chunk in chunks]
    lengths = np.array([len(i) for i in ids])
    rows = np.flatnonzero(is_measured)
    restored = np.stack([codec.decode(ids[row], *chunks.shape[1:]) for row in rows])
    beyond = [codec.error_beyond_rounding(chunks[row], ids[row]) > 0 for row in rows]
    return FitReport(
        path=path,
        num_chunks=num_chunks,
        vocab_size=codec.bpe.get_vocab_size(),
        tokens_mean=float(lengths[rows].mean()),
        tokens_max=int(lengths.max()),
        values_per_chunk=int(np.prod(chunks.shape[1:])),
        error=float(np.sqrt(np.mean((restored - chunks[rows]) ** 2))),
        share_beyond=float(np.mean(beyond)),
    )
