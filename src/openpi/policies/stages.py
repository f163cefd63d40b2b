"""A sample at the places of its way where training and serving can be held against each other.

    observation -> robot's transforms -> [raw] -> normalize -> [normalized] -> resize, tokenize, pad -> [inputs]

A server tells them of its own way to whoever asks (`request.TRACE`), and what the model returned: `actions` before they
are unnormalized. `openpi doctor` makes the same of the training path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from openpi import transforms

RAW, NORMALIZED, INPUTS, ACTIONS = "raw", "normalized", "inputs", "actions"
_RAW_KEYS = ("image", "image_mask", "state", "prompt")

Stages = Mapping[str, Mapping[str, Any]]


def walk(
    chain: Iterable[transforms.DataTransformFn], sample: transforms.DataDict
) -> tuple[transforms.DataDict, dict[str, Any]]:
    """What a chain makes of a sample, and the sample at its stages, without its actions; a chain that does not
    normalize has no `raw` and no `normalized`.
    """
    found: dict[str, Any] = {}
    for step in chain:
        is_pivot = isinstance(step, transforms.Normalize) and RAW not in found
        if is_pivot:
            found[RAW] = {key: sample[key] for key in _RAW_KEYS if key in sample}
        sample = step(sample)
        if is_pivot and "state" in sample:
            found[NORMALIZED] = {"state": sample["state"]}
    found[INPUTS] = {key: value for key, value in sample.items() if key != "actions"}
    return sample, found


def split(
    chain: Iterable[transforms.DataTransformFn],
) -> tuple[list[transforms.DataTransformFn], transforms.Normalize | None, list[transforms.DataTransformFn]]:
    """The transforms before, at and after the place where a chain normalizes; all are before where it does not."""
    steps = list(chain)
    for i, step in enumerate(steps):
        if isinstance(step, transforms.Normalize):
            return steps[:i], step, steps[i + 1 :]
    return steps, None, []
