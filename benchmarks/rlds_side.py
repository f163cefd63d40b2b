"""One measurement for `rlds.py`, in a process of its own: batches of decoded frames, one JSON line of numbers.

`ours` needs this project; `tf.data` needs only TensorFlow, and does the same with its own means: files shuffled and
interleaved, episodes parsed, one camera and one phrasing drawn, chunks, frames shuffled, images decoded. `--decode
before` decodes before the buffer, as is usual, and `--decode after` behind it, as we do.
"""

import argparse
import itertools
import json
import resource
import time
from pathlib import Path

HORIZON = 16
NUM_JOINTS = 7


def ours(folder: Path, batch: int, buffer: int, workers: int):
    from openpi.data.batch_loader import SourceLoader
    from openpi_rlds.episode import Frame
    from openpi_rlds.folder import open_folder
    from openpi_rlds.frame_ranges import FrameRanges
    from openpi_rlds.stream import Mixture, MixturePart, MixtureSource

    part = MixturePart(open_folder(folder, "droid", "1.0.1"), 1.0, FrameRanges())
    source = MixtureSource(Mixture([part], "joint_position", HORIZON), batch_size=batch, seed=0, buffer_size=buffer)
    return SourceLoader(source, Frame.decode, num_workers=workers)


def with_tf_data(folder: Path, batch: int, buffer: int, *, decode_first: bool):
    import tensorflow as tf

    observation = "steps/observation/"
    cameras = [f"{observation}{name}_left" for name in ("exterior_image_1", "exterior_image_2", "wrist_image")]
    texts = [f"steps/language_instruction{suffix}" for suffix in ("", "_2", "_3")]
    columns = {
        f"{observation}joint_position": 7,
        f"{observation}gripper_position": 1,
        "steps/action_dict/joint_position": 7,
        "steps/action_dict/gripper_position": 1,
    }
    wanted = {name: tf.io.RaggedFeature(tf.string) for name in (*cameras, *texts)}
    wanted |= {name: tf.io.RaggedFeature(tf.float32) for name in columns}
    wanted["episode_metadata/file_path"] = tf.io.FixedLenFeature([], tf.string)

    def parse(record):
        return tf.io.parse_single_example(record, wanted)

    def is_success(episode):
        return tf.strings.regex_full_match(episode["episode_metadata/file_path"], ".*success.*")

    def frames(episode):
        vectors = {name: tf.reshape(episode[name], (-1, width)) for name, width in columns.items()}
        actions = tf.concat(
            [vectors["steps/action_dict/joint_position"], vectors["steps/action_dict/gripper_position"]], axis=1
        )
        length = tf.shape(actions)[0]
        steps = tf.minimum(tf.range(length)[:, None] + tf.range(HORIZON)[None], length - 1)
        camera = tf.where(tf.random.uniform([]) < 0.5, episode[cameras[0]], episode[cameras[1]])
        phrasing = tf.random.shuffle(tf.stack([episode[name] for name in texts]))[0]
        return {
            "actions": tf.gather(actions, steps),
            "image": camera,
            "wrist_image": episode[cameras[2]],
            "joint_position": vectors[f"{observation}joint_position"],
            "gripper_position": vectors[f"{observation}gripper_position"],
            "prompt": phrasing,
        }

    def decode(frame):
        images = {key: tf.io.decode_jpeg(frame[key]) for key in ("image", "wrist_image")}
        return {**frame, **images}

    files = tf.data.Dataset.list_files(str(folder / "droid" / "1.0.1" / "*.tfrecord-*"), shuffle=True, seed=0).repeat()
    data = files.interleave(tf.data.TFRecordDataset, cycle_length=16, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.map(parse, num_parallel_calls=tf.data.AUTOTUNE).filter(is_success)
    data = data.map(frames, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.flat_map(tf.data.Dataset.from_tensor_slices)
    if decode_first:
        data = data.map(decode, num_parallel_calls=tf.data.AUTOTUNE).shuffle(buffer, seed=0)
    else:
        data = data.shuffle(buffer, seed=0).map(decode, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.autotune.ram_budget = 1
    return data.batch(batch).with_options(options).as_numpy_iterator()


def cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "tf.data"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--buffer", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--decode", choices=("before", "after"), default="before")
    args = parser.parse_args()
    if args.side == "ours":
        loader = ours(args.folder, args.batch, args.buffer, args.workers)
    else:
        loader = with_tf_data(args.folder, args.batch, args.buffer, decode_first=args.decode == "before")
    begin = time.perf_counter()
    running = iter(loader)
    next(running)
    first_s = time.perf_counter() - begin
    begin, cpu = time.perf_counter(), cpu_s()
    for _ in itertools.islice(running, args.batches):
        pass
    wall = time.perf_counter() - begin
    if args.side == "ours":
        running.close()
        loader.close()  # whose workers count only when they have ended
    found = {
        "frames": args.batches * args.batch,
        "wall_s": wall,
        "cpu_s": cpu_s() - cpu,
        "first_s": first_s,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
