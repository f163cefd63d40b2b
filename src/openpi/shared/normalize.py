"""Statistics that bring states and actions to unit scale: their file, and how they are computed.

Exact in one pass: mean and deviation by merging centred moments in float64 (Chan, Golub, LeVeque 1983),
quantiles by counting distinct values. Source: the training specification, section 5.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.shared import strict_json, whole_file

STATS_FILE = "norm_stats.json"

_NAMED = 8  # of many dimensions in a message


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Statistics of one vector-valued key, float64[d] each.

    Attributes:
        mean, std: std is the population's.
        q01, q99: 1st and 99th percentile; None in old files.
        min, max: of the data, where it is at hand; not stored in the file.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None
    min: np.ndarray | None = None
    max: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, np.asarray(value, dtype=np.float64))
        shapes = {f.name: v.shape for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"normalisation statistics differ in shape: {shapes}; expected one width")

    @property
    def width(self) -> int:
        """Number of dimensions."""
        return self.mean.shape[-1] if self.mean.ndim else 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NormStats):
            return NotImplemented
        return all(
            _as_list(getattr(self, name)) == _as_list(getattr(other, name)) for name in ("mean", "std", "q01", "q99")
        )

    __hash__ = None  # type: ignore[assignment]  # holds arrays


class RunningStats:
    """Mean, deviation, range and quantiles of a stream of vectors, in one pass and mergeable.

    The result does not depend on how the stream is cut into batches (up to the last float64 bits of mean and
    std). Quantiles are exact while each dimension has at most `max_distinct` distinct values. Beyond that its
    values are cut, towards zero, to the longest mantissa of b bits with which they fit: a quantile is then
    off by at most 2^-b of itself. A billion normally distributed values leave b = 12, that is 0.03 %.
    """

    # Vectors are collected up to this number before they are sorted, which is what costs.
    _BUFFERED = 1 << 16

    def __init__(self, *, max_distinct: int = 1 << 18) -> None:
        self.count = 0
        self._max_distinct = max_distinct
        self._mean = self._sum_of_squares = np.zeros(0)
        self._counters: list[_ValueCounter] = []
        self._buffer: list[np.ndarray] = []

    @property
    def num_dims(self) -> int:
        """Width of the vectors; 0 before the first."""
        return len(self._counters)

    def update(self, batch: np.ndarray) -> None:
        """Adds vectors.

        Args:
            batch: numbers [..., d]; the leading axes are all counted.
        Raises:
            ValueError: another width than before, or a value that is not finite.
        """
        vectors = np.asarray(batch, dtype=np.float64)
        vectors = vectors.reshape(-1, vectors.shape[-1]) if vectors.ndim else vectors.reshape(1, 1)
        if not len(vectors):
            return
        self._check_width(vectors.shape[1])
        if not np.isfinite(vectors).all():
            bad = np.flatnonzero(~np.isfinite(vectors).all(axis=0)).tolist()
            raise ValueError(f"NaN or infinity in dimensions {bad}; expected finite numbers. Repair the dataset")
        mean = vectors.mean(axis=0)
        self._add_moments(len(vectors), mean, np.square(vectors - mean).sum(axis=0))
        self._buffer.append(vectors.copy() if vectors.base is not None else vectors)
        if sum(map(len, self._buffer)) >= self._BUFFERED:
            self._flush()

    def merge(self, other: RunningStats) -> None:
        """Adds all that `other` has seen; for statistics computed in parts.

        Raises:
            ValueError: another width.
        """
        if not other.count:
            return
        self._check_width(other.num_dims)
        self._flush()
        other._flush()
        self._add_moments(other.count, other._mean, other._sum_of_squares)
        for mine, theirs in zip(self._counters, other._counters, strict=True):
            mine.merge(theirs)

    def repeated(self, times: int) -> RunningStats:
        """As if all had been seen so many times; for mixtures. A new object."""
        self._flush()
        copy = RunningStats(max_distinct=self._max_distinct)
        copy.count = self.count * times
        copy._mean, copy._sum_of_squares = self._mean, self._sum_of_squares * times
        copy._counters = [counter.repeated(times) for counter in self._counters]
        return copy

    def get_statistics(self) -> NormStats:
        """The statistics so far; unaltered, see `floor_degenerate`.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"statistics need at least 2 vectors, got {self.count}; the dataset is (nearly) empty")
        self._flush()
        return NormStats(
            mean=self._mean,
            std=np.sqrt(self._sum_of_squares / self.count),
            q01=np.array([counter.quantile(0.01) for counter in self._counters]),
            q99=np.array([counter.quantile(0.99) for counter in self._counters]),
            min=np.array([counter.min for counter in self._counters]),
            max=np.array([counter.max for counter in self._counters]),
        )

    def _check_width(self, width: int) -> None:
        if not self._counters:
            self._mean = self._sum_of_squares = np.zeros(width)
            self._counters = [_ValueCounter(self._max_distinct) for _ in range(width)]
        elif width != self.num_dims:
            raise ValueError(f"got vectors of width {width} after vectors of width {self.num_dims}")

    def _add_moments(self, count: int, mean: np.ndarray, sum_of_squares: np.ndarray) -> None:
        total = self.count + count
        shift = mean - self._mean
        self._mean = self._mean + shift * (count / total)
        self._sum_of_squares = self._sum_of_squares + sum_of_squares + np.square(shift) * (self.count * count / total)
        self.count = total

    def _flush(self) -> None:
        if self._buffer:
            columns = np.concatenate(self._buffer).T
            self._buffer = []
            for counter, column in zip(self._counters, columns, strict=True):
                counter.add(column)


class _ValueCounter:
    """How often each value occurred; values lose mantissa bits when there are too many different ones."""

    def __init__(self, max_distinct: int) -> None:
        self._max_distinct = max_distinct
        self._values = np.zeros(0)  # sorted, distinct
        self._counts = np.zeros(0, dtype=np.int64)
        self._mantissa_bits = 52
        self.min, self.max = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self.min, self.max = min(self.min, values.min()), max(self.max, values.max())
        self._add_counts(*np.unique(values + 0.0, return_counts=True))  # -0.0 becomes 0.0

    def merge(self, other: _ValueCounter) -> None:
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        self._mantissa_bits = min(self._mantissa_bits, other._mantissa_bits)
        self._add_counts(other._values, other._counts)

    def repeated(self, times: int) -> _ValueCounter:
        copy = _ValueCounter(self._max_distinct)
        copy.merge(self)
        copy._counts = copy._counts * times
        return copy

    def quantile(self, q: float) -> float:
        """The smallest value such that at least the fraction `q` of all values is not greater."""
        cumulative = np.cumsum(self._counts)
        return float(self._values[np.searchsorted(cumulative, q * cumulative[-1], side="left")])

    def _add_counts(self, values: np.ndarray, counts: np.ndarray) -> None:
        values, counts = np.concatenate([self._values, values]), np.concatenate([self._counts, counts])
        order = np.argsort(values, kind="stable")
        self._values, self._counts = _sum_equal(_cut(values[order], self._mantissa_bits), counts[order])
        while len(self._values) > self._max_distinct and self._mantissa_bits:
            self._mantissa_bits -= 1
            self._values, self._counts = _sum_equal(_cut(self._values, self._mantissa_bits), self._counts)


def _cut(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    """Values with fewer mantissa bits, towards zero: order stays, and a further cut forgets the first."""
    low_bits = np.uint64((1 << (52 - mantissa_bits)) - 1)
    return (np.ascontiguousarray(values).view(np.uint64) & ~low_bits).view(np.float64) + 0.0


def _sum_equal(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a sorted array, and the sums of their counts."""
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return values[starts], np.add.reduceat(counts, starts)


# Training values beyond this many units make the loss diverge; ordinary outliers stay below 20.
MAX_NORMALIZED = 50.0


def floor_degenerate(
    stats: NormStats,
    names: Sequence[str] | None = None,
    *,
    among: np.ndarray | None = None,
    are_commands: bool = False,
) -> tuple[NormStats, list[str]]:
    """Widens the scale of dimensions on which normalised values would explode, and says which.

    - Constant (std below 1e-6 or float32 resolution): std becomes 1 and the quantiles mean -+ 1, so the
      constant maps to 0 and deviations from it keep their size. Of commands, a thousandth instead of 1: a robot would
      move by what a model is off, along what nobody has ever moved.
    - Used so rarely that q01 = q99: the quantiles become the smallest and largest value.
    - Otherwise, where a training value would normalise beyond +-`MAX_NORMALIZED`: widened until it does not.

    Meant for the moment when statistics are computed; statistics that came with a checkpoint must be used
    unchanged.

    Args:
        names: of the dimensions, for the messages; default: their numbers.
        among: bool[d], the dimensions that may be widened; None = all.
        are_commands: these are actions, which a robot is sent.
    Returns:
        New statistics, and one message for widened dimensions that are alike.
    """
    names = [f"dimension {i}" for i in range(stats.width)] if names is None else list(names)
    if len(names) != stats.width:
        raise ValueError(f"{len(names)} names for statistics of width {stats.width}: {names}")
    constant = stats.std <= _resolution(stats.mean)
    low = stats.mean - 4 * stats.std if stats.min is None else stats.min
    high = stats.mean + 4 * stats.std if stats.max is None else stats.max
    std = np.maximum(stats.std, np.maximum(high - stats.mean, stats.mean - low) / MAX_NORMALIZED)
    unit = 1000 * _resolution(stats.mean) if are_commands else np.ones_like(stats.mean)
    std = np.where(constant, unit, std)
    widened = {"std": std}
    if stats.q01 is not None and stats.q99 is not None:
        widened["q01"], widened["q99"] = _widen_quantiles(stats, np.where(constant, unit, 0.0), low, high)
    if among is not None:
        widened = {name: np.where(among, values, getattr(stats, name)) for name, values in widened.items()}
    floored = dataclasses.replace(stats, **widened)
    changed = np.any([getattr(stats, name) != values for name, values in widened.items()], axis=0)
    told: dict[str, list[str]] = {}  # a robot's padding is many dimensions, all alike
    for i in np.flatnonzero(changed).tolist():
        scale = ", ".join(f"{name} {values[i]:.4g}" for name, values in widened.items())
        told.setdefault(f"{_reason(stats, i, constant[i])}: widened to {scale}", []).append(names[i])
    return floored, [f"{_some(alike)} {what}" for what, alike in told.items()]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def is_flat(stats: NormStats, *, use_quantiles: bool) -> np.ndarray:
    """bool[d]: dimensions whose scale, of the kind in use, is rounding or nothing. NaN is not flat."""
    has_quantiles = use_quantiles and stats.q01 is not None and stats.q99 is not None
    scale = stats.q99 - stats.q01 if has_quantiles else stats.std  # type: ignore[operator]  # both are there
    return np.abs(scale) <= _resolution(stats.mean)


def _resolution(mean: np.ndarray) -> np.ndarray:
    """Scales below this are rounding: the epsilon of the formulas, or four steps of float32 at the mean."""
    return np.maximum(1e-6, 4 * np.finfo(np.float32).eps * np.abs(mean))


def _widen_quantiles(
    stats: NormStats, unit: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`unit`: of constant dimensions; 0 = it is none."""
    q01, q99 = stats.q01, stats.q99
    assert q01 is not None
    assert q99 is not None
    mean, constant = stats.mean, unit > 0
    centre, half = (q01 + q99) / 2, (q99 - q01) / 2
    rare = ~constant & (2 * half <= _resolution(mean))
    needed = np.maximum(high - centre, centre - low) / MAX_NORMALIZED
    cases = [constant, rare, half < needed]
    return (
        np.select(cases, [mean - unit, low, centre - needed], q01),
        np.select(cases, [mean + unit, high, centre + needed], q99),
    )


def _reason(stats: NormStats, dim: int, constant: bool) -> str:
    if constant:
        return f"is constant at {stats.mean[dim]:.4g}"
    if stats.q01 is None or stats.q99 is None:
        return f"has outliers far beyond its std of {stats.std[dim]:.4g}"
    return f"hardly ever leaves q01..q99 = {stats.q01[dim]:.4g}..{stats.q99[dim]:.4g}, but does so by far"


def serialize_json(norm_stats: Mapping[str, NormStats]) -> str:
    """The text of a statistics file, byte for byte as published tools write it."""
    document = {
        key: {name: _as_list(getattr(stats, name)) for name in ("mean", "std", "q01", "q99")}
        for key, stats in norm_stats.items()
    }
    return json.dumps({"norm_stats": document}, indent=2)


def deserialize_json(text: str) -> dict[str, NormStats]:
    """Inverse of `serialize_json`; q01 and q99 may be null or absent.

    Raises:
        ValueError: not such a text; what is wrong is named.
    """
    try:
        document = strict_json.parse(text)
    except ValueError as error:
        raise ValueError(f"statistics are not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("norm_stats"), dict):
        raise ValueError("statistics must be a JSON object with the key 'norm_stats'")
    return {key: _parse_stats(key, entry) for key, entry in document["norm_stats"].items()}


def save(directory: Path | str, norm_stats: Mapping[str, NormStats]) -> None:
    """Writes `<directory>/norm_stats.json`, complete or not at all; makes the folder."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    whole_file.write_text(directory / STATS_FILE, serialize_json(norm_stats))


_FIX = "compute them with `openpi stats`, or correct assets_dir and asset_id of the recipe"


def load(directory: Path | str, *, fix: str = _FIX) -> dict[str, NormStats]:
    """Reads `<directory>/norm_stats.json`.

    Args:
        fix: what to do where there is none.
    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged.
    """
    path = Path(directory) / STATS_FILE
    if not path.is_file():
        there = sorted(found.parent.name for found in path.parent.parent.glob(f"*/{STATS_FILE}"))
        others = f" (beside it: those of {', '.join(map(repr, there))})" if there else ""
        raise FileNotFoundError(f"normalisation statistics not found at {path}{others}; {fix}")
    try:
        return deserialize_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse_stats(key: str, entry: object) -> NormStats:
    if not isinstance(entry, dict) or entry.get("mean") is None or entry.get("std") is None:
        raise ValueError(f"the statistics of '{key}' must be an object with 'mean' and 'std'")
    try:
        return NormStats(entry["mean"], entry["std"], entry.get("q01"), entry.get("q99"))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the statistics of '{key}' are damaged: {error}") from error


def _as_list(values: np.ndarray | None) -> list[float] | None:
    return None if values is None else values.tolist()
