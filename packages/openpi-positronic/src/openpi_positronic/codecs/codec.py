"""Codecs: raw robot signals <-> policy keys, the same object for training data, serving and commands.

```
TRAIN   recorded signals --training--> columns of a dataset
SERVE   raw observation  --encode----> what the policy takes
        robot commands   <--decode---- what the policy gives
```

    a | b   one after the other: encode and train a then b, decode b then a
    a & b   side by side: both get the same, results are merged

A usual codec is `timing | binarise | (observation & action)`. Source: the serving specification, section 6.2.
NumPy only; nothing here reads files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from openpi.shared.strict_json import Json

Step = dict[str, Any]
"""One decoded step: `robot_command`, `target_grip`, and with a timing `timestamp`, in seconds from the observation."""

Given: TypeAlias = "np.ndarray | Step | list[Step]"
"""What a policy gave: a chunk float[h, d], an action float[d], or steps, `{"action": float[d]}` or decoded in part."""

Decoded: TypeAlias = Step | list[Step]


@dataclasses.dataclass(frozen=True)
class Column:
    """A training column, derived from raw signals of an episode, each taken at its newest sample so far.

    Attributes:
        signals: what it is made of. It starts when all of them have started.
        derive: values of the signals at n instants, [n, ...] each -> [n, ...].
    """

    signals: tuple[str, ...]
    derive: Callable[[Mapping[str, np.ndarray]], np.ndarray]

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Column:
        return Column(self.signals, lambda values: change(self.derive(values)))


class RawSignals(Mapping[str, Column]):
    """The signals of any episode as columns: which there are, the episode says when it is read."""

    def __getitem__(self, name: str) -> Column:
        return Column((name,), lambda values: values[name])

    def __iter__(self) -> Iterator[str]:
        raise TypeError("a codec without an observation or an action part has no columns of its own")

    def __len__(self) -> int:
        return 0


class Codec:
    """One part of the way between robot and policy. The base changes nothing.

    Attributes:
        served_meta: told to clients when a policy is served with this codec.
        training_meta: told to the converter: `lerobot_features`, `action_fps`, `action_horizon_sec`.
    """

    @property
    def served_meta(self) -> dict[str, object]:
        return {}

    @property
    def training_meta(self) -> Json:
        return {}

    @property
    def parameters(self) -> dict[str, object]:
        """What one session may set otherwise: name -> value."""
        return {}

    def with_parameters(self, values: Mapping[str, object]) -> Codec:
        """The same codec with these parameters, as far as they are its own.

        Raises:
            ValueError: a value that cannot be.
        """
        return self

    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        """A raw observation as the policy's; keys that nobody asked for are ignored.

        Raises:
            KeyError: a signal is missing; its name and those present are in the message.
            ValueError: a signal has another width or dtype.
        """
        return dict(raw)

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        """What the policy gave, as robot commands.

        Args:
            output: float[h, d], a chunk; float[d], one action; or one or a list of `{"action": float[d]}`.
            context: the raw observation that the output answers.
        Returns:
            list of `Step` for a chunk or a list, else one `Step`.
        Raises:
            ValueError: another width, or values that no robot can be sent.
        """
        return output  # type: ignore[return-value]  # the parts in front have made steps of it

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        """Columns of a dataset from those of an episode."""
        return signals

    def training_columns(self) -> dict[str, Column]:
        """The columns of a dataset, `task` aside.

        Raises:
            ValueError: this codec is for inference only.
        """
        return dict(self.training(RawSignals()))

    def training_task(self, static: Mapping[str, object]) -> str | None:
        """The `task` of an episode with these constants; None where the codec has none."""
        return None

    def dummy_encoded(self) -> dict[str, object]:
        """A zero observation as `encode` makes them, to warm a policy up with."""
        return {}

    def __or__(self, second: Codec) -> Codec:
        return _Sequential(self, second)

    def __and__(self, second: Codec) -> Codec:
        return _Parallel(self, second)


@dataclasses.dataclass(frozen=True)
class _Pair(Codec):
    first: Codec
    second: Codec

    @property
    def served_meta(self) -> dict[str, object]:
        return _merge_meta(self.first.served_meta, self.second.served_meta)

    @property
    def training_meta(self) -> Json:
        return _merge_meta(self.first.training_meta, self.second.training_meta)

    @property
    def parameters(self) -> dict[str, object]:
        return {**self.first.parameters, **self.second.parameters}

    def with_parameters(self, values: Mapping[str, object]) -> Codec:
        first, second = self.first.with_parameters(values), self.second.with_parameters(values)
        return dataclasses.replace(self, first=first, second=second)

    def training_task(self, static: Mapping[str, object]) -> str | None:
        task = self.second.training_task(static)
        return self.first.training_task(static) if task is None else task


class _Sequential(_Pair):
    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        return self.second.encode(self.first.encode(raw))

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        return self.first.decode(self.second.decode(output, context), context)

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        return self.second.training(self.first.training(signals))

    def dummy_encoded(self) -> dict[str, object]:
        return self.second.dummy_encoded() or self.second.encode(self.first.dummy_encoded())


class _Parallel(_Pair):
    def encode(self, raw: Mapping[str, object]) -> dict[str, object]:
        return {**self.first.encode(raw), **self.second.encode(raw)}

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        first: Any = self.first.decode(output, context)
        second: Any = self.second.decode(output, context)
        if isinstance(first, Mapping):
            return {**first, **second}
        if len(first) != len(second):
            raise ValueError(f"codecs side by side decoded {len(first)} and {len(second)} steps; expected as many")
        return [{**one, **other} for one, other in zip(first, second, strict=True)]

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        return {**self.second.training(signals), **self.first.training(signals)}

    def dummy_encoded(self) -> dict[str, object]:
        return {**self.first.dummy_encoded(), **self.second.dummy_encoded()}


def joined(columns: Sequence[Column]) -> Column:
    """Columns side by side, float32[n, d]."""

    def derive(values: Mapping[str, np.ndarray]) -> np.ndarray:
        parts = (np.asarray(column.derive(values), np.float32) for column in columns)
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)

    return Column(tuple(dict.fromkeys(name for column in columns for name in column.signals)), derive)


def _merge_meta(first: Json, second: Json) -> Json:
    merged = {**first, **second}
    for key in first.keys() & second.keys():
        if isinstance(first[key], Mapping) and isinstance(second[key], Mapping):
            merged[key] = {**first[key], **second[key]}
    return merged
