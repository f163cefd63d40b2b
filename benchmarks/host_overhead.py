"""What a request costs the host: `Policy.infer` around a model that takes no time, and what looks at every observation.

    python benchmarks/host_overhead.py [--seconds 3] [--kernel exact|torch] [--threads 1]

Times are of the processor (of all threads of this process, but with `--wall`): of each observation the least of all its
turns, and of these the average, since others on the machine do not count. The pipelines are those of the recipes
`pi05_droid` and `pi05_aloha`, contracts included; images are as robots send them: two of DROID, [h, w, 3], three of
ALOHA, [3, h, w]. The robot moves through a room that training saw in as many views as a contract keeps. The path is
what a session's thread does: `Policy.infer`, with the guards of the contract and the range, and the watch; how a
message is decoded is in `round_trip.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.contract import Contract
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.guards import ContractGuard, RangeGuard
from openpi.policies.images import looked_at_once
from openpi.policies.policy import Policy
from openpi.policies.policy_config import make_pipeline
from openpi.policies.seen import MAX_VIEWS, Seen
from openpi.serving.client_log import ClientLog
from openpi.serving.watching import Watching
from openpi.shared.normalize import NormStats
from openpi.shared.tree import flatten, unflatten
from openpi.training.config import get_config
from openpi_client import image_tools

TOKENIZER = Path(__file__).parents[1] / "tests/golden/tokenizers/tiny_paligemma_tokenizer.model"
SIZES = ((224, 224), (480, 640), (720, 1280))
WIDTHS = {"pi05_droid": 8, "pi05_aloha": 14}
EXAMPLES = {"pi05_droid": make_droid_example, "pi05_aloha": make_aloha_example}


class Free:
    """A sampler whose answer is there already."""

    takes_noise = True

    def __init__(self, horizon: int, dim: int):
        self.action_horizon, self.action_dim = horizon, dim
        self._actions = np.zeros((1, horizon, dim), np.float32)

    def sample(self, inputs: Mapping[str, Any], noise: np.ndarray | None, **sample_kwargs: Any) -> np.ndarray:
        return self._actions


def policy_of(name: str, seen: Seen) -> Policy:
    recipe = get_config(name)
    model: Any = dataclasses.replace(recipe.model, tokenizer_path=str(TOKENIZER))
    data = recipe.data.create(Path("/nowhere"), model)
    stats = NormStats(*(np.full(WIDTHS[name], value) for value in (0.0, 1.0, -2.0, 2.0)))
    data = dataclasses.replace(data, norm_stats={"state": stats, "actions": stats})
    contract = Contract.build(data, model, control_hz=15)
    hold = ("stay",) * contract.actions.width  # which takes the rate of requests the longest
    means = {camera.key: (120.0, 100.0, 80.0) for camera in contract.cameras if camera.slot}
    pipeline = make_pipeline(data, dataclasses.replace(contract, camera_means=means, seen=seen, hold=hold))
    return Policy(
        Free(model.action_horizon, model.action_dim),
        transforms=pipeline.inputs,
        output_transforms=pipeline.outputs,
        contract=pipeline.contract,
    )


def episode(name: str, size_hw: tuple[int, int], steps: int, seed: int) -> list[dict[str, Any]]:
    """Of a robot that moves before its cameras."""
    rng = np.random.default_rng(seed)
    example = {key: value for key, value in flatten(EXAMPLES[name]()).items() if key != "images/cam_low"}
    cameras = [key for key, value in example.items() if np.ndim(value) == 3]
    rooms = {key: room(i, size_hw) for i, key in enumerate(cameras)}
    begin, end = rng.uniform(0.1, 0.9, 2)
    path = np.linspace(begin, end, steps)
    return [unflatten(example | moment(example, rooms, place, rng)) for place in path]


def room(number: int, size_hw: tuple[int, int]) -> Image.Image:
    coarse = np.random.default_rng(number).integers(40, 200, (6, 6, 3), dtype=np.uint8)
    coarse[..., 2] //= 2  # warm light, that red and blue can be told by
    return Image.fromarray(coarse).resize((size_hw[1], size_hw[0]), Image.Resampling.BICUBIC)


def moment(
    example: dict[str, Any], rooms: dict[str, Image.Image], place: float, rng: np.random.Generator
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, image in rooms.items():
        pixels = np.array(image) + rng.integers(0, 4, (image.height, image.width, 1), dtype=np.uint8)
        row, column = int(0.8 * place * image.height), int(0.5 * image.width)
        pixels[row : row + image.height // 5, column : column + image.width // 5] = 30
        found[key] = pixels.transpose(2, 0, 1).copy() if example[key].shape[0] == 3 else pixels
    for key, value in example.items():
        if np.ndim(value) == 1:
            found[key] = np.full(len(value), place)
    return found


def round_trip(name: str, size_hw: tuple[int, int]) -> list[dict[str, Any]]:
    """There and back again, so that it can be repeated without a jump."""
    there = episode(name, size_hw, 5, seed=0)
    return there + there[-2:0:-1]


def seen_of(name: str, size_hw: tuple[int, int]) -> Seen:
    """As many views as a contract keeps; pictures of any size give the same, if their sides are alike."""
    small = (96, 96 * size_hw[1] // size_hw[0])
    samples = [
        (number, step == 0, observation)
        for number in range(MAX_VIEWS // 8)
        for step, observation in enumerate(episode(name, small, 8, 1000 + number))
    ]
    return Seen.of(samples, ["do something"], episode_length=100)


def parts_of(policy: Policy) -> dict[str, Callable[[dict[str, Any], float], Any]]:
    """What is done with an observation that comes at a time, by name."""
    contract = policy.contract
    assert contract is not None
    contract_guard, range_guard = ContractGuard(contract), RangeGuard(contract)
    state = {"state": np.full(contract.actions.width, 0.5)}
    answer = {"actions": np.linspace(0, 1, 50)[:, None] + np.zeros(contract.actions.width)}

    def watched() -> Callable[[dict[str, Any], float], None]:
        watching = Watching(policy, ClientLog(), "robot", is_strict=False)

        def watch(observation: dict[str, Any], now_s: float) -> None:
            warnings = watching.look([observation], now_s)
            assert not warnings, warnings
            watching.answered(answer, now_s + 0.05)

        return watch

    watch_of_path, watch_of_guards = watched(), watched()

    def path(observation: dict[str, Any], now_s: float) -> None:
        with looked_at_once():
            policy.infer(observation)
            watch_of_path(observation, now_s)

    def guards(observation: dict[str, Any], now_s: float) -> None:
        with looked_at_once():
            contract_guard(observation)
            range_guard(state)
            watch_of_guards(observation, now_s)

    return {"path": path, "guards": guards}


def least_ms(
    parts: Mapping[str, Callable[[dict[str, Any], float], Any]],
    stream: Sequence[dict[str, Any]],
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, float]:
    end, now_s = time.perf_counter() + seconds, 0.0
    least = {name: [np.inf] * len(stream) for name in parts}
    while time.perf_counter() < end:
        for name, part in parts.items():
            for i, observation in enumerate(stream):
                begin = clock()
                part(observation, now_s + 0.5 * i)
                least[name][i] = min(least[name][i], clock() - begin)
        now_s += 0.5 * len(stream)
    return {name: 1e3 * sum(values) / len(values) for name, values in least.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each line")
    parser.add_argument("--kernel", default="exact", choices=image_tools.KERNELS, help="of resizing")
    parser.add_argument("--threads", type=int, default=1, help="across cameras")
    parser.add_argument("--wall", action="store_true", help="time on the wall instead of the processor's")
    args = parser.parse_args()
    if args.kernel == "torch":
        import torch

        torch.set_num_threads(1)
    image_tools.use_kernel(args.kernel)
    image_tools.use_threads(args.threads)
    clock = time.perf_counter if args.wall else time.process_time
    print(f"{os.cpu_count()} CPUs; ms of {'wall' if args.wall else 'processor'} time, least of {args.seconds:g} s")
    print("| Recipe | Size | Host path | of it guards |\n| --- | --- | --- | --- |")
    for name in EXAMPLES:
        for size_hw in SIZES:
            policy = policy_of(name, seen_of(name, size_hw))
            ms = least_ms(parts_of(policy), round_trip(name, size_hw), args.seconds, clock)
            print(f"| {name} | {size_hw[1]}x{size_hw[0]} | {ms['path']:.2f} | {ms['guards']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
