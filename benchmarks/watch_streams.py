"""Does a server tell what is wrong with a robot's observations, and nothing about a clean robot?

    python benchmarks/watch_streams.py RECIPE DATASET [--held-out 16]

What training saw is taken from all episodes but some; those are played as a robot would send them, clean and spoilt in
each way. A stream counts as told of when the code of its fault comes within 20 observations; any code in a clean stream
is a false alarm. Prints the table, and the time of a look.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from openpi.policies.seen import Seen
from openpi.policies.watch import Watch
from openpi.shared.tree import flatten
from openpi.training.config import get_config
from openpi.training.data import seen as seen_of
from openpi.training.data.moments import Moments

_OBSERVATIONS = 20
Stream = list[dict[str, Any]]


def cameras(stream: Stream) -> list[str]:
    return [key for key, value in stream[0].items() if np.ndim(value) == 3]


def state(stream: Stream) -> str:
    return max((k for k, v in stream[0].items() if np.ndim(v) == 1 and k != "actions"), key=lambda k: len(stream[0][k]))


def each(change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Callable[[Stream], Stream]:
    return lambda stream: [{**obs, **change(obs, i)} for i, obs in enumerate(stream)]


def swapped(stream: Stream) -> Stream:
    a, b, *_ = cameras(stream)
    return each(lambda obs, _: {a: obs[b], b: obs[a]})(stream)


def on_first_camera(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stream], Stream]:
    return lambda stream: each(lambda obs, _: {(k := cameras(stream)[0]): change(np.asarray(obs[k]))})(stream)


def frozen(stream: Stream) -> Stream:
    key = cameras(stream)[0]
    return each(lambda obs, _: {key: stream[0][key]})(stream)


def cropped(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return image[:height, :width].repeat(2, axis=0).repeat(2, axis=1)


def on_state(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Stream], Stream]:
    return lambda stream: each(lambda obs, _: {(k := state(stream)): change(np.array(obs[k], np.float64))})(stream)


def turned_gripper(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:-1], 1 - values[-1:]])


SPOILT: dict[str, tuple[str, Callable[[Stream], Stream]]] = {
    "cameras swapped": ("swapped", swapped),
    "camera frozen": ("frozen", frozen),
    "camera black": ("blank", on_first_camera(np.zeros_like)),
    "camera grey": ("blank", on_first_camera(lambda image: np.full_like(image, 128))),
    "camera upside down": ("turned", on_first_camera(lambda image: image[::-1])),
    "camera turned by 180 degrees": ("turned", on_first_camera(lambda image: image[::-1, ::-1])),
    "camera mirrored": ("turned", on_first_camera(lambda image: image[:, ::-1])),
    "camera cropped to a quarter": ("view", on_first_camera(cropped)),
    "state in degrees": ("units", on_state(lambda values: values * 180 / np.pi)),
    "state reversed": ("order", on_state(lambda values: values[::-1])),
    "gripper first": ("order", on_state(lambda values: np.roll(values, 1))),
    "gripper the other way round": ("polarity", on_state(turned_gripper)),
    "prompt of another task": ("prompt", each(lambda obs, _: {"prompt": "fold the towel"})),
}


def codes(seen: Seen, stream: Stream) -> set[str]:
    watch = Watch(seen)
    return {warning[1:].partition("]")[0] for obs in stream for warning in watch.look(obs)}


def streams(recordings: Moments) -> Iterator[Stream]:
    for episode, length in recordings.lengths.items():
        yield [flatten(recordings.at(episode, step).observation) for step in range(min(length, _OBSERVATIONS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("dataset")
    parser.add_argument("--held-out", type=int, default=16)
    args = parser.parse_args()
    from openpi.cli._explain_chain import pipeline, with_dataset

    config = with_dataset(get_config(args.recipe), args.dataset)
    data_config = pipeline(config, None).data_config
    numbers = seen_of.trained_on(config, data_config)
    held = numbers[:: max(1, len(numbers) // args.held_out)][: args.held_out]
    seen = seen_of.look(config, data_config, [number for number in numbers if number not in held])
    played = list(streams(Moments(config, data_config, held)))
    false = [codes(seen, stream) for stream in played]
    print("| stream | told of | with another code | of |\n| --- | --- | --- | --- |")
    print(f"| clean | {sum(map(bool, false))}: {sorted(set().union(*false))} | | {len(played)} |")
    for name, (code, spoil) in SPOILT.items():
        found = [codes(seen, spoil(stream)) for stream in played]
        told = sum(code in each_found for each_found in found)
        other = sum(bool(each_found) and code not in each_found for each_found in found)
        print(f"| {name} | {told} | {other} | {len(played)} |")
    watch, start = Watch(seen), time.perf_counter()
    for observation in played[0]:
        watch.look(observation)
    print(f"\nA look takes {1e3 * (time.perf_counter() - start) / len(played[0]):.3f} ms on average.")


if __name__ == "__main__":
    main()
