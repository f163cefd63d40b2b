"""Positronic's raw recordings: every signal at its own rate, in one folder per episode."""

from openpi_positronic.raw_episodes.dataset import RawDataset
from openpi_positronic.raw_episodes.episode import Episode
from openpi_positronic.raw_episodes.writer import EpisodeWriter, RawDatasetWriter

__all__ = ["Episode", "EpisodeWriter", "RawDataset", "RawDatasetWriter"]
