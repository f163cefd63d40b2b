"""Small datasets in the form of DROID, as TFDS writes them, through the real `protobuf`."""

import dataclasses
import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from openpi.training.data_config import RLDSDroidDataConfig
from openpi_rlds.tfrecord import masked_crc32c

HEIGHT, WIDTH = 180, 320
CAMERAS = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")


def _example_class():
    """`tf.train.Example`, from its published definition."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="test", syntax="proto3")
    for name, kind in (
        ("BytesList", field.TYPE_BYTES),
        ("FloatList", field.TYPE_FLOAT),
        ("Int64List", field.TYPE_INT64),
    ):
        message = file.message_type.add(name=name)
        message.field.add(name="value", number=1, type=kind, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), start=1):
        kind = "".join(part.capitalize() for part in name.split("_"))
        feature.field.add(
            name=name, number=number, type=field.TYPE_MESSAGE, type_name=f".test.{kind}", oneof_index=0, label=1
        )
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=1)
    entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, type_name=".test.Feature", label=1)
    features.field.add(
        name="feature", number=1, type=field.TYPE_MESSAGE, type_name=".test.Features.FeatureEntry", label=3
    )
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=field.TYPE_MESSAGE, type_name=".test.Features", label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Example"))


Example = _example_class()


def encode(features: Mapping[str, Sequence | np.ndarray]) -> bytes:
    """An `Example` with byte strings, floats or integers by name."""
    example = Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            feature.float_list.value.extend(values.ravel().tolist())
        elif isinstance(values, np.ndarray):
            feature.int64_list.value.extend(values.ravel().tolist())
        else:
            feature.bytes_list.value.extend(values)
    return example.SerializeToString()


@dataclass(frozen=True)
class RecordedEpisode:
    """What was written: arrays by the name of their feature, images decoded."""

    features: Mapping[str, Sequence | np.ndarray]
    images: dict[str, np.ndarray]

    @property
    def key(self) -> str:
        return "--".join(
            self.features[f"episode_metadata/{name}"][0].decode() for name in ("recording_folderpath", "file_path")
        )

    def __len__(self) -> int:
        return len(self.features["steps/is_first"])


def episode(name: str, number: int, length: int, *, is_success: bool = True) -> RecordedEpisode:
    """Cameras of one colour per camera, with a corner that tells the frame; joints that drift."""
    rng = np.random.default_rng((number, *name.encode()))
    images, encoded = {}, {}
    for camera, key in enumerate(CAMERAS):
        frames = [_image(number, camera, t) for t in range(length)]
        encoded[key] = [_jpeg(frame) for frame in frames]
        images[key] = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in encoded[key]])
    kind = "success" if is_success else "failure"
    path = f"/data/{name}/{kind}/day_{number}"

    def walk(width: int) -> np.ndarray:
        return np.sin(rng.normal(size=(length, width)).cumsum(axis=0) * 0.2).astype(np.float32)

    features: dict[str, Sequence] = {
        "episode_metadata/file_path": [f"{path}/trajectory.h5".encode()],
        "episode_metadata/recording_folderpath": [f"{path}/recordings/MP4".encode()],
        "steps/is_first": (np.arange(length) == 0).astype(np.int64),
        "steps/reward": np.zeros(length, np.float32),
        "steps/observation/joint_position": walk(7),
        "steps/observation/gripper_position": walk(1),
        "steps/action_dict/joint_position": walk(7),
        "steps/action_dict/joint_velocity": walk(7),
        "steps/action_dict/gripper_position": walk(1),
    }
    for i, suffix in enumerate(("", "_2", "_3")):
        features[f"steps/language_instruction{suffix}"] = [f"phrasing {i} of task {number}".encode()] * length
    features |= {f"steps/observation/{key}": frames for key, frames in encoded.items()}
    return RecordedEpisode(features, images)


def write(data_dir: Path, name: str, version: str, episodes: Sequence[RecordedEpisode], *, num_shards: int = 2) -> Path:
    """The folder of a dataset."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    lengths = []
    for i, chosen in enumerate(np.array_split(np.arange(len(episodes)), num_shards)):
        file = folder / f"{name}-train.tfrecord-{i:05d}-of-{num_shards:05d}"
        file.write_bytes(b"".join(framed(encode(episodes[j].features)) for j in chosen))
        lengths.append(str(len(chosen)))
    split = {
        "name": "train",
        "shardLengths": lengths,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"fileFormat": "tfrecord", "name": name, "splits": [split], "version": version}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def of_recipe(data: RLDSDroidDataConfig, folder: Path) -> RLDSDroidDataConfig:
    """The data half of a recipe on small datasets of the names it reads, all but the first frames of which are kept."""
    datasets = []
    for dataset in data.datasets:
        episodes = [episode(dataset.name, i, 12, is_success=i != 1) for i in range(4)]
        if not (folder / dataset.name).exists():
            write(folder, dataset.name, dataset.version, episodes)
        ranges = folder / f"{dataset.name}.json"
        ranges.write_text(json.dumps({each.key: [[2, len(each)]] for each in episodes}))
        datasets.append(dataclasses.replace(dataset, filter_dict_path=str(ranges)))
    return dataclasses.replace(data, rlds_data_dir=str(folder), datasets=datasets, shuffle_buffer_size=32)


def _image(number: int, camera: int, t: int) -> np.ndarray:
    image = np.full((HEIGHT, WIDTH, 3), (60 + 60 * camera, 40 + 20 * (number % 8), 128), np.uint8)
    image[:16, : 4 * (t % 64 + 1)] = 250
    return image


def _jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def framed(data: bytes) -> bytes:
    """A record as it stands in a TFRecord file."""
    parts = (struct.pack("<Q", len(data)), data)
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in parts)
