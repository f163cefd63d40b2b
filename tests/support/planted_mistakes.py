"""Datasets as good as a recorder makes them, and the mistakes that recorders make, planted in them.

A dataset is first a list of episodes in memory, on which most mistakes are made; those of files are made where they
lie. `test_dataset_check.py` plants a few of each, `benchmarks/dataset_check.py` all of them in two base sets.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter

Frames = dict[str, np.ndarray]

JOINTS = ("base", "shoulder", "elbow", "wrist_bend", "wrist_turn", "gripper")
HOME = np.array([0.2, 1.1, -1.6, -0.9, 0.4])


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A dataset in memory."""

    fps: int
    features: dict[str, dict[str, Any]]
    episodes: list[Frames]
    tasks: list[str]

    def replace(self, episode: int, frames: Frames) -> "Recorded":
        episodes = list(self.episodes)
        episodes[episode] = frames
        return dataclasses.replace(self, episodes=episodes)

    def write(self, root: Path, *, use_videos: bool = False) -> Path:
        with LeRobotWriter(root, fps=self.fps, features=self.features, use_videos=use_videos) as writer:
            for frames, task in zip(self.episodes, self.tasks, strict=True):
                writer.add_episode(frames, task)
        return root


def without_cameras(recorded: Recorded) -> Recorded:
    features = {key: feature for key, feature in recorded.features.items() if feature["dtype"] == "float32"}
    episodes = [{key: frames[key] for key in features} for frames in recorded.episodes]
    return dataclasses.replace(recorded, features=features, episodes=episodes)


def read(root: Path) -> Recorded:
    dataset = LeRobotDataset(root)
    keys = [key for key in dataset.keys if key in dataset.metadata.features and "index" not in key]
    keys.remove("timestamp")
    episodes, tasks = [], []
    for begin, end in dataset.episode_bounds:
        samples = [dataset[i] for i in range(begin, end)]
        episodes.append({key: np.stack([sample[key] for sample in samples]) for key in keys})
        tasks.append(samples[0]["task"])
    return Recorded(int(dataset.metadata.fps), {k: dict(dataset.metadata.features[k]) for k in keys}, episodes, tasks)


def arm(num_episodes: int, *, fps: int = 20, num_frames: int = 40, seed: int = 0, size: tuple[int, int] = (24, 32)):
    """An arm of five joints that goes through random points and follows its targets late, and what two cameras see."""
    rng = np.random.default_rng(seed)
    vector = {"dtype": "float32", "shape": (len(JOINTS),), "names": list(JOINTS)}
    camera = {"dtype": "image", "shape": (*size, 3), "names": ["height", "width", "channel"]}
    features = {"observation.images.top": camera, "observation.images.wrist": camera}
    features |= {"observation.state": vector, "action": vector}
    episodes = [_arm_episode(rng, num_frames + int(rng.integers(0, 8)), size) for _ in range(num_episodes)]
    tasks = [("stack the cups", "open the box")[i % 2] for i in range(num_episodes)]
    return Recorded(fps, features, episodes, tasks)


def _arm_episode(rng: np.random.Generator, n: int, size: tuple[int, int]) -> Frames:
    points = HOME + rng.normal(0, 0.25, (5, len(HOME)))
    targets = np.stack([_smooth(points[:, j], n) for j in range(len(HOME))], axis=1)
    closed = (np.arange(n) > 0.3 * n) & (np.arange(n) < 0.8 * n)
    targets = np.concatenate([targets, np.where(closed, 0.1, 0.9)[:, None]], axis=1)
    states, state = np.empty_like(targets), targets[0]
    for t in range(n):
        states[t] = state
        state = state + 0.6 * (targets[t] - state)
    states[:, :5] += rng.normal(0, 1e-3, (n, 5))
    top = _scene(states, size, (150, 110, 60), rng)
    wrist = _scene(states[:, ::-1], size, (60, 70, 90), rng)
    return {
        "observation.images.top": top,
        "observation.images.wrist": wrist[:, ::-1],
        "observation.state": states.astype(np.float32),
        "action": targets.astype(np.float32),
    }


def _smooth(points: np.ndarray, n: int) -> np.ndarray:
    """Through points that follow one another, standing still at each for a moment only."""
    position = np.linspace(0, len(points) - 1.001, n)
    left, share = position.astype(int), position % 1
    share = share * share * (3 - 2 * share)
    return points[left] * (1 - share) + points[left + 1] * share


def _scene(states: np.ndarray, size: tuple[int, int], color: tuple[int, int, int], rng: np.random.Generator):
    """A table with light from one corner, and the arm as a bar that moves over it."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    light = 0.5 + 0.6 * rows / height + 0.2 * columns / width
    table = np.clip(np.array(color) * light[..., None], 0, 255)
    table[: height // 4, : width // 3] = (40, 120, 160)
    frames = np.repeat(table[None], len(states), axis=0)
    block = rng.integers(0, [height - 4, width - 4])
    frames[:, block[0] : block[0] + 4, block[1] : block[1] + 4] = (200, 30, 30)
    for t, state in enumerate(states):
        column = int(np.clip(width / 2 + (state[0] - state[2]) * width / 6, 0, width - 4))
        row = int(np.clip(height / 2 + state[1] * height / 6, 0, height - 4))
        frames[t, row:, column : column + 4] = (230, 230, 225)
    noise = rng.integers(-3, 4, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


# --- mistakes in an episode -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Keys:
    """Of a base set: the columns and dimensions that mistakes are made in."""

    state: str
    action: str
    camera: str
    other_camera: str
    joint: int  # one that moves in every episode
    other_joint: int
    gripper: int


Mistake = Callable[[Frames, Keys], Frames]


def late(frames: Frames, k: Keys) -> Frames:
    action = frames[k.action]
    return frames | {k.action: np.concatenate([action[:1], action[:-1]])}


def early(frames: Frames, k: Keys) -> Frames:
    action = frames[k.action]
    return frames | {k.action: np.concatenate([action[2:], action[-1:], action[-1:]])}


def in_degrees(frames: Frames, k: Keys) -> Frames:
    return _scaled(_scaled(frames, k.state, k), k.action, k)


def actions_in_degrees(frames: Frames, k: Keys) -> Frames:
    return _scaled(frames, k.action, k)


def _scaled(frames: Frames, key: str, k: Keys) -> Frames:
    factors = np.full(frames[key].shape[1], np.rad2deg(1), np.float32)
    factors[k.gripper] = 1
    return frames | {key: frames[key] * factors}


def bgr(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: frames[k.camera][..., ::-1]}


def upside_down(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: frames[k.camera][:, ::-1, ::-1]}


def frozen(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: np.repeat(frames[k.camera][:1], len(frames[k.camera]), axis=0)}


def frozen_from_the_middle(frames: Frames, k: Keys) -> Frames:
    pictures = frames[k.camera].copy()
    pictures[len(pictures) // 3 :] = pictures[len(pictures) // 3]
    return frames | {k.camera: pictures}


def black(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: np.zeros_like(frames[k.camera])}


def one_color(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: np.full_like(frames[k.camera], 128)}


def cameras_exchanged(frames: Frames, k: Keys) -> Frames:
    return frames | {k.camera: frames[k.other_camera], k.other_camera: frames[k.camera]}


def four_frames(frames: Frames, k: Keys) -> Frames:
    return {key: values[:4] for key, values in frames.items()}


def _changed(frames: Frames, key: str, rows: Any, dim: int, values: Any) -> Frames:
    changed = frames[key].copy()
    changed[rows, dim] = values
    return frames | {key: changed}


def jump(frames: Frames, k: Keys) -> Frames:
    return _changed(frames, k.state, 12, k.joint, frames[k.state][12, k.joint] + 2.5)


def jump_of_actions(frames: Frames, k: Keys) -> Frames:
    return _changed(frames, k.action, slice(15, None), k.joint, frames[k.action][15:, k.joint] + 2.5)


def gripper_inverted(frames: Frames, k: Keys) -> Frames:
    for key in (k.state, k.action):
        values = frames[key][:, k.gripper]
        frames = _changed(frames, key, slice(None), k.gripper, values.min() + values.max() - values)
    return frames


def gripper_of_actions_inverted(frames: Frames, k: Keys) -> Frames:
    values = frames[k.action][:, k.gripper]
    return _changed(frames, k.action, slice(None), k.gripper, values.min() + values.max() - values)


def gripper_stuck(frames: Frames, k: Keys) -> Frames:
    return _changed(frames, k.state, slice(None), k.gripper, frames[k.state][0, k.gripper])


def joint_stuck(frames: Frames, k: Keys) -> Frames:
    return _changed(frames, k.state, slice(None), k.joint, frames[k.state][0, k.joint])


def joints_swapped(frames: Frames, k: Keys) -> Frames:
    return joints_of_actions_swapped(frames | {k.state: _swapped(frames[k.state], k)}, k)


def joints_of_actions_swapped(frames: Frames, k: Keys) -> Frames:
    return frames | {k.action: _swapped(frames[k.action], k)}


def _swapped(values: np.ndarray, k: Keys) -> np.ndarray:
    changed = values.copy()
    changed[:, [k.joint, k.other_joint]] = values[:, [k.other_joint, k.joint]]
    return changed


def sign_of_actions(frames: Frames, k: Keys) -> Frames:
    return _changed(frames, k.action, slice(None), k.joint, -frames[k.action][:, k.joint])


def sign(frames: Frames, k: Keys) -> Frames:
    return _changed(sign_of_actions(frames, k), k.state, slice(None), k.joint, -frames[k.state][:, k.joint])


def idle(frames: Frames, k: Keys) -> Frames:
    stretch = 100
    return {key: np.concatenate([v[:10], np.repeat(v[10:11], stretch, axis=0), v[10:]]) for key, v in frames.items()}


IN_EPISODES: dict[str, tuple[Mistake, str]] = {
    "actions one step late": (late, "actions.late"),
    "actions two steps early": (early, "actions.early"),
    "in degrees": (in_degrees, "consistency.units"),
    "actions in degrees": (actions_in_degrees, "consistency.units"),
    "BGR": (bgr, "videos.colors"),
    "camera upside down": (upside_down, "videos.upside-down"),
    "camera frozen": (frozen, "videos.frozen"),
    "camera frozen after a third": (frozen_from_the_middle, "videos.frozen"),
    "camera black": (black, "videos.black"),
    "camera grey": (one_color, "videos.one-color"),
    "cameras exchanged": (cameras_exchanged, "videos.other-camera"),
    "4 frames": (four_frames, "episodes.too-short"),
    "jump of 2.5 rad": (jump, "anomalies.jump"),
    "jump of the actions": (jump_of_actions, "anomalies.jump"),
    "gripper inverted": (gripper_inverted, "consistency.gripper"),
    "gripper of the actions inverted": (gripper_of_actions_inverted, "consistency.gripper"),
    "gripper stuck": (gripper_stuck, "anomalies.gripper-stuck"),
    "joint stuck": (joint_stuck, "anomalies.stuck"),
    "joints swapped": (joints_swapped, "consistency.joint-order"),
    "joints of the actions swapped": (joints_of_actions_swapped, "consistency.joint-order"),
    "sign of a joint": (sign, "consistency.sign"),
    "sign of an action": (sign_of_actions, "consistency.sign"),
    "idle for long": (idle, "anomalies.idle"),
}
"""By what people say: the mistake, and the code that has to be found."""


def plant(recorded: Recorded, mistake: Mistake, keys: Keys, episodes: Sequence[int]) -> Recorded:
    for episode in episodes:
        recorded = recorded.replace(episode, mistake(recorded.episodes[episode], keys))
    return recorded


# --- mistakes in files ----------------------------------------------------------------------------------------


def empty_task(root: Path) -> None:
    _change_table(root / "meta/tasks.parquet", "task", lambda values: ["", *values[1:]])


def duplicate_task(root: Path) -> None:
    _change_table(root / "meta/tasks.parquet", "task", lambda values: [values[0], values[0].upper() + ".", *values[2:]])


def wrong_totals(root: Path) -> None:
    _change_info(root, lambda info: info.update(total_frames=info["total_frames"] + 7))


def a_name_too_few(root: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        key = next(key for key in ("action", "actions") if key in info["features"])
        feature = info["features"][key]
        feature["names"] = [f"joint_{i}" for i in range(feature["shape"][0] - 1)]

    _change_info(root, change)


def stale_statistics(root: Path) -> None:
    path = root / "meta/stats.json"
    stats = json.loads(path.read_text())
    key = "action" if "action" in stats else "actions"
    stats[key]["mean"][1] += 0.5
    path.write_text(json.dumps(stats))


def wrong_fps(root: Path) -> None:
    _change_info(root, lambda info: info.update(fps=info["fps"] * 3))


def a_lost_time(root: Path) -> None:
    [path] = root.glob("data/*/*.parquet")
    _change_table(path, "timestamp", lambda values: [*values[:20], *(v + 0.5 for v in values[20:25]), *values[25:]])


def late_start(root: Path) -> None:
    [path] = root.glob("data/*/*.parquet")
    episodes = pq.read_table(path, columns=["episode_index"])["episode_index"].to_pylist()
    _change_table(path, "timestamp", lambda times: [t + 2 * (e == 1) for t, e in zip(times, episodes, strict=True)])


def unknown_task(root: Path) -> None:
    [path] = root.glob("data/*/*.parquet")
    _change_table(path, "task_index", lambda values: [*values[:-3], 77, 77, 77])


def infinite_state(root: Path) -> None:
    """In frames 7 and 8 of the first episode; the writer would refuse it."""
    [path] = root.glob("data/*/*.parquet")
    columns = pq.read_schema(path).names
    key = next(key for key in ("observation.state", "state") if key in columns)

    def change(rows: list[list[float]]) -> list[list[float]]:
        return [[np.inf if i == 1 and row in (7, 8) else v for i, v in enumerate(vs)] for row, vs in enumerate(rows)]

    _change_table(path, key, change)


def lfs_pointer(root: Path) -> None:
    path = next(iter(sorted([*root.glob("videos/**/*.mp4"), *root.glob("data/*/*.parquet")], reverse=True)))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def wrong_size(root: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        key = next(key for key, feature in info["features"].items() if feature["dtype"] in ("image", "video"))
        info["features"][key]["shape"] = [480, 640, 3]

    _change_info(root, change)


def spans_that_do_not_tile(root: Path) -> None:
    for path in root.glob("meta/episodes/*/*.parquet"):
        table = pq.read_table(path)
        for name in table.column_names:
            if name.endswith("from_timestamp"):
                values = [value + 0.2 * row for row, value in enumerate(table[name].to_pylist())]
                table = table.set_column(table.column_names.index(name), name, pa.array(values))
        pq.write_table(table, path)


def missing_video(root: Path) -> None:
    next(root.glob("videos/**/*.mp4")).unlink()


def cut_video(root: Path) -> None:
    path = next(root.glob("videos/**/*.mp4"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


IN_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty task": (empty_task, "training.empty-task"),
    "task twice": (duplicate_task, "training.duplicate-task"),
    "wrong totals": (wrong_totals, "metadata.totals"),
    "a name too few": (a_name_too_few, "metadata.names"),
    "stale statistics": (stale_statistics, "statistics.stale"),
    "wrong fps": (wrong_fps, "temporal.refused"),
    "a lost time": (a_lost_time, "temporal.refused"),
    "times from 2 s": (late_start, "temporal.start"),
    "unknown task": (unknown_task, "temporal.refused"),
    "infinite state": (infinite_state, "anomalies.not-finite"),
    "Git LFS pointer": (lfs_pointer, "portability.lfs-pointer"),
    "pictures of another size": (wrong_size, "videos.size"),
}
IN_VIDEO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "spans that do not tile": (spans_that_do_not_tile, "videos.layout"),
    "missing video": (missing_video, "videos.missing"),
    "video cut": (cut_video, "videos.layout"),
}


def copy(root: Path, to: Path) -> Path:
    return Path(shutil.copytree(root, to))


def _change_info(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def _change_table(path: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(path)
    values = pa.array(change(table[column].to_pylist()), table[column].type)
    pq.write_table(table.set_column(table.column_names.index(column), table.field(column), values), path)
