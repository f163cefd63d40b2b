"""Small recordings in the layouts of other programs, by plain h5py, zarr, av, rosbags and NumPy: nothing of ours.

Every function returns what it wrote, for tests to compare with.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import h5py
import numcodecs
import numpy as np
import zarr
from imagecodecs.numcodecs import Jpegxl, register_codecs
from PIL import Image
from rosbags import rosbag1, rosbag2
from rosbags.rosbag2 import StoragePlugin
from rosbags.typesys import Stores, get_typestore

ALOHA_CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")


def pictures(seed: int, count: int, height: int = 24, width: int = 32) -> np.ndarray:
    """uint8[n h w 3]: smooth, other in every frame, camera and color, so that JPEG and video keep them apart."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([rows * 4 + seed * 9 + 3 * t, columns * 3 + 5 * t, np.full_like(rows, 30 + 40 * (seed % 5))], axis=-1)
        for t in range(count)
    ]
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def jpeg(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def opened(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def walk(seed: int, count: int, width: int) -> np.ndarray:
    """float64[n width], joints that drift."""
    return np.sin(np.random.default_rng(seed).normal(size=(count, width)).cumsum(axis=0) * 0.2)


def aloha_episode(
    path: Path,
    seed: int,
    count: int = 9,
    *,
    cameras: Sequence[str] = ALOHA_CAMERAS,
    compression: str = "",
    is_mobile: bool = False,
    extra: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """One `episode_<n>.hdf5`.

    Args:
        compression: of the pictures: none, `padded` (as the mobile one's recorder does) or `variable` JPEG.
    Returns:
        Column of the dataset -> what it should hold; pictures as a decoder gives them.
    """
    written: dict[str, np.ndarray] = {
        "observation.state": walk(seed, count, 14),
        "observation.velocity": walk(seed + 1, count, 14),
        "observation.effort": walk(seed + 2, count, 14),
        "action": walk(seed + 3, count, 14),
    }
    if is_mobile:
        written["action.base"] = walk(seed + 4, count, 2)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = False
        file["observations/qpos"] = written["observation.state"]
        file["observations/qvel"] = written["observation.velocity"]
        file["observations/effort"] = written["observation.effort"]
        file["action"] = written["action"]
        if is_mobile:
            file["base_action"] = written["action.base"]
        for number, camera in enumerate(cameras):
            frames = pictures(seed + number, count)
            name = f"observations/images/{camera}"
            if compression:
                contents = [jpeg(frame) for frame in frames]
                frames = np.stack([opened(content) for content in contents])
                _write_encoded(file, name, contents, compression)
            else:
                file.create_dataset(name, data=frames, chunks=(1, *frames.shape[1:]))
            written[f"observation.images.{camera}"] = frames
        for name, values in (extra or {}).items():
            file[name] = values
    return written


def _write_encoded(file: h5py.File, name: str, contents: Sequence[bytes], compression: str) -> None:
    if compression == "variable":
        dataset = file.create_dataset(name, (len(contents),), dtype=h5py.vlen_dtype(np.uint8))
        for i, content in enumerate(contents):
            dataset[i] = np.frombuffer(content, np.uint8)
        return
    longest = max(map(len, contents))
    padded = np.stack([np.frombuffer(content.ljust(longest, b"\0"), np.uint8) for content in contents])
    file.create_dataset(name, data=padded, chunks=(1, longest))
    if "compress_len" not in file:
        file["compress_len"] = np.tile([float(len(content)) for content in contents], (4, 1))


def libero_file(path: Path, seed: int, lengths: Sequence[int], instruction: str) -> list[dict[str, np.ndarray]]:
    """One `<task>_demo.hdf5`; demos are written in the order of text, 10 before 2."""
    written = []
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "x", "language_instruction": instruction})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20, "robots": ["Panda"]}})
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["num_demos"] = len(lengths)
        for number, length in enumerate(lengths):
            at = seed + 10 * number
            poses, gripper, actions = walk(at, length, 6), walk(at + 1, length, 2), walk(at + 2, length, 7)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = length
            demo["actions"] = actions
            demo["states"] = walk(at + 3, length, 30)
            demo["obs/ee_states"], demo["obs/gripper_states"] = poses, gripper
            demo["obs/joint_states"] = walk(at + 4, length, 7)
            front, wrist = pictures(at, length, 16, 16), pictures(at + 1, length, 16, 16)
            demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = front, wrist
            state = np.hstack([poses, gripper])
            turned = {"image": np.rot90(front, 2, axes=(1, 2)), "wrist_image": np.rot90(wrist, 2, axes=(1, 2))}
            written.append({"state": state, "actions": actions, **turned})
    return written


def robomimic_file(path: Path, lengths: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Two robots' worth of observations, and lists of episodes: `train` has the even ones."""
    written = []
    with h5py.File(path, "w") as file:
        env = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}
        file.create_group("data").attrs["env_args"] = json.dumps(env)
        for number, length in enumerate(lengths):
            demo = file.create_group(f"data/demo_{number}")
            obs = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
            values = {name: walk(number + width, length, width) for name, width in obs.items()}
            for name, array in values.items():
                demo[f"obs/{name}"] = array
            frames = pictures(number, length, 16, 16)
            demo["obs/agentview_image"], demo["rewards"] = frames, np.zeros(length)
            demo["actions"] = walk(number, length, 7)
            state = np.hstack([values[name] for name in obs if name != "object"])
            columns = {"observation.state": state, "action": walk(number, length, 7)}
            written.append({**columns, "observation.images.agentview": frames})
        even = [f"demo_{number}" for number in range(0, len(lengths), 2)]
        file["mask/train"] = np.array(even, dtype="S8")
    return written


DROID_CAMERAS = {"1111": 1, "2222": 0, "3333": 2}  # id -> its type; 0 is the wrist's


def droid_episode(folder: Path, episode_id: str, seed: int, length: int, *, num_filmed: int | None = None) -> dict:
    """One raw episode; its wrist camera films `num_filmed` frames."""
    videos = folder / "recordings/MP4"
    videos.mkdir(parents=True)
    (folder / f"metadata_{episode_id}.json").write_text(json.dumps({"uuid": episode_id}))
    joints, gripper = walk(seed, length, 7), walk(seed + 1, length, 1)[:, 0]
    velocity, closing = walk(seed + 2, length, 7), walk(seed + 3, length, 1)[:, 0]
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["action/joint_velocity"], file["action/gripper_position"] = velocity, closing
        file["action/joint_position"] = walk(seed + 4, length, 7)
        file["observation/robot_state/joint_positions"] = joints
        file["observation/robot_state/gripper_position"] = gripper
        for camera, kind in DROID_CAMERAS.items():
            file[f"observation/camera_type/{camera}"] = np.full(length, kind)
    written = {"joint_position": joints, "gripper_position": gripper, "actions": np.column_stack([velocity, closing])}
    columns = {"1111": "exterior_image_1_left", "2222": "wrist_image_left", "3333": "exterior_image_2_left"}
    for number, (camera, column) in enumerate(columns.items()):
        filmed = num_filmed if num_filmed is not None and camera == "2222" else length
        frames = mp4(videos / f"{camera}.mp4", pictures(seed + number, filmed, 144, 256))
        mp4(videos / f"{camera}-stereo.mp4", pictures(seed + number, 2, 16, 16))
        sized = [Image.fromarray(frame).resize((320, 180), Image.Resampling.BICUBIC) for frame in frames]
        written[column] = np.stack([np.asarray(image) for image in sized])
    shortest = min(map(len, written.values()))
    return {key: values[:shortest] for key, values in written.items()}


def mp4(path: Path, frames: np.ndarray) -> np.ndarray:
    """Writes a video; returns its frames as they are in there."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=15, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def umi_buffer(path: Path, lengths: Sequence[int], *, zarr_format: int = 2) -> list[dict[str, np.ndarray]]:
    """UMI's `dataset.zarr(.zip)`; its pictures are JPEG XL without loss in version 2."""
    register_codecs("imagecodecs_jpegxl", verbose=False)
    total, ends = sum(lengths), np.cumsum(lengths)
    hand = {"eef_pos": 3, "eef_rot_axis_angle": 3, "gripper_width": 1}
    arrays = {f"data/robot0_{name}": walk(seed, total, width) for seed, (name, width) in enumerate(hand.items())}
    arrays["data/robot0_demo_start_pose"] = walk(9, total, 6)
    frames = pictures(1, total, 16, 16)
    is_old = zarr_format == 2
    compressor = numcodecs.Blosc("zstd") if is_old else "auto"
    store = zarr.storage.ZipStore(path, mode="w") if path.suffix == ".zip" else zarr.storage.LocalStore(path)
    group = zarr.open_group(store, mode="w", zarr_format=zarr_format)
    for name, values in {**arrays, "meta/episode_ends": ends}.items():
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=values.shape, compressors=compressor)[
            :
        ] = values
    packed = Jpegxl(level=0, lossless=True) if is_old else "auto"
    shape = {"shape": frames.shape, "dtype": frames.dtype, "chunks": (1, *frames.shape[1:])}
    group.create_array("data/camera0_rgb", compressors=packed, **shape)[:] = frames
    store.close()
    written = []
    for begin, end in zip(ends - lengths, ends, strict=True):
        state = np.hstack([arrays[f"data/robot0_{name}"][begin:end] for name in hand])
        action = np.vstack([state[1:], state[-1:]])
        columns = {"observation.state": state, "action": action}
        written.append({**columns, "observation.images.camera0_rgb": frames[begin:end]})
    return written


def pusht_buffer(path: Path, lengths: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Diffusion policy's, whose pictures are floats."""
    total, ends = sum(lengths), np.cumsum(lengths)
    arrays = {"state": walk(1, total, 5), "action": walk(2, total, 2), "n_contacts": walk(3, total, 1)}
    frames = pictures(1, total, 16, 16)
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for name, values in {**arrays, "img": frames.astype(np.float32)}.items():
        group.create_array(f"data/{name}", data=values.astype(np.float32), chunks=(3, *values.shape[1:]))
    group.create_array("meta/episode_ends", data=ends)
    return [
        {
            "observation.state": arrays["state"][end - length : end],
            "action": arrays["action"][end - length : end],
            "observation.images.img": frames[end - length : end],
        }
        for length, end in zip(lengths, ends, strict=True)
    ]


def calvin_split(
    folder: Path, first: int, last: int, stretches: Sequence[tuple[str, int, int]], *, annotations: object = None
) -> list[dict[str, np.ndarray]]:
    """A split with one stretch of play, and annotated stretches in it."""
    (folder / "lang_annotations").mkdir(parents=True)
    count = last - first + 1
    values = {"robot_obs": walk(1, count, 15), "rel_actions": walk(2, count, 7), "actions": walk(3, count, 7)}
    frames = {"rgb_static": pictures(1, count, 20, 20), "rgb_gripper": pictures(2, count, 12, 12)}
    others = {"scene_obs": walk(4, count, 24), "depth_static": np.zeros((count, 20, 20), np.float32)}
    for number in range(count):
        arrays = {name: array[number] for name, array in {**values, **frames, **others}.items()}
        np.savez_compressed(folder / f"episode_{first + number:07d}.npz", **arrays)
    np.save(folder / "ep_start_end_ids.npy", np.array([[first, last]]))
    told = annotations or {
        "language": {
            "ann": [text for text, *_ in stretches],
            "task": ["x"] * len(stretches),
            "emb": np.zeros((2, 1, 4)),
        },
        "info": {"episodes": [], "indx": [(begin, end) for _, begin, end in stretches]},
    }
    np.save(folder / "lang_annotations/auto_lang_ann.npy", np.array(told, dtype=object))
    columns = {"state": values["robot_obs"], "actions": values["rel_actions"], **frames}
    return [
        {name: array[begin - first : end + 1 - first] for name, array in columns.items()} for _, begin, end in stretches
    ]


def ros_bag(path: Path, form: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A bag with two cameras (one BGR and padded, one JPEG), joints at 50 Hz and commands at 30 Hz.

    Args:
        form: `ros1`, `ros2` or `ros2 mcap`.
    Returns:
        Topic -> times in ns, and values, pictures in RGB.
    """
    store = get_typestore(Stores.ROS1_NOETIC if form == "ros1" else Stores.ROS2_HUMBLE)
    plugin = StoragePlugin.MCAP if form == "ros2 mcap" else StoragePlugin.SQLITE3
    writer = rosbag1.Writer(path) if form == "ros1" else rosbag2.Writer(path, version=9, storage_plugin=plugin)
    rates = {"/camera/front/image_raw": 20, "/wrist/image/compressed": 25, "/joint_states": 50, "/arm/command": 30}
    times = {
        topic: 1_700_000_000_000_000_000 + 1_000_000 * number + np.arange(rate // 2) * (1_000_000_000 // rate)
        for number, (topic, rate) in enumerate(rates.items())
    }
    front, wrist = pictures(1, 10, 16, 16), pictures(2, 12, 16, 16)
    jpegs = [jpeg(picture) for picture in wrist]
    joints, commands, fingers = walk(1, 25, 3), walk(2, 15, 2), walk(3, 12, 1)
    finger_times = times["/joint_states"][::2][:12] + 500_000
    kinds = {
        "/camera/front/image_raw": ("sensor_msgs/msg/Image", lambda i: _image(store, form, front[i])),
        "/wrist/image/compressed": ("sensor_msgs/msg/CompressedImage", lambda i: _jpeg_message(store, form, jpegs[i])),
        "/joint_states": ("sensor_msgs/msg/JointState", lambda i: _joints(store, form, joints[i])),
        "/arm/command": ("std_msgs/msg/Float64MultiArray", lambda i: _array(store, commands[i])),
    }
    serialize = store.serialize_ros1 if form == "ros1" else store.serialize_cdr
    with writer:
        for topic, (kind, message) in kinds.items():
            connection = writer.add_connection(topic, kind, typestore=store)
            for number, time in enumerate(times[topic].tolist()):
                writer.write(connection, time, serialize(message(number), kind))
            if topic == "/joint_states":  # another node speaks on it, too
                for time, value in zip(finger_times.tolist(), fingers, strict=True):
                    writer.write(connection, time, serialize(_joints(store, form, value, ["finger"]), kind))
    values = {"/joint_states": joints, "/arm/command": commands, "/camera/front/image_raw": front}
    values["/wrist/image/compressed"] = np.stack([opened(content) for content in jpegs])
    return {topic: (times[topic], values[topic]) for topic in rates} | {"finger": (finger_times, fingers)}


def ros2_bag_by_stamps(path: Path, picture_ns: Sequence[int], joint_ns: Sequence[int]) -> None:
    """A camera and joints [i], each message with a stamp; those of a topic arrive 50 ms after each other."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    messages = [("/camera", stamp, i) for i, stamp in enumerate(picture_ns)]
    messages += [("/joint_states", stamp, i) for i, stamp in enumerate(joint_ns)]
    kinds = {"/camera": "sensor_msgs/msg/Image", "/joint_states": "sensor_msgs/msg/JointState"}
    frames = pictures(1, len(picture_ns), 16, 16)
    with rosbag2.Writer(path, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
        connections = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in kinds.items()}
        for topic, stamp, i in messages:
            is_camera = topic == "/camera"
            made = (
                _image(store, "ros2", frames[i]) if is_camera else _joints(store, "ros2", np.array([float(i)]), ["a"])
            )
            made.header.stamp.sec, made.header.stamp.nanosec = divmod(stamp, 1_000_000_000)
            writer.write(connections[topic], 10**18 + 50_000_000 * i, store.serialize_cdr(made, kinds[topic]))


def ros1_bag_of_type(path: Path, name: str) -> None:
    with rosbag1.Writer(path) as writer:
        connection = writer.add_connection("/x", f"std_msgs/msg/{name}", msgdef="float64 a", md5sum="0" * 32)
        writer.write(connection, 1, b"\0" * 8)


def _header(store, form: str):
    time = store.types["builtin_interfaces/msg/Time"](sec=1, nanosec=2)
    more = {"seq": 0} if form == "ros1" else {}
    return store.types["std_msgs/msg/Header"](stamp=time, frame_id="base", **more)


def _image(store, form: str, picture: np.ndarray):
    height, width, _ = picture.shape
    rows = np.zeros((height, 3 * width + 5), np.uint8)
    rows[:, : 3 * width] = picture[..., ::-1].reshape(height, -1)
    about = {"height": height, "width": width, "encoding": "bgr8", "is_bigendian": 0, "step": rows.shape[1]}
    return store.types["sensor_msgs/msg/Image"](header=_header(store, form), data=rows.ravel(), **about)


def _jpeg_message(store, form: str, content: bytes):
    data = np.frombuffer(content, np.uint8)
    return store.types["sensor_msgs/msg/CompressedImage"](header=_header(store, form), format="jpeg", data=data)


def _joints(store, form: str, values: np.ndarray, names: Sequence[str] = ("elbow", "shoulder", "grip")):
    empty = np.zeros(0)
    return store.types["sensor_msgs/msg/JointState"](
        header=_header(store, form), name=list(names), position=values, velocity=empty, effort=empty
    )


def _array(store, values: np.ndarray):
    layout = store.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
    return store.types["std_msgs/msg/Float64MultiArray"](layout=layout, data=values)
