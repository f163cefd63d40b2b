"""One episode of DROID: from the features of its record to columns, encoded images and frames.

Source: the training specification, section 9.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from openpi.data.dataset import Sample
from openpi.data.images import decode_image
from openpi.shared.errors import missing_key
from openpi_rlds.example import Values, required
from openpi_rlds.frame_ranges import FrameRanges, episode_key

ArmAction: TypeAlias = Literal["joint_position", "joint_velocity"]

NUM_JOINTS = 7
CONTROL_HZ = 15
IMAGE_SHAPE = (180, 320, 3)
EXTERIOR_CAMERAS = ("steps/observation/exterior_image_1_left", "steps/observation/exterior_image_2_left")
WRIST_CAMERA = "steps/observation/wrist_image_left"
INSTRUCTIONS = tuple(f"steps/language_instruction{suffix}" for suffix in ("", "_2", "_3"))
FILE_PATH = "episode_metadata/file_path"
RECORDING_FOLDER = "episode_metadata/recording_folderpath"
JOINTS, GRIPPER = "steps/observation/joint_position", "steps/observation/gripper_position"
GRIPPER_ACTION = "steps/action_dict/gripper_position"
IS_FIRST = "steps/is_first"
SUCCESS = "success"  # in the path of every episode that the operator called one


def arm_action(kind: ArmAction) -> str:
    return f"steps/action_dict/{kind}"


def column_names(kind: ArmAction) -> frozenset[str]:
    """The features of an episode but its images."""
    numbers = (JOINTS, GRIPPER, GRIPPER_ACTION, arm_action(kind), IS_FIRST)
    return frozenset({FILE_PATH, RECORDING_FOLDER, *numbers, *INSTRUCTIONS})


def feature_names(kind: ArmAction) -> frozenset[str]:
    """All features that training reads."""
    return column_names(kind) | {*EXTERIOR_CAMERAS, WRIST_CAMERA}


@dataclasses.dataclass(frozen=True)
class Episode:
    """The columns of an episode.

    Attributes:
        key: of the frame ranges.
        is_success: by its path.
        joints, gripper: float32[t 7], [t 1], measured; radians, 0 open .. 1 closed.
        actions: float32[t 8], joint positions or velocities and the gripper's position.
        instructions: one to three phrasings, each a UTF-8 string per frame.
    """

    key: str
    is_success: bool
    joints: np.ndarray
    gripper: np.ndarray
    actions: np.ndarray
    instructions: Sequence[Sequence[bytes]]

    def __len__(self) -> int:
        return len(self.actions)

    def chunks(self, t: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """For the frames int[n]: actions float32[n h 8], the last one repeated, and where they are, bool[n h]."""
        steps = t[:, None] + np.arange(horizon)
        inside = np.minimum(steps, len(self) - 1)
        return self.actions[inside], steps != inside


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame, its images still encoded: what waits to be shuffled, and what travels to a worker.

    Attributes:
        actions, is_pad: float32[h 8], bool[h].
        image, wrist_image: JPEG or PNG.
        prompt: UTF-8.
        step_id: `<recording folder>--<file>--<t>`.
    """

    actions: np.ndarray
    is_pad: np.ndarray
    joints: np.ndarray
    gripper: np.ndarray
    image: bytes
    wrist_image: bytes
    prompt: bytes
    step_id: str

    def decode(self) -> Sample:
        """The sample that the recipes' repack transforms expect; images uint8 [h w 3].

        Raises:
            ValueError: an image cannot be read.
        """
        return {
            "actions": self.actions,
            "actions_is_pad": self.is_pad,
            "observation": {
                "image": decode_image(self.image, f"{self.step_id}, exterior camera"),
                "wrist_image": decode_image(self.wrist_image, f"{self.step_id}, wrist camera"),
                "joint_position": self.joints,
                "gripper_position": self.gripper,
            },
            "prompt": self.prompt,
            "step_id": self.step_id.encode(),
        }


@dataclasses.dataclass(frozen=True)
class Visit:
    """An episode with what this pass over it drew, but without its images.

    Attributes:
        camera: the feature of its exterior images.
        instruction: UTF-8, per frame.
    """

    episode: Episode
    camera: str
    instruction: Sequence[bytes]

    def frame(self, t: int, image: bytes, wrist_image: bytes, horizon: int) -> Frame:
        episode = self.episode
        actions, is_pad = episode.chunks(np.array([t]), horizon)
        return Frame(
            actions=actions[0],
            is_pad=is_pad[0],
            joints=episode.joints[t],
            gripper=episode.gripper[t],
            image=image,
            wrist_image=wrist_image,
            prompt=self.instruction[t],
            step_id=f"{episode.key}--{t}",
        )


def draw_visit(episode: Episode, rng: np.random.Generator) -> Visit:
    """One exterior camera and one phrasing for the whole episode, uniformly."""
    camera = EXTERIOR_CAMERAS[int(rng.integers(len(EXTERIOR_CAMERAS)))]
    return Visit(episode, camera, episode.instructions[int(rng.integers(len(episode.instructions)))])


def make_episode(features: dict[str, Values], kind: ArmAction, where: str) -> Episode:
    """Columns from features; of an episode without steps, empty ones.

    Args:
        where: names the record in errors.
    Raises:
        KeyError, ValueError: a feature is missing, or has another length than the others; or it is several episodes.
    """
    file_path, folder = (text_of(features, name, where) for name in (FILE_PATH, RECORDING_FOLDER))
    arm = column_of(features, arm_action(kind), NUM_JOINTS, where)
    columns = {
        JOINTS: column_of(features, JOINTS, NUM_JOINTS, where),
        GRIPPER: column_of(features, GRIPPER, 1, where),
        GRIPPER_ACTION: column_of(features, GRIPPER_ACTION, 1, where),
    }
    check_one_episode(features, where)
    known: dict[bytes, bytes] = {}  # a phrasing is the same in every frame: one copy of it is enough
    phrasings = [
        [known.setdefault(text, text) for text in map(bytes, _strings(features, name, where))]
        for name in INSTRUCTIONS
        if name in features
    ]
    if not phrasings:
        raise missing_key(INSTRUCTIONS[0], features, wanted_by=where, fix="Is it a dataset in the form of DROID?")
    for name, column in (*columns.items(), *zip(INSTRUCTIONS, phrasings, strict=False)):
        _check_length(name, len(column), len(arm), where)
    actions = np.concatenate([arm, columns[GRIPPER_ACTION]], axis=1)
    is_success = SUCCESS in file_path
    return Episode(episode_key(folder, file_path), is_success, columns[JOINTS], columns[GRIPPER], actions, phrasings)


def kept_frames(episode: Episode, ranges: FrameRanges) -> np.ndarray:
    """int64[n]: those to train on; none of an episode that is no success.

    Raises:
        ValueError: one of them, or an action that follows, has a number that is not finite.
    """
    if not episode.is_success:
        return np.zeros(0, np.int64)
    kept = ranges.kept(episode.key, len(episode))
    if len(kept):
        onwards = np.arange(kept[0], len(episode))  # chunks go on behind the frames kept
        for name, values, frames in (
            ("actions", episode.actions, onwards),
            (JOINTS, episode.joints, kept),
            (GRIPPER, episode.gripper, kept),
        ):
            _check_finite(episode.key, name, values, frames)
    return kept


def _check_finite(key: str, name: str, values: np.ndarray, frames: np.ndarray) -> None:
    is_bad = ~np.isfinite(values[frames])
    if not is_bad.any():
        return
    bad_frames = frames[is_bad.any(axis=1)]
    dim = int(np.argmax(is_bad.any(axis=0)))
    raise ValueError(
        f"episode {key}: '{name}' is not finite in {len(bad_frames)} frames, the first {bad_frames[0]} (dimension "
        f"{dim}); expected finite numbers. Leave the episode out: give it no ranges in the file of frame ranges "
        "(filter_dict_path)"
    )


def images_of(features: dict[str, Values], camera: str, num_frames: int, where: str) -> Sequence[memoryview]:
    """The encoded images of a camera, one per frame; they keep the whole record in memory.

    Raises:
        KeyError, ValueError: the camera is missing, or has another number of images.
    """
    images = _strings(features, camera, where)
    _check_length(camera, len(images), num_frames, where)
    return images


def check_one_episode(features: dict[str, Values], where: str) -> None:
    """Raises ValueError where a later step says that it is the first: chunks would lead from one into the other."""
    firsts = np.flatnonzero(np.asarray(features.get(IS_FIRST, ())))
    if len(firsts) and firsts[-1] > 0:
        raise ValueError(f"{where}: '{IS_FIRST}' is true at step {firsts[-1]}, too; expected one episode a record")


def text_of(features: dict[str, Values], name: str, where: str) -> str:
    values = required(features, name, where)
    if not isinstance(values, list) or len(values) != 1:
        raise ValueError(f"{where}: '{name}' holds {len(values)} values; expected one text")
    try:
        return bytes(values[0]).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: '{name}' is {bytes(values[0])[:80]!r}; expected UTF-8") from error


def column_of(features: dict[str, Values], name: str, width: int, where: str) -> np.ndarray:
    """float32[t width]."""
    values = required(features, name, where)
    if not len(values):
        return np.zeros((0, width), np.float32)
    if not isinstance(values, np.ndarray) or len(values) % width:
        kind = "numbers" if isinstance(values, np.ndarray) else "byte strings"
        raise ValueError(f"{where}: '{name}' holds {len(values)} {kind}; expected {width} numbers per frame")
    return values.astype(np.float32, copy=False).reshape(-1, width)


def _strings(features: dict[str, Values], name: str, where: str) -> Sequence[memoryview]:
    values = required(features, name, where)
    if not isinstance(values, list):
        raise ValueError(f"{where}: '{name}' holds numbers; expected a byte string per frame")
    return values


def _check_length(name: str, found: int, expected: int, where: str) -> None:
    if found != expected:
        raise ValueError(f"{where}: '{name}' is given for {found} frames, the actions for {expected}")
