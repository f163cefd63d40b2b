"""Writes a small dataset in the form of DROID with TFDS, and what TFDS reads back from it: `make.py FOLDER`."""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

HEIGHT, WIDTH = 18, 32
EPISODES = ((5, True), (3, False), (4, True), (2, True), (3, True))  # frames, success
CAMERAS = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
ACTIONS = {f"{kind}_{what}": width for kind, width in (("joint", 7), ("gripper", 1), ("cartesian", 6))
           for what in ("position", "velocity")}  # fmt: skip
STATES = {"joint_position": 7, "gripper_position": 1, "cartesian_position": 6}
INSTRUCTIONS = tuple(f"language_instruction{suffix}" for suffix in ("", "_2", "_3"))


def vectors(widths):
    return {key: tfds.features.Tensor(shape=(width,), dtype=np.float64) for key, width in widths.items()}


def features():
    image = {"shape": (HEIGHT, WIDTH, 3), "dtype": np.uint8, "encoding_format": "jpeg"}
    steps = {
        "observation": {key: tfds.features.Image(**image) for key in CAMERAS} | vectors(STATES),
        "action_dict": vectors(ACTIONS),
        **vectors({"action": 7}),
        **dict.fromkeys(("discount", "reward"), np.float32),
        **dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_),
        **{key: tfds.features.Text() for key in INSTRUCTIONS},
    }
    metadata = {key: tfds.features.Text() for key in ("recording_folderpath", "file_path")}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps), "episode_metadata": metadata})


def image(number, camera, t):
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    red, green, blue = x * 6 + 3 * t + 20 * camera, y * 12 + 40 * number, np.full_like(x, 8 * t + 60 * camera)
    return (np.stack([red, green, blue], axis=-1) % 256).astype(np.uint8)


def episode(number, length, is_success):
    rng = np.random.default_rng(number)

    def walks(widths):
        return {key: np.sin(rng.normal(size=(length, width)).cumsum(0) * 0.2) for key, width in widths.items()}

    actions, states = walks(ACTIONS), walks(STATES)
    texts = (f"pick up object {number}", f"take object {number}" if number % 2 else "", f"lift thing {number}")
    steps = [
        {
            "observation": {key: image(number, camera, t) for camera, key in enumerate(CAMERAS)}
            | {key: value[t] for key, value in states.items()},
            "action_dict": {key: value[t] for key, value in actions.items()},
            "action": actions["joint_velocity"][t],
            "discount": 1.0,
            "reward": float(t == length - 1),
            "is_first": t == 0,
            "is_last": t == length - 1,
            "is_terminal": t == length - 1,
            **dict(zip(INSTRUCTIONS, texts, strict=True)),
        }
        for t in range(length)
    ]
    folder = f"/nfs/droid/{'success' if is_success else 'failure'}/2023-0{number + 1}-01/run_{number}"
    metadata = {"recording_folderpath": f"{folder}/recordings/MP4", "file_path": f"{folder}/trajectory.h5"}
    return {"steps": steps, "episode_metadata": metadata}


class Droid(tfds.core.GeneratorBasedBuilder):
    name = "droid"
    VERSION = tfds.core.Version("1.0.1")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=features())

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number, (length, is_success) in enumerate(EPISODES):
            yield number, episode(number, length, is_success)


def read(folder):
    """Arrays by episode, as TFDS decodes them; images with the accurate transform instead of TensorFlow's fast one."""
    arrays = {}
    encoded = {"steps": {"observation": dict.fromkeys(CAMERAS, tfds.decode.SkipDecoding())}}
    builder = tfds.builder_from_directory(folder)
    dataset = builder.as_dataset(split="train", shuffle_files=False, decoders=encoded)
    for i, found in enumerate(dataset):
        steps = list(found["steps"])
        for key, value in found["episode_metadata"].items():
            arrays[f"{i}/{key}"] = np.array(value.numpy().decode())
        for group in ("observation", "action_dict"):
            for key in steps[0][group]:
                values = [step[group][key] for step in steps]
                if key in CAMERAS:
                    values = [tf.io.decode_jpeg(value, dct_method="INTEGER_ACCURATE") for value in values]
                arrays[f"{i}/{group}/{key}"] = np.stack([value.numpy() for value in values])
        for key in INSTRUCTIONS:
            arrays[f"{i}/{key}"] = np.array([step[key].numpy().decode() for step in steps])
    return arrays


if __name__ == "__main__":
    out = Path(sys.argv[1])
    builder = Droid(data_dir=str(out))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    np.savez_compressed(out / "read_by_tfds.npz", **read(str(out / "droid" / "1.0.1")))
