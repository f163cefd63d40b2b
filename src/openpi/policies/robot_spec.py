"""What a robot's client sends and gets, as data: the robot's half of a contract.

Each robot's input transform has it as the attribute `spec`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from openpi import transforms as _transforms
from openpi.policies.images import is_picture
from openpi.shared.errors import listed
from openpi.shared.tree import flatten

ImageLayout = Literal["hwc", "chw", "any"]


@dataclasses.dataclass(frozen=True)
class CameraSpec:
    """One camera.

    Attributes:
        key: '/'-joined path in the observation.
        slot: model image that it becomes; None = accepted and not used.
        required: whether an observation without it is an error.
        layout: of the array; `any` = told from the shape.
        shape: (height, width) in pixels; None = any.
    """

    key: str
    slot: str | None
    required: bool = True
    layout: ImageLayout = "any"
    shape: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class VectorSpec:
    """One vector.

    Attributes:
        key: '/'-joined path.
        names: one per dimension.
        units: one per dimension, e.g. `rad`, `m`, `0 open .. 1 closed`.
    """

    key: str
    names: tuple[str, ...]
    units: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.units):
            raise ValueError(f"'{self.key}' has {len(self.names)} names and {len(self.units)} units; expected as many")

    @property
    def width(self) -> int:
        return len(self.names)

    def mask_without(self, names: Iterable[str]) -> tuple[bool, ...]:
        """bool[width]: true for every dimension but these.

        Raises:
            ValueError: there is no dimension of that name.
        """
        left_out = set(names)
        unknown = sorted(left_out - set(self.names))
        if unknown:
            raise ValueError(f"'{self.key}' has no dimension {listed(unknown)}; it has {listed(self.names)}")
        return tuple(name not in left_out for name in self.names)

    def of_width(self, width: int, names: Sequence[str] = ()) -> VectorSpec:
        """As it is, or, where it has another width, with these names, if there are as many, or numbers."""
        if width == self.width:
            return self
        return self.uniform(self.key, names if len(names) == width else numbered(self.key, width), "unknown")

    @classmethod
    def uniform(cls, key: str, names: Iterable[str], unit: str) -> VectorSpec:
        """A vector with one unit for all dimensions."""
        names = tuple(names)
        return cls(key, names, (unit,) * len(names))


@dataclasses.dataclass(frozen=True)
class RobotSpec:
    """The client keys of a robot.

    Attributes:
        robot: its name.
        cameras: in the order of the model's image slots.
        state: vectors whose concatenation is the state.
        actions: one step of the returned chunk.
        action_kind: in words, e.g. `absolute joint positions`.
        follows_state: how to stand still, per action dimension: true where an action equal to the state does, false
            where zero does. Empty = neither does everywhere, as with a gripper that clients open or close by a
            threshold, or whose command has another scale than its measured position.
        takes_any_state: the transforms hand a state of any width on, and are what robots of one's own start from.
    """

    robot: str
    cameras: tuple[CameraSpec, ...]
    state: tuple[VectorSpec, ...]
    actions: VectorSpec
    action_kind: str = ""
    follows_state: tuple[bool, ...] = ()
    takes_any_state: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.follows_state, list):
            object.__setattr__(self, "follows_state", tuple(self.follows_state))
        told = self.follows_state
        if not isinstance(told, tuple) or len(told) not in (0, self.actions.width):
            raise ValueError(
                f"follows_state of robot '{self.robot}' is {told!r}; expected a tuple of {self.actions.width} times "
                f"True or False, for {listed(self.actions.names)}; () = unknown"
            )

    def for_sample(self, sample: Mapping[str, object], names: Sequence[str] = ()) -> RobotSpec:
        """With the widths of a sample's state, if it takes any.

        Args:
            names: of the state in the dataset.
        """
        if not self.takes_any_state:
            return self
        leaves = flatten(sample)
        state = tuple(vector.of_width(np.size(leaves.get(vector.key, vector.names)), names) for vector in self.state)
        return dataclasses.replace(self, state=state)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of all state dimensions, in order."""
        return tuple(name for vector in self.state for name in vector.names)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Of the dimensions of `state` and of `actions`."""
        return {"state": self.state_names, "actions": tuple(self.actions.names)}

    @classmethod
    def from_sample(cls, sample: Mapping[str, object], *, robot: str = "custom", action_dim: int) -> RobotSpec:
        """The spec of a robot whose transforms bring none, from one repacked sample.

        Images become cameras of unknown slots, vectors become state, in the order of the sample. Arrays of other forms,
        such as depth, are left to its transforms.
        """
        cameras, state = [], []
        for key, value in flatten(sample).items():
            array = np.asarray(value)
            if key.partition("/")[0] == "actions" or not np.issubdtype(array.dtype, np.number):
                continue
            if is_picture(array):
                cameras.append(CameraSpec(key, slot=None))
            elif array.ndim == 1:
                state.append(VectorSpec.uniform(key, numbered(key, array.size), "unknown"))
        actions = VectorSpec.uniform("actions", numbered("actions", action_dim), "unknown")
        return cls(robot, tuple(cameras), tuple(state), actions)


def random_observation(spec: RobotSpec, *, size_hw: tuple[int, int] = (224, 224)) -> dict:
    """What a robot's client sends, at random: the cameras that are required, the state, a prompt."""
    rng = np.random.default_rng()
    cameras = [camera.key for camera in spec.cameras if camera.required]
    images = {key: rng.integers(256, size=(*size_hw, 3), dtype=np.uint8) for key in cameras}
    return {**{vector.key: rng.random(vector.width) for vector in spec.state}, **images, "prompt": "do something"}


def numbered(key: str, count: int) -> Sequence[str]:
    """Names for dimensions that have none."""
    return [f"{key.rsplit('/', 1)[-1]}_{i}" for i in range(count)]


def find_spec(transforms: Iterable[object]) -> RobotSpec | None:
    """The spec of the robot transform among these; None when none brings one."""
    specs = (getattr(transform, "spec", None) for transform in transforms)
    return next((spec for spec in specs if isinstance(spec, RobotSpec)), None)


def relative_dims(steps: Iterable[object], width: int) -> tuple[bool, ...]:
    """Per action dimension, whether these transforms go between targets and changes to the state."""
    relative = np.zeros(width, dtype=bool)
    for step in steps:
        if isinstance(step, (_transforms.DeltaActions, _transforms.AbsoluteActions)) and step.mask is not None:
            mask = np.asarray(step.mask, dtype=bool)[:width]
            relative[: len(mask)] |= mask
    return tuple(relative.tolist())
