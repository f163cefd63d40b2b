"""What a request costs the host: `Policy.infer` around a model that takes no time.

    python benchmarks/host_overhead.py [--seconds 3] [--kernel exact|torch] [--threads 1]

Times are of the processor (of all threads of this process, but with `--wall`), the least of many calls: others on the
machine do not count. The pipelines are those of the recipes `pi05_droid` and `pi05_aloha`, contracts included; images
are as robots send them: DROID's [h, w, 3], ALOHA's [3, h, w].
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.contract import Contract
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.policy import Policy
from openpi.policies.policy_config import make_pipeline
from openpi.shared.normalize import NormStats
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


def policy_of(name: str) -> Policy:
    recipe = get_config(name)
    model: Any = dataclasses.replace(recipe.model, tokenizer_path=str(TOKENIZER))
    data = recipe.data.create(Path("/nowhere"), model)
    stats = NormStats(*(np.full(WIDTHS[name], value) for value in (0.0, 1.0, -2.0, 2.0)))
    data = dataclasses.replace(data, norm_stats={"state": stats, "actions": stats})
    contract = Contract.build(data, model, control_hz=15)
    means = {camera.key: (120.0, 118.0, 119.0) for camera in contract.cameras if camera.slot}
    pipeline = make_pipeline(data, dataclasses.replace(contract, camera_means=means))
    return Policy(
        Free(model.action_horizon, model.action_dim),
        transforms=pipeline.inputs,
        output_transforms=pipeline.outputs,
        contract=pipeline.contract,
    )


def observation(name: str, size_hw: tuple[int, int]) -> dict[str, Any]:
    """An example of the robot at another camera resolution; three cameras, of which pi05_droid uses two."""
    rng = np.random.default_rng(0)
    found = EXAMPLES[name]()
    images = found.pop("images", None)
    if images is not None:
        chosen = ("cam_high", "cam_left_wrist", "cam_right_wrist")
        return found | {"images": {key: rng.integers(256, size=(3, *size_hw), dtype=np.uint8) for key in chosen}}
    cameras = [key for key, value in found.items() if np.ndim(value) == 3]
    return found | {key: rng.integers(256, size=(*size_hw, 3), dtype=np.uint8) for key in cameras}


def least_ms(work: Callable[[], Any], seconds: float, clock: Callable[[], float]) -> float:
    end, least = time.perf_counter() + seconds, np.inf
    while time.perf_counter() < end:
        begin = clock()
        work()
        least = min(least, clock() - begin)
    return 1e3 * least


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
    print(f"{os.cpu_count()} CPUs; {'wall' if args.wall else 'processor'} time, least of {args.seconds:g} s")
    for name in EXAMPLES:
        policy = policy_of(name)
        for size_hw in SIZES:
            sent = observation(name, size_hw)
            policy.infer(sent)
            least = least_ms(lambda sent=sent, policy=policy: policy.infer(sent), args.seconds, clock)
            print(f"{name:<11} {size_hw[1]:>5}x{size_hw[0]:<4} {least:7.2f} ms", flush=True)


if __name__ == "__main__":
    main()
