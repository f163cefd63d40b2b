"""The features of a LeRobot robot beside the contract of a policy: names are matched, never positions.

    robot:    shoulder.pos: float, elbow.pos: float, front: (480, 640, 3)
    contract: state [elbow.pos, shoulder.pos], camera observation.images.front, actions [elbow.pos, shoulder.pos]

NumPy only; LeRobot's own side of it is in `lerobot.py`, and in the distribution `lerobot_policy_openpi`.
"""

import dataclasses
import difflib
import math
import re
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime.actions import ActionSpec, contract_of

# What contracts say where nobody said more.
_NO_UNIT = ("", "unknown", "as recorded")
_SPELLINGS = {"degrees": "deg", "degree": "deg", "radians": "rad", "radian": "rad", "metres": "m", "meters": "m"}
_TURNS = {("deg", "rad"): math.pi / 180, ("rad", "deg"): 180 / math.pi}
_LENGTHS = {("mm", "m"): 1e-3, ("m", "mm"): 1e3}
_FACTORS = {**_TURNS, **_LENGTHS, **{(f"{a}/s", f"{b}/s"): factor for (a, b), factor in {**_TURNS, **_LENGTHS}.items()}}
# How LeRobot names what an action is.
_HOLDS = {".pos": "stay", ".vel": "zero"}
# The one group that published robots send as a dict; other keys with a slash are text.
_NESTED = "images/"


@dataclasses.dataclass(frozen=True)
class Choices:
    """What names do not decide.

    Attributes:
        names: name of a dimension in the contract -> feature of the robot; `actions/NAME` where a name of the state has
            another feature.
        cameras: key of a camera in the contract -> camera of the robot.
        units: feature -> its unit, where the robot does not tell: `deg`, `rad`, or the words of the contract.
        convert: feature -> (scale, offset): the policy reads scale * value + offset, and commands go back that way. No
            unit is compared then.
        fixed: action feature that the policy does not have -> what is sent for it.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cameras: Mapping[str, str] = dataclasses.field(default_factory=dict)
    units: Mapping[str, str] = dataclasses.field(default_factory=dict)
    convert: Mapping[str, Tuple[float, float]] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Dimensions of a vector of the policy, in its order, as features of the robot.

    Attributes:
        features: of the robot.
        scale, offset: float64[width]; the policy's value is scale * the robot's + offset.
    """

    features: Tuple[str, ...]
    scale: np.ndarray
    offset: np.ndarray

    def read(self, values: Metadata) -> np.ndarray:
        """float64[width], as the policy reads them.

        Raises:
            ValueError: the robot did not give one of its features.
        """
        missing = [name for name in self.features if name not in values]
        if missing:
            raise ValueError(f"the robot's observation has no {', '.join(missing)}; it has {', '.join(values)}")
        return self.scale * np.array([float(values[name]) for name in self.features]) + self.offset

    def written(self, row: np.ndarray) -> Dict[str, float]:
        """The robot's values of a row of the policy."""
        return dict(zip(self.features, ((row - self.offset) / self.scale).tolist()))


class FeatureMap:
    """A robot's observations as those of a policy, and the policy's actions as the robot's.

    Attributes:
        hold: per action dimension how it stands still, as its name says (`.pos`, `.vel`); None = the contract tells, or
            names do not.
    """

    def __init__(
        self,
        observation_features: Mapping[str, object],
        action_features: Mapping[str, object],
        metadata: Mapping[str, object],
        choices: Optional[Choices] = None,
        *,
        units: Optional[Mapping[str, str]] = None,
    ) -> None:
        """
        Args:
            observation_features, action_features: as LeRobot has them: name -> `float`, or the shape of a picture.
            metadata: of the server.
            units: feature -> unit, as the robot itself tells; `choices.units` go before.
        Raises:
            ValueError: robot and policy do not fit, or it is not known whether they do.
        """
        contract = contract_of(metadata)
        if not contract:
            raise ValueError(
                "the server tells no contract, so names and order of the robot's joints cannot be checked; serve the "
                "checkpoint with `openpi serve`, or write a Robot of your own (docs/how-to/realtime.md)"
            )
        self._contract = contract
        self._choices = choices or Choices()
        self._units = {**(units or {}), **self._choices.units}
        measured = [name for name, kind in observation_features.items() if _is_number(kind)]
        commanded = [name for name, kind in action_features.items() if _is_number(kind)]
        pictures = [name for name, kind in observation_features.items() if _is_picture(kind)]
        _check_known(self._choices, contract, {*measured, *commanded}, pictures)
        told = {vector["key"]: vector for vector in contract.get("state", ())}
        self.state = {key: self._dimensions(vector, measured, "measures") for key, vector in told.items()}
        self.actions = self._dimensions(contract["actions"], commanded, "is commanded by")
        self.cameras = _matched_cameras(contract.get("cameras", ()), pictures, self._choices.cameras)
        self._layouts = {camera["key"]: camera.get("layout", "any") for camera in contract.get("cameras", ())}
        self._fixed = self._fixed_values(commanded)
        self._can_tell_pose = set(self.actions.features) <= set(measured)
        self.hold = self._checked_hold(metadata)

    def _dimensions(self, vector: Metadata, features: Sequence[str], does: str) -> Dimensions:
        names = [str(name) for name in vector["names"]]
        chosen = self._choices.names
        found = [chosen.get(f"{vector['key']}/{name}", chosen.get(name, name)) for name in names]
        missing = [name for name, feature in zip(names, found) if feature not in features]
        if missing:
            raise ValueError(
                f"'{vector['key']}' of the policy has {', '.join(missing)}; the robot {does} {', '.join(features)}"
                f"{_likely(missing[0], features)}. Say which feature it is: names={{{missing[0]!r}: ...}}, or "
                f"--name {missing[0]}=FEATURE"
            )
        if len(set(found)) < len(found):
            twice = sorted({feature for feature in found if found.count(feature) > 1})
            raise ValueError(f"'{vector['key']}' of the policy would have {', '.join(twice)} of the robot twice")
        units = vector.get("units") or [""] * len(names)
        conversions = [self._conversion(feature, str(unit)) for feature, unit in zip(found, units)]
        scale, offset = (np.array([pair[part] for pair in conversions], np.float64) for part in (0, 1))
        return Dimensions(tuple(found), scale, offset)

    def _conversion(self, feature: str, wanted: str) -> Tuple[float, float]:
        """(scale, offset) from the robot's unit to the policy's."""
        if feature in self._choices.convert:
            scale, offset = self._choices.convert[feature]
            if not (math.isfinite(scale) and math.isfinite(offset) and scale != 0):
                raise ValueError(f"convert has {scale}, {offset} for '{feature}'; expected finite numbers, scale not 0")
            return scale, offset
        given = _spelled(self._units.get(feature, ""))
        if _spelled(wanted) in _NO_UNIT or given == _spelled(wanted):
            return 1.0, 0.0
        if (given, _spelled(wanted)) in _FACTORS:
            return _FACTORS[given, _spelled(wanted)], 0.0
        found = f"is in '{given}'" if given else "has no unit that it tells"
        raise ValueError(
            f"'{feature}' of the robot {found}; the policy reads '{wanted}'. Say what it is: --unit {feature}=UNIT "
            f"('{wanted}' if it is the same), or how it becomes that: --convert {feature}=SCALE,OFFSET"
        )

    def _fixed_values(self, commanded: Sequence[str]) -> Dict[str, float]:
        left = [name for name in commanded if name not in self.actions.features]
        unknown = [name for name in left if name not in self._choices.fixed]
        if unknown:
            raise ValueError(
                f"the robot is also commanded by {', '.join(unknown)}, which the policy does not have; say what it is "
                f"sent: --fixed {unknown[0]}=VALUE"
            )
        both = [name for name in self._choices.fixed if name in self.actions.features]
        if both:
            raise ValueError(f"{', '.join(both)} would be fixed, and is an action of the policy; leave out --fixed")
        return {name: float(self._choices.fixed[name]) for name in left}

    def _checked_hold(self, metadata: Mapping[str, object]) -> Optional[List[Any]]:
        """How it holds by the robot's names, where the contract does not tell.

        Raises:
            ValueError: names and contract say different things: steps sent as positions would be wild.
        """
        words = [next((word for end, word in _HOLDS.items() if f.endswith(end)), "") for f in self.actions.features]
        try:
            told = ActionSpec.from_metadata(metadata, width=None, hold=None).stays
        except ValueError:
            return words if all(words) else None
        for feature, word, stays in zip(self.actions.features, words, told):
            if word and stays != (word == "stay"):
                kind = self._contract["actions"].get("kind", "")
                takes = "positions" if word == "stay" else "velocities"
                raise ValueError(
                    f"'{feature}' of the robot takes {takes}, but the policy's actions are '{kind}', and hold by "
                    f"'{'stay' if stays else 'zero'}' there; this is the policy of another robot"
                )
        return None

    def observation(self, raw: Mapping[str, object], prompt: Optional[str] = None) -> Dict[str, object]:
        """What the policy is sent.

        Args:
            raw: of the robot; pictures are uint8[h, w, 3], RGB.
            prompt: None = the server's own.
        Raises:
            ValueError: something is missing.
        """
        observation: Dict[str, Any] = {}
        for key, camera in self.cameras.items():
            if camera not in raw:
                raise ValueError(f"the robot's observation has no picture '{camera}'; it has {', '.join(raw)}")
            picture = np.asarray(raw[camera])
            _put(observation, key, np.moveaxis(picture, -1, 0) if self._layouts[key] == "chw" else picture)
        for key, dimensions in self.state.items():
            _put(observation, key, dimensions.read(raw).astype(np.float32))
        if prompt is not None:
            observation["prompt"] = prompt
        return observation

    def action(self, row: np.ndarray) -> Dict[str, float]:
        """What the robot is sent for a row of the policy, float[width]."""
        return {**self.actions.written(row), **self._fixed}

    def pose(self, raw: Mapping[str, object]) -> Optional[np.ndarray]:
        """Where the robot is, as a row of the policy; None if it does not measure what it is commanded."""
        return self.actions.read(raw) if self._can_tell_pose else None

    @property
    def state_names(self) -> Dict[str, Tuple[str, ...]]:
        """By key, the names of the contract: all were found in the robot."""
        return {vector["key"]: tuple(vector["names"]) for vector in self._contract.get("state", ())}

    @property
    def action_names(self) -> Tuple[str, ...]:
        return tuple(self._contract["actions"]["names"])


def _matched_cameras(cameras: Sequence[Metadata], pictures: Sequence[str], chosen: Mapping[str, str]) -> Dict[str, str]:
    """Camera of the robot by key of the policy: the last part of the key is its name, unless it was chosen."""
    found: Dict[str, str] = {}
    for camera in cameras:
        key = camera["key"]
        name = chosen.get(key) or (key if key in pictures else re.split(r"[./]", key)[-1])
        if name in pictures:
            if name in found.values():
                raise ValueError(f"camera '{name}' of the robot would be '{key}' and another one; --camera {key}=NAME")
            found[key] = name
        elif camera.get("required", True):
            raise ValueError(
                f"the policy needs the camera '{key}'; the robot has {', '.join(pictures) or 'none'}. Say which it is: "
                f"--camera {key}=NAME"
            )
    return found


def _check_known(choices: Choices, contract: Metadata, features: Iterable[str], pictures: Sequence[str]) -> None:
    """Raises ValueError where a choice names what is not there: a typo must not pass for a decision."""
    vectors = [*contract.get("state", ()), contract["actions"]]
    dimensions = {str(name) for vector in vectors for name in vector["names"]}
    dimensions |= {f"{vector['key']}/{name}" for vector in vectors for name in vector["names"]}
    keys = {camera["key"] for camera in contract.get("cameras", ())}
    for what, given, known in (
        ("names", choices.names, dimensions),
        ("names", choices.names.values(), features),
        ("cameras", choices.cameras, keys),
        ("cameras", choices.cameras.values(), pictures),
        ("units", choices.units, features),
        ("convert", choices.convert, features),
        ("fixed", choices.fixed, features),
    ):
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{what} has '{name}', which is not there{_likely(name, known)}; known: {_listed(known)}"
                )


def _put(observation: Observation, key: str, value: np.ndarray) -> None:
    if key.startswith(_NESTED):
        observation.setdefault(_NESTED[:-1], {})[key[len(_NESTED) :]] = value
    else:
        observation[key] = value


def _is_number(kind: object) -> bool:
    return kind in (float, int, bool) or (isinstance(kind, type) and issubclass(kind, np.number))


def _is_picture(kind: object) -> bool:
    return isinstance(kind, (tuple, list)) and len(kind) == 3 and kind[-1] == 3


def _spelled(unit: str) -> str:
    return _SPELLINGS.get(unit.strip().lower(), unit.strip().lower())


def _likely(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (perhaps '{close[0]}')" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
