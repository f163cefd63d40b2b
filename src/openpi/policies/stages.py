"""A sample at the places of its way where training and serving can be held against each other.

    observation -> robot's transforms -> [raw] -> normalize -> [normalized] -> resize, tokenize, pad -> [inputs]

A server tells them of its own way to whoever asks (`request.TRACE`), and what the model returned: `actions` before they
are unnormalized. `openpi doctor` makes the same of the training path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from openpi import transforms
from openpi.shared.tree import Params

RAW, NORMALIZED, INPUTS, ACTIONS = "raw", "normalized", "inputs", "actions"
_RAW_KEYS = ("image", "image_mask", "state", "prompt")
_INPUT_KEYS = (
    *("image", "image_mask", "state", "tokenized_prompt", "tokenized_prompt_mask"),
    *("token_ar_mask", "token_loss_mask"),
)

Stages = Mapping[str, Mapping[str, Any]]


def walk(
    chain: Iterable[transforms.DataTransformFn], sample: transforms.DataDict
) -> tuple[transforms.DataDict, Params]:
    """What a chain makes of a sample, and what the sample's stages have of what models take; a chain that does not
    normalize has no `raw` and no `normalized`.
    """
    found: dict[str, Any] = {}
    for step in chain:
        is_pivot = isinstance(step, transforms.Normalize) and RAW not in found
        if is_pivot:
            found[RAW] = _some(sample, _RAW_KEYS)
        sample = step(sample)
        if is_pivot:
            found[NORMALIZED] = _some(sample, ("state",))
    found[INPUTS] = _some(sample, _INPUT_KEYS)
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


def _some(sample: transforms.DataDict, keys: Iterable[str]) -> dict[str, object]:
    """Of these keys; text as the wire has it."""
    found = {key: sample[key] for key in keys if key in sample}
    if "prompt" in found and not isinstance(found["prompt"], bytes):
        found["prompt"] = str(np.asarray(found["prompt"]).item())
    return found
