"""Whether normalisation statistics can be used: the one set of rules of training, serving, converting and looking.

A file of statistics comes from anywhere: a released checkpoint, LeRobot, a colleague's script. What is wrong in it
shows late: a key under another name leaves values raw, a NaN becomes the last bin of the state, a range of no width
makes numbers of a million out of noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from openpi.shared.errors import closest_name, listed
from openpi.shared.normalize import NormStats, floor_degenerate, is_flat

KEYS = ("state", "actions")
# What other tools call them.
_MEANT = {"action": "actions", "observation.state": "state", "observation/state": "state", "qpos": "state"}
_MAX_NAMED_DIMS = 8
_LARGEST = np.finfo(np.float32).max  # values are normalised in float32, where more is infinite


@dataclasses.dataclass(frozen=True)
class Dims:
    """What is known of the vectors that statistics are of.

    Attributes:
        widths: by key, how many dimensions are in use. Statistics of released bases have more, which pad them to the
            model's width; what those hold does not matter. Of another width, they have to be zero.
        names: by key, of the dimensions.
        padded_width: the model's; None = unknown, and any is taken for it.
    """

    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    padded_width: int | None = None

    def in_use(self, key: str, stats: NormStats) -> np.ndarray:
        """bool[d]; where no width is known, all but trailing zeros, which is how bases are padded."""
        used = self.widths.get(key, _width_without_zeros(stats))
        return np.arange(stats.width) < used

    def is_too_wide(self, key: str, stats: NormStats) -> bool:
        """Whether there are dimensions beyond those in use that are no padding."""
        width = self.widths.get(key)
        if width is None or self.padded_width in (None, stats.width):
            return False
        return _width_without_zeros(stats) > width

    def labels(self, key: str, which: np.ndarray) -> str:
        """Of the dimensions where `which` is true, for messages: `actions/gripper, actions[7]`."""
        known = list(self.names.get(key, ()))
        found = [f"{key}/{known[i]}" if i < len(known) else f"{key}[{i}]" for i in np.flatnonzero(which).tolist()]
        rest = f" and {len(found) - _MAX_NAMED_DIMS} more" if len(found) > _MAX_NAMED_DIMS else ""
        return ", ".join(found[:_MAX_NAMED_DIMS]) + rest


def _width_without_zeros(stats: NormStats) -> int:
    fields = [values for values in (stats.mean, stats.std, stats.q01, stats.q99) if values is not None]
    return int(max(np.flatnonzero(np.any([values != 0 for values in fields], axis=0)), default=-1)) + 1


def check(norm_stats: Mapping[str, NormStats], *, source: str, use_quantiles: bool, dims: Dims | None = None) -> None:
    """Raises ValueError, naming `source` and everything that is wrong, unless the statistics can be used."""
    problems = find_problems(norm_stats, use_quantiles=use_quantiles, dims=dims)
    if problems:
        raise ValueError(
            f"the normalisation statistics in {source} cannot be used: {'; '.join(problems)}. Correct the file, or "
            "compute it anew with `openpi stats`"
        )


def find_problems(norm_stats: Mapping[str, NormStats], *, use_quantiles: bool, dims: Dims | None = None) -> list[str]:
    """Why statistics cannot be used: keys, widths, values that are not finite, ranges that are upside down."""
    dims = dims or Dims()
    return [
        *_key_problems(norm_stats),
        *(problem for key in KEYS if key in norm_stats for problem in _problems(key, norm_stats[key], dims)),
        *_missing_quantiles(norm_stats, use_quantiles),
    ]


def _key_problems(norm_stats: Mapping[str, NormStats]) -> Iterator[str]:
    missing = [key for key in KEYS if key not in norm_stats]
    for key in norm_stats:
        if key not in KEYS:
            meant = _MEANT.get(key) or closest_name(key, missing)
            rename = f"; rename it to '{meant}', if that is what it is of" if meant in missing else "; remove it"
            yield f"'{key}' is not normalised by any recipe: the keys are {listed(KEYS)}{rename}"
    for key in missing:
        yield f"'{key}' is missing, and would be left as it is"


def _problems(key: str, stats: NormStats, dims: Dims) -> Iterator[str]:
    if stats.mean.ndim != 1:
        yield f"'{key}' has values of shape {list(stats.mean.shape)}; expected one list of numbers"
        return
    width = dims.widths.get(key, stats.width)
    if stats.width < width or dims.is_too_wide(key, stats):
        yield f"'{key}' has {stats.width} dimensions; expected {width}: it is of another robot, or of other data"
    used = dims.in_use(key, stats)
    for name in ("mean", "std", "q01", "q99"):
        values = getattr(stats, name)
        if values is not None and (bad := ~(np.abs(values) <= _LARGEST) & (used | (name == "mean"))).any():
            yield f"{name} of {dims.labels(key, bad)} is {values[bad][0]}; expected finite numbers"
    if (negative := used & (stats.std < 0)).any():
        yield f"std of {dims.labels(key, negative)} is {stats.std[negative][0]:.4g}; expected more than 0"
    if stats.q01 is not None and stats.q99 is not None and (upside := used & (stats.q01 > stats.q99)).any():
        low, high = stats.q01[upside][0], stats.q99[upside][0]
        yield f"q01 of {dims.labels(key, upside)} is {low:.4g}, above q99 = {high:.4g}; expected q01 < q99"


def _missing_quantiles(norm_stats: Mapping[str, NormStats], use_quantiles: bool) -> Iterator[str]:
    lacking = [key for key in KEYS if (stats := norm_stats.get(key)) and (stats.q01 is None or stats.q99 is None)]
    if use_quantiles and lacking:
        yield f"{listed(lacking)} has no q01 and q99, and the recipe normalises by quantiles"


def flat(
    norm_stats: Mapping[str, NormStats], *, use_quantiles: bool, dims: Dims | None = None
) -> dict[str, np.ndarray]:
    """By key, bool[d]: dimensions in use whose scale is nothing, so that any motion along them becomes huge."""
    dims = dims or Dims()
    return {
        key: which
        for key, stats in norm_stats.items()
        if (which := dims.in_use(key, stats) & is_flat(stats, use_quantiles=use_quantiles)).any()
    }


def widened(
    norm_stats: Mapping[str, NormStats], *, use_quantiles: bool, dims: Dims | None = None
) -> tuple[dict[str, NormStats], list[str]]:
    """The statistics to train on, with the dimensions that are `flat` widened as when statistics are computed.

    Not for a model that is trained: it has to be run with what it was trained on.

    Returns:
        New statistics, and a message for each widened dimension.
    """
    dims = dims or Dims()
    result, messages = dict(norm_stats), []
    for key, which in flat(norm_stats, use_quantiles=use_quantiles, dims=dims).items():
        names = [dims.labels(key, np.arange(len(which)) == i) for i in range(len(which))]
        result[key], told = floor_degenerate(norm_stats[key], names, among=which, are_commands=key == "actions")
        messages += told
    return result, messages


def first_difference(mine: Mapping[str, NormStats], theirs: Mapping[str, NormStats]) -> str | None:
    """Where two sets of statistics differ, as in `actions q99[2] is 1.5 and 1.25`; None where they do not."""
    for key in (*mine, *(key for key in theirs if key not in mine)):
        if key not in mine or key not in theirs:
            return f"'{key}' is only in one of them"
        for name in ("mean", "std", "q01", "q99"):
            ours, others = getattr(mine[key], name), getattr(theirs[key], name)
            if ours is None or others is None or np.shape(ours) != np.shape(others):
                if ours is not others:
                    return f"{key} {name} is {_text(ours)} and {_text(others)}"
            elif (other := np.flatnonzero((ours != others) & ~(np.isnan(ours) & np.isnan(others)))).size:
                i = other[0]
                return f"{key} {name}[{i}] is {float(ours[i])!r} and {float(others[i])!r}"
    return None


def _text(values: np.ndarray | None) -> str:
    return "not there" if values is None else f"{np.size(values)} numbers"
