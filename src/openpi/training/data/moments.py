"""Frames of a recipe's dataset as its robot would have sent them, and what was done then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.policies.hold import hold_transforms
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.training import data_loader
from openpi.training.config import TrainConfig
from openpi.training.data import holdout, recipe_data, tabular_frames
from openpi.training.data_config import DataConfig


@dataclasses.dataclass(frozen=True)
class Moment:
    """One frame.

    Attributes:
        episode: its number in the dataset.
        step: of the episode.
        observation: what the robot would have sent, un-batched.
        state: float[s], as the recipe's statistics see it.
        recorded: float[ah w], the actions from this frame on in the robot's units; the last repeats past the end.
        num_recorded: rows of them that are within the episode.
        hold: float[ah w], standing still; None where the recipe's robot does not say how.
    """

    episode: int
    step: int
    observation: transforms.DataDict
    state: np.ndarray
    recorded: np.ndarray
    num_recorded: int
    hold: np.ndarray | None


class Moments:
    """Of some episodes, in their order.

    Attributes:
        lengths: frames by the number of the episode.
    """

    def __init__(
        self,
        config: TrainConfig,
        data_config: DataConfig,
        episodes: Sequence[int],
        dataset: LeRobotDataset | None = None,
    ) -> None:
        """
        Args:
            data_config: the recipe's data half with the statistics of the checkpoint.
            dataset: the recipe's, where it is open already.
        Raises:
            ValueError: no LeRobot dataset, no such episode, or no statistics.
            FileNotFoundError, KeyError: the dataset is missing, or lacks what the recipe reads.
        """
        if dataset is None:
            dataset = recipe_data.open_lerobot(data_config, config.model, episodes)
        else:
            dataset = dataset.select(episodes)
        self._dataset = dataset
        self._is_pad = f"{data_config.action_sequence_keys[0]}_is_pad"
        first = data_loader.dataset_transforms(data_config, dataset)
        self._to_observation = transforms.compose((*first, *data_config.repack_transforms.inputs))
        self._to_stats = transforms.compose(data_config.data_transforms.inputs)
        # As wide as the model has them: so are the statistics of released bases, whatever the robot.
        self._normalize = transforms.compose(
            (
                transforms.Normalize(data_config.norm_stats, use_quantiles=data_config.use_quantile_norm),
                transforms.PadStatesAndActions(config.model.action_dim),
            )
        )
        self._to_robot = data_loader.back_to_robot(data_config, is_sampled=False)
        self._hold = _hold_or_none(data_config, config.model.action_horizon)
        self._starts = {
            episode.index: int(begin)
            for episode, (begin, _) in zip(dataset.episodes, dataset.episode_bounds, strict=True)
        }
        lengths = np.diff(dataset.episode_bounds, axis=1)[:, 0]
        self.lengths = {number: int(length) for number, length in zip(self._starts, lengths, strict=True)}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Texts of all tasks of the dataset."""
        return tuple(self._dataset.metadata.tasks.values())

    @property
    def dataset(self) -> LeRobotDataset:
        """The episodes, as training reads them."""
        return self._dataset

    def sample(self, episode: int, step: int) -> Sample:
        """A frame before any transform."""
        return self._dataset[self._starts[episode] + step]

    def at(self, episode: int, step: int) -> Moment:
        sample = self.sample(episode, step)
        observation = self._to_observation(sample)
        raw = self._to_stats({**observation})
        made = self._normalize({key: np.asarray(raw[key]) for key in ("state", "actions")})
        hold = None if self._hold is None else np.asarray(self._hold({"state": made["state"]})["actions"], np.float64)
        recorded = np.asarray(self._to_robot(made["state"], made["actions"]), np.float64)
        inside = int(np.sum(~np.asarray(sample[self._is_pad])))
        sent = {key: value for key, value in observation.items() if key != "actions" and not key.endswith("_is_pad")}
        return Moment(episode, step, sent, np.asarray(raw["state"], np.float64), recorded, inside, hold)


def others(
    config: TrainConfig, data_config: DataConfig, episodes: Sequence[int], max_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """Frames of all episodes but some: float[n s] states as the statistics see them, float[n ah w] actions of the
    robot. No image is read; none where no episode is left.
    """
    metadata = recipe_data.open_metadata(data_config)
    excluded = sorted({*data_config.selection.excluded(metadata), *episodes})
    if len(excluded) >= len(metadata.episodes):
        return np.zeros((0, 1)), np.zeros((0, config.model.action_horizon, 1))
    frames = tabular_frames.open_frames(
        dataclasses.replace(data_config, exclude_episodes=tuple(excluded)), config.model
    )
    to_robot = transforms.compose(data_config.data_transforms.outputs)
    states, actions = [], []
    for made in _evaluated(frames, max_frames):
        states.append(made["state"])
        actions.append(np.asarray(to_robot(made)["actions"]))
    return np.array(states, np.float64), np.array(actions, np.float64)


def chosen(
    config: TrainConfig, data_config: DataConfig, wanted: Sequence[int] | None, at_most: int
) -> tuple[list[int], bool]:
    """Numbers of episodes to look at, and whether the recipe's training leaves them out.

    Args:
        wanted: by whoever asks; None = those that are held out, else some of all, evenly spread.
    Raises:
        ValueError: the dataset has no such episode.
    """
    metadata = recipe_data.open_metadata(data_config)
    numbers = [episode.index for episode in metadata.episodes]
    if unknown := sorted(set(wanted or ()) - set(numbers)):
        raise ValueError(
            f"episodes {unknown} are not in {metadata.root}, which has {len(numbers)}: {min(numbers)} to {max(numbers)}"
        )
    train, held = holdout.holdout_split(config, metadata, data_config)
    found = list(wanted) if wanted else evenly_spaced(held or numbers, at_most)
    return found, set(found).isdisjoint(train)


def _evaluated(frames: tabular_frames.Frames, max_frames: int) -> Iterator[dict[str, np.ndarray]]:
    for _, blocks in frames.parts(max_frames):
        for block in blocks:
            yield from (frames.evaluate(block.alone(row)) for row in range(len(block)))


def _hold_or_none(data_config: DataConfig, horizon: int) -> transforms.DataTransformFn | None:
    try:
        return transforms.compose(hold_transforms(data_config, horizon))
    except ValueError:  # the robot does not say how it stands still
        return None
