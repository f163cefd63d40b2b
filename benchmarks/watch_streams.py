"""Does a server tell what is wrong with a robot's observations, and nothing about a clean robot?

    python benchmarks/watch_streams.py RECIPE DATASET [--held-out 16]

What training saw is taken from all episodes but some; those are played as a robot would send them, clean and spoilt in
each way. A stream counts as told of when the code of its fault comes within 20 observations; any code in a clean stream
is a false alarm. Then the same episodes one after the other, each from beginning to end, as one long session in which
something changes little by little; and as sessions at the right rate and at wrong ones, with the recorded actions as
answers. Prints the tables; what a look takes is in `host_overhead.py`.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from openpi.policies.contract import Contract
from openpi.policies.pace import Pace
from openpi.policies.seen import Seen
from openpi.policies.watch import Watch
from openpi.shared.tree import flatten
from openpi.training.config import get_config
from openpi.training.data import holdout, recipe_data
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


def creeping(change: Callable[[dict[str, Any], float], dict[str, Any]]) -> Callable[[Stream], Stream]:
    """From nothing at the beginning to all at the end."""
    return lambda stream: each(lambda obs, i: change(obs, i / max(1, len(stream) - 1)))(stream)


def tinted(channels: list[int], factor: float) -> Callable[[dict[str, Any], float], dict[str, Any]]:
    def change(obs: dict[str, Any], part: float) -> dict[str, Any]:
        key = cameras([obs])[0]
        image = np.array(obs[key], np.float32)
        image[..., channels] *= 1 + (factor - 1) * part
        return {key: image.clip(0, 255).astype(np.uint8)}

    return change


def offset(seen: Seen, dimension: int) -> Callable[[dict[str, Any], float], dict[str, Any]]:
    def change(obs: dict[str, Any], part: float) -> dict[str, Any]:
        key = state([obs])
        span = seen.state[key].high[dimension] - seen.state[key].low[dimension]
        values = np.array(obs[key], np.float64)
        values[dimension] += 0.6 * part * span
        return {key: values}

    return change


def slow_changes(seen: Seen, stream: Stream) -> dict[str, Callable[[Stream], Stream]]:
    key = state(stream)
    return {
        "clean": lambda stream: stream,
        **{f"{key}[{i}] moves by 0.6 of its range": creeping(offset(seen, i)) for i in range(len(seen.state[key].low))},
        "camera darkens to a third": creeping(tinted([0, 1, 2], 0.33)),
        "camera loses half of its blue": creeping(tinted([2], 0.5)),
    }


def told_rate(contract: Contract, recordings: Moments, episodes: list[int], rows: int, loop_hz: float) -> bool:
    """Of a robot that plays so many rows of each chunk at this rate; answers take 30 ms, ticks vary by 1 ms."""
    rng, pace, now_s = np.random.default_rng(0), Pace(contract), 0.0
    told = False
    for episode in episodes:
        for step in range(0, recordings.lengths[episode], rows):
            moment = recordings.at(episode, step)
            told |= bool(list(pace.asked(flatten(moment.observation), now_s)))
            pace.answered(moment.recorded, now_s + 0.03)
            now_s += max(rows / loop_hz, 0.03 + (rows - 1) / loop_hz) + rng.normal(0, 0.001)
    return told


def codes(seen: Seen, stream: Stream) -> set[str]:
    watch = Watch(seen)
    return {warning[1:].partition("]")[0] for obs in stream for warning in watch.look(obs)}


def streams(recordings: Moments) -> Iterator[Stream]:
    for episode, length in recordings.lengths.items():
        yield [flatten(recordings.at(episode, step).observation) for step in range(min(length, _OBSERVATIONS))]


def slow(seen: Seen, recordings: Moments) -> None:
    stream = [
        flatten(recordings.at(episode, step).observation)
        for episode, length in recordings.lengths.items()
        for step in range(length)
    ]
    print(f"\n| session of {len(stream)} observations | codes | told of at |\n| --- | --- | --- |")
    for name, change in slow_changes(seen, stream).items():
        watch, told, first = Watch(seen), dict[str, None](), "never"
        for i, observation in enumerate(change(stream)):
            found = [warning[1:].partition("]")[0] for warning in watch.look(observation)]
            first = f"{i / len(stream):.0%}" if "drift" in found and "drift" not in told else first
            told |= dict.fromkeys(found)
        print(f"| {name} | {', '.join(told)} | {first} |")


def rates(config: Any, data_config: Any, held: list[int], seen: Seen) -> None:
    recordings = Moments(config, data_config, held)
    fps = float(recordings.dataset.metadata.fps)
    contract = dataclasses.replace(Contract.build(data_config, config.model, control_hz=fps), seen=seen)
    horizon = contract.action_horizon
    played = sorted({1, 2, horizon // 4, horizon // 2, horizon} - {0})
    groups = [held[i::4] * 4 for i in range(4)]
    print(f"\n| loop, trained at {fps:g} Hz | told of, by rows played of {horizon} | of each |\n| --- | --- | --- |")
    for factor in (1, 0.8, 1.25, 0.5, 0.4, 0.2, 2.5, 4):
        told = {rows: sum(told_rate(contract, recordings, g, rows, factor * fps) for g in groups) for rows in played}
        print(f"| {factor * fps:g} Hz | {', '.join(f'{rows}: {n}' for rows, n in told.items())} | {len(groups)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("dataset")
    parser.add_argument("--held-out", type=int, default=16)
    args = parser.parse_args()
    config = recipe_data.with_dataset(get_config(args.recipe), args.dataset)
    data_config = recipe_data.expanded(config)
    dataset = recipe_data.open_lerobot(data_config, config.model)
    numbers, _ = holdout.split_dataset(config, data_config, dataset)
    held = numbers[:: max(1, len(numbers) // args.held_out)][: args.held_out]
    seen = seen_of.look(config, data_config, dataset, [number for number in numbers if number not in held])
    played = list(streams(Moments(config, data_config, held)))
    false = [codes(seen, stream) for stream in played]
    print("| stream | told of | with another code | of |\n| --- | --- | --- | --- |")
    print(f"| clean | {sum(map(bool, false))}: {sorted(set().union(*false))} | | {len(played)} |")
    for name, (code, spoil) in SPOILT.items():
        found = [codes(seen, spoil(stream)) for stream in played]
        told = sum(code in each_found for each_found in found)
        other = sum(bool(each_found) and code not in each_found for each_found in found)
        print(f"| {name} | {told} | {other} | {len(played)} |")
    slow(seen, Moments(config, data_config, held))
    rates(config, data_config, held, seen)


if __name__ == "__main__":
    main()
