"""Small recordings in the layouts of other programs, written by plain h5py, zarr, av and NumPy: nothing of ours is used.

Every function returns what it wrote, for tests to compare with.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

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
