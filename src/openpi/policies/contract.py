"""What a checkpoint expects and gives, as data: `<checkpoint>/contract.json`.

Training writes it, serving checks every observation against it. It finds what otherwise makes a policy
quietly bad: a camera under another name, floats where bytes are due, another layout, another robot's state,
swapped colours.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import numpy as np

from openpi import transforms as _transforms
from openpi.checkpoints.checkpoint import CONTRACT_FILE
from openpi.policies.data_half import DataHalf
from openpi.policies.images import channel_mean, has_cast, has_rgb_shape, looks_bgr
from openpi.policies.observation_checks import as_array, check_image, check_prompt, check_vector
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec, find_spec, relative_dims
from openpi.policies.seen import Seen
from openpi.policies.state_range import StateRange, names_for
from openpi.shared import ranges, strict_json, whole_file
from openpi.shared.budgets import MAX_IMAGE_PIXELS, Budget
from openpi.shared.errors import listed
from openpi.shared.normalize import NormStats
from openpi.shared.ranges import Range, WholeNumber
from openpi.shared.strict_json import Json
from openpi.shared.tree import Tree, check_paths_differ, flatten
from openpi.shared.typed_values import fitted_fields

if TYPE_CHECKING:
    from openpi.models.model_config import ModelType


_VERSION = 1


class ModelDescription(Protocol):
    """The fields of a model config that a contract is made of."""

    @property
    def action_horizon(self) -> int: ...
    @property
    def model_type(self) -> ModelType: ...


class NoSpecError(ValueError):
    """A contract cannot be made of transforms that do not say which robot they are for."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a policy takes and returns.

    Attributes:
        robot: its name.
        model_type: value of `ModelType`.
        cameras: with the model image each becomes.
        state: vectors that make up the state, in order.
        actions: one step of the returned chunk.
        action_kind: in words.
        trained_relative: per action dimension, whether training saw it relative to the state. The policy
            returns absolute values all the same.
        action_horizon: steps of a chunk.
        hold: how to stand still, per action dimension: `stay` where the last target stays, `zero` where zero is
            commanded; empty = unknown.
        action_low, action_high: of recorded actions, as the robot takes them; None = unknown.
        action_max_step: from one recorded action to the next, at most; None = unknown.
        seen: views of the cameras, states and prompts of training, for `policies.watch`; None = unknown.
        control_hz: steps per second, as recorded; None = unknown.
        default_prompt: used when an observation has none; None = a prompt is required.
        normalization: `quantile` or `zscore`.
        asset_id: which statistics.
        stats_widths: per key, of the statistics.
        state_q01, state_q99: of the training data, after the robot transforms; None = unknown.
        camera_means: per camera key, mean red, green and blue of the training images, 0..255.
        rtc_max_delay: largest delay that it was trained to go on from a chunk with; 0 = it was not.
    """

    robot: str
    model_type: str
    cameras: tuple[CameraSpec, ...]
    state: tuple[VectorSpec, ...]
    actions: VectorSpec
    action_kind: str
    trained_relative: tuple[bool, ...]
    action_horizon: Annotated[int, Range(1, 100_000)]
    control_hz: Annotated[float, Range(above=0, most=10_000)] | None = None
    default_prompt: str | None = None
    normalization: Literal["quantile", "zscore"] = "zscore"
    asset_id: str | None = None
    stats_widths: Mapping[str, WholeNumber] = dataclasses.field(default_factory=dict)
    state_q01: tuple[float, ...] | None = None
    state_q99: tuple[float, ...] | None = None
    camera_means: Mapping[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    rtc_max_delay: WholeNumber = 0
    hold: tuple[Literal["stay", "zero"], ...] = ()
    action_low: tuple[float, ...] | None = None
    action_high: tuple[float, ...] | None = None
    action_max_step: tuple[float, ...] | None = None
    seen: Seen | None = None

    @classmethod
    def build(
        cls,
        data_config: DataHalf,
        model_config: ModelDescription,
        *,
        sample: Mapping[str, object] | None = None,
        action_width: int | None = None,
        control_hz: float | None = None,
        state_names: Iterable[str] | None = None,
        action_names: Iterable[str] | None = None,
        camera_means: Mapping[str, tuple[float, float, float]] | None = None,
    ) -> Contract:
        """The contract of a policy trained from this data.

        Args:
            sample: one sample under client keys, that is after the repack transforms; needed when the robot's
                transforms bring no spec, or take a state of any width.
            action_width: of the actions that the robot gets, then; None = that of the statistics.
            control_hz: frames per second of the dataset.
            state_names, action_names: of the dataset's features, for a robot whose transforms bring no spec.
            camera_means: per client key, see `channel_means`.
        Raises:
            NoSpecError: neither a spec nor a sample.
        """
        stats = data_config.norm_stats or {}
        widths = {key: entry.width for key, entry in stats.items()}
        spec = find_spec(data_config.data_transforms.inputs)
        if spec is None:
            spec = _with_names(
                _spec_of_sample(sample, action_width or widths.get("actions")),
                tuple(state_names or ()),
                tuple(action_names or ()),
            )
        elif sample is not None:
            spec = spec.for_sample(sample, tuple(state_names or ()))
        state_stats = stats.get("state")
        return cls(
            robot=spec.robot,
            model_type=model_config.model_type.value,
            cameras=spec.cameras,
            state=spec.state,
            actions=spec.actions,
            action_kind=spec.action_kind,
            trained_relative=relative_dims(data_config.data_transforms.inputs, spec.actions.width),
            action_horizon=model_config.action_horizon,
            control_hz=control_hz,
            default_prompt=_default_prompt(data_config.model_transforms.inputs),
            normalization="quantile" if data_config.use_quantile_norm else "zscore",
            asset_id=data_config.asset_id,
            stats_widths=widths,
            state_q01=None if state_stats is None else _as_tuple(state_stats.q01),
            state_q99=None if state_stats is None else _as_tuple(state_stats.q99),
            camera_means=dict(camera_means or {}),
            rtc_max_delay=getattr(model_config, "rtc_max_delay", 0),
            hold=tuple("stay" if follows else "zero" for follows in spec.follows_state),
        )

    def save(self, directory: Path | str) -> None:
        """Writes `contract.json`, complete or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        document = {"version": _VERSION, **dataclasses.asdict(self)}
        whole_file.write_text(directory / CONTRACT_FILE, json.dumps(document, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path | str) -> Contract:
        """Reads `<directory>/contract.json`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or of another version.
        """
        path = Path(directory) / CONTRACT_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; other trainers write no contract")
        try:
            return _from_json(strict_json.read(path))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{path} is damaged or of another version: {error}") from error

    @classmethod
    def find(cls, directory: Path) -> Contract | None:
        """As `load`; None where there is no such file."""
        return cls.load(directory) if (directory / CONTRACT_FILE).is_file() else None

    def check(self, observation: Mapping[str, object]) -> list[str]:
        """Raises ValueError, with field, found, expected and fix, unless the policy can use the observation.

        Returns:
            the cameras, and other arrays of three axes or more, that it does not look at.
        """
        check_paths_differ(observation)
        leaves = {key: value for key, value in flatten(observation).items() if key != "actions"}
        found_cameras = [key for key, value in leaves.items() if getattr(value, "ndim", 0) >= 3]
        unread = self._check_cameras(leaves, found_cameras)
        for vector in self.state:
            check_vector(vector, leaves)
        prompt = leaves.get("prompt")
        if prompt is None and self.default_prompt is None:
            raise ValueError(
                f"observation has no 'prompt' (found: {listed(leaves)}); this policy has no default. Send "
                "the task in words, or start the server with --default-prompt TEXT"
            )
        if prompt is not None:
            check_prompt(prompt)
        return unread

    def check_vectors(self, observation: Mapping[str, object]) -> None:
        """Raises ValueError unless every vector of the state is there, of its width and finite."""
        leaves = flatten(observation)
        for vector in self.state:
            check_vector(vector, leaves)

    def check_actions(self, width: int, *, where: str) -> None:
        """Raises ValueError unless an action has as many dimensions as the robot.

        Args:
            where: what has this width, for the message.
        """
        if width != self.actions.width:
            raise ValueError(
                f"{where} {width} dimensions; robot '{self.robot}' of the recipe has {self.actions.width}: "
                f"{', '.join(self.actions.names)}. Use transforms written for your robot (docs/tutorial.md, step 2), "
                "or correct its RobotSpec"
            )

    def _check_cameras(self, leaves: Mapping[str, object], found: list[str]) -> list[str]:
        """As `check`. A robot may send more than a policy takes; but where a camera is not there that need not be, one
        of another name is most likely that."""
        known = {camera.key: camera for camera in self.cameras}
        required = [camera.key for camera in self.cameras if camera.required]
        missing = [key for key in required if key not in leaves]
        absent = [camera.key for camera in self.cameras if camera.slot is not None and camera.key not in leaves]
        unread = [key for key in found if key not in known]
        misnamed = [key for key in unread if absent and has_rgb_shape(np.asarray(leaves[key]))]
        if missing:
            raise ValueError(
                f"observation is missing the camera {listed(missing)} (cameras found: {listed(found)}); "
                f"expected {listed(required)}. Rename the key on the client; in a dataset, by the repack transform"
            )
        if misnamed:
            raise ValueError(
                f"observation has the camera {listed(misnamed)}, which this policy was not trained with, and lacks "
                f"{listed(absent)}; it takes {listed(known)}. Leave it out, or rename it to the camera it stands for"
            )
        for key in known:
            if key in leaves:
                check_image(known[key], as_array(leaves[key], key))
        return unread

    def warnings(self, observation: Mapping[str, object]) -> list[str]:
        """What is suspicious but may be right: cameras whose colours fit better with red and blue swapped.

        Each begins with its subject and a colon, so that a caller can say it once.
        """
        leaves = flatten(observation)
        return [
            f"{key}: colours fit the training images better with red and blue swapped (mean "
            f"{_rounded(mean)}, training {_rounded(usual)}); expected RGB. Convert with "
            "image[..., ::-1] if the camera gives BGR"
            for key, usual in self.camera_means.items()
            if key in leaves and has_cast(usual) and looks_bgr(mean := channel_mean(leaves[key]), usual)
        ]

    def range_warnings(self, state: np.ndarray) -> list[str]:
        """One line per state dimension far outside q01..q99 of the training data.

        Args:
            state: float[s] after the robot transforms, not normalised.
        """
        return self._range.warnings(state)

    @functools.cached_property
    def _range(self) -> StateRange:
        return StateRange(self.state_q01, self.state_q99, self.state_names)

    def check_norm_stats(self, norm_stats: Mapping[str, NormStats]) -> None:
        """Raises ValueError if statistics given by hand belong to a robot of other widths."""
        for key, width in self.stats_widths.items():
            if key in norm_stats and norm_stats[key].width != width:
                names = self.actions.names if key == "actions" else names_for(self.state_names, width)
                raise ValueError(
                    f"the statistics of '{key}' have {norm_stats[key].width} dimensions; this checkpoint was "
                    f"trained with {width}: {', '.join(names)}. Use the statistics of the checkpoint"
                )

    def diff(self, other: Contract) -> list[str]:
        """One line per difference, `field: mine -> other's`; empty if they agree."""
        mine, theirs = self._facts(), other._facts()
        return [
            f"{key}: {mine.get(key, 'absent')} -> {theirs.get(key, 'absent')}"
            for key in (*mine, *(key for key in theirs if key not in mine))
            if mine.get(key) != theirs.get(key)
        ]

    def as_metadata(self) -> dict[str, object]:
        """What a robot's program needs, as plain data for the handshake of a server."""
        return {
            "robot": self.robot,
            "model_type": self.model_type,
            "cameras": [
                {
                    "key": camera.key,
                    "shape": None if camera.shape is None else [*camera.shape, 3],
                    "layout": camera.layout,
                    "dtype": "uint8",
                    "required": camera.required,
                }
                for camera in self.cameras
            ],
            "state": [_vector_metadata(vector) for vector in self.state],
            "actions": {
                **_vector_metadata(self.actions),
                "kind": self.action_kind,
                "horizon": self.action_horizon,
                **self._safety_metadata(),
            },
            "control_hz": self.control_hz,
            "default_prompt": self.default_prompt,
        }

    def _safety_metadata(self) -> dict[str, list[object]]:
        """What of it is known."""
        found = {"hold": self.hold or None, "low": self.action_low, "high": self.action_high}
        found["max_step"] = self.action_max_step
        return {name: list(values) for name, values in found.items() if values is not None}

    def describe(self) -> str:
        """The contract in lines for people."""
        rate = f" at {self.control_hz:g} Hz" if self.control_hz else ""
        lines = [f"robot {self.robot}, model {self.model_type}", "observation"]
        for camera in self.cameras:
            optional = "" if camera.required else ", optional"
            use = camera.slot or "not used"
            lines.append(f"  {camera.key}: RGB, uint8, {_size(camera)}{optional} -> {use}")
        lines += [f"  {vector.key}: float[{vector.width}] {_dims(vector)}" for vector in self.state]
        default = f", default {self.default_prompt!r}" if self.default_prompt else ""
        lines.append(f"  prompt: text{default}")
        shape = f"[{self.action_horizon}, {self.actions.width}]"
        lines.append(f"actions: float{shape}{rate}, {self.action_kind}".rstrip(", "))
        lines.append(f"  {_dims(self.actions)}")
        if self.rtc_max_delay:
            lines.append(f"  goes on from a chunk that is played, with delays of up to {self.rtc_max_delay} steps")
        lines.append(f"normalised by {self.normalization} of '{self.asset_id}'")
        return "\n".join(lines)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of all state dimensions, in order."""
        return tuple(name for vector in self.state for name in vector.names)

    def _facts(self) -> dict[str, str]:
        """Everything that two contracts can disagree on, by name."""
        facts = {f"camera {camera.key}": _camera_facts(camera) for camera in self.cameras}
        facts |= {f"state {vector.key}": _dims(vector) for vector in self.state}
        facts["actions"] = _dims(self.actions)
        simple = ("robot", "model_type", "action_kind", "trained_relative", "action_horizon", "control_hz")
        simple += ("default_prompt", "normalization", "asset_id", "rtc_max_delay")
        facts |= {name: str(getattr(self, name)) for name in simple}
        return facts


def _spec_of_sample(sample: Tree | None, action_width: int | None) -> RobotSpec:
    if sample is None:
        raise NoSpecError(
            "none of the data transforms has a 'spec', and no sample was given; the contract needs one of "
            "them. Give the robot's input transform a `spec: ClassVar[RobotSpec]`"
        )
    return RobotSpec.from_sample(sample, action_dim=action_width or np.shape(sample.get("actions", [0]))[-1])


def _with_names(spec: RobotSpec, state_names: tuple[str, ...], action_names: tuple[str, ...]) -> RobotSpec:
    """The dataset's names instead of numbers, where they are as many."""
    actions, state = spec.actions, spec.state
    if len(action_names) == actions.width:
        actions = VectorSpec.uniform(actions.key, action_names, "unknown")
    if len(state) == 1 and len(state_names) == state[0].width:
        state = (VectorSpec.uniform(state[0].key, state_names, "unknown"),)
    return dataclasses.replace(spec, actions=actions, state=state)


def _default_prompt(transforms: Iterable[object]) -> str | None:
    prompts = (t.prompt for t in transforms if isinstance(t, _transforms.InjectDefaultPrompt))
    return next((prompt for prompt in prompts if prompt is not None), None)


def _from_json(document: Json) -> Contract:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']}, expected {_VERSION}")
    fields = {f.name: document[f.name] for f in dataclasses.fields(Contract) if f.name in document}
    fields["cameras"] = tuple(_camera(entry) for entry in fields["cameras"])
    fields["state"] = tuple(_vector(entry) for entry in fields["state"])
    fields["actions"] = _vector(fields["actions"])
    optional = ("hold", "action_low", "action_high", "action_max_step")  # which older files lack
    for name in ("trained_relative", "state_q01", "state_q99", *(name for name in optional if name in fields)):
        fields[name] = None if fields[name] is None else tuple(fields[name])
    if fields.get("seen") is not None:
        fields["seen"] = Seen.from_json(fields["seen"])
    fields["camera_means"] = {key: _triple(mean) for key, mean in fields["camera_means"].items()}
    contract = Contract(**fitted_fields(Contract, fields, "contract"))
    ranges.check(contract)
    _check_widths(contract)
    _check_bounds(contract)
    return contract


def _check_widths(contract: Contract) -> None:
    """Raises ValueError where parts of a contract are of different robots, so that nothing would be checked in full."""
    width = contract.actions.width
    for name in ("trained_relative", "hold", "action_low", "action_high", "action_max_step"):
        values = getattr(contract, name)
        if values and len(values) != width:
            raise ValueError(f"contract.{name} has {len(values)} values; expected {width}, one per action dimension")
    if len(contract.state_q01 or ()) != len(contract.state_q99 or ()):
        raise ValueError("contract.state_q01 and state_q99 have different widths")
    if not contract.state and contract.stats_widths.get("state"):
        raise ValueError(
            f"contract.state is empty; expected the vectors of a state of {contract.stats_widths['state']} dimensions, "
            "as the statistics have it"
        )


def _check_bounds(contract: Contract) -> None:
    """Raises ValueError for bounds that no robot can stay within, and for two vectors or cameras of one key."""
    for low, high in zip(contract.action_low or (), contract.action_high or (), strict=False):
        if low > high:
            raise ValueError(f"contract.action_low has {low}, above the {high} of action_high; expected it below")
    if wrong := [step for step in contract.action_max_step or () if step <= 0]:
        raise ValueError(f"contract.action_max_step has {wrong[0]}; expected more than 0, or the robot never moves")
    for name, keys in (("cameras", [c.key for c in contract.cameras]), ("state", [v.key for v in contract.state])):
        if len(set(keys)) < len(keys):
            raise ValueError(f"contract.{name} has the keys {listed(keys)}; expected each once")


def _vector_metadata(vector: VectorSpec) -> dict[str, object]:
    return {"key": vector.key, "width": vector.width, "names": list(vector.names), "units": list(vector.units)}


def _camera(entry: Json) -> CameraSpec:
    camera = CameraSpec(**fitted_fields(CameraSpec, entry, "camera"))
    if camera.shape is not None:  # servers make an image of this size to warm up with
        height, width = camera.shape
        if height < 1 or width < 1:
            raise ValueError(f"camera.shape is {camera.shape}; expected a height and a width")
        Budget(MAX_IMAGE_PIXELS, "pixels").spend(height * width, f"an image of camera '{camera.key}'")
    return camera


def _vector(entry: Json) -> VectorSpec:
    return VectorSpec(**fitted_fields(VectorSpec, {name: entry[name] for name in ("key", "names", "units")}, "vector"))


def _camera_facts(camera: CameraSpec) -> str:
    need = "required" if camera.required else "optional"
    return f"{camera.layout}, {_size(camera)}, {need}, becomes {camera.slot}"


def _size(camera: CameraSpec) -> str:
    return "any size" if camera.shape is None else f"{camera.shape[0]} x {camera.shape[1]}"


def _dims(vector: VectorSpec) -> str:
    """`a, b (rad); c (m)`: names with their units, neighbours of one unit together."""
    groups: list[tuple[list[str], str]] = []
    for name, unit in zip(vector.names, vector.units, strict=True):
        if groups and groups[-1][1] == unit:
            groups[-1][0].append(name)
        else:
            groups.append(([name], unit))
    return "; ".join(f"{', '.join(names)} ({unit})" for names, unit in groups)


def _triple(values: Iterable[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _rounded(mean: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.0f}" for value in mean)


def _as_tuple(values: np.ndarray | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values.tolist())
