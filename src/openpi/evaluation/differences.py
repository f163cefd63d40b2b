"""Where a server's way from an observation to an action is not the way of training.

The ways are cut into stages. Each stage of the server's is compared with what training's transforms make of the stage
*before* as the server has it, so that one difference is told once, where it is, and not at every stage behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from openpi.evaluation import chunk_differences, input_differences, token_differences
from openpi.evaluation.difference import CHUNK, IMAGES, NORMALIZED, STATE, TOKENS, Difference, Frame, TrainingPath
from openpi.policies import stages


def find(frames: Sequence[Frame], path: TrainingPath) -> list[Difference]:
    """All that is found, in the order of the stages behind `keys`."""
    if any(stages.RAW not in frame.served or stages.RAW not in frame.trained for frame in frames):
        return [_untold(frames[0])]
    looks: list[tuple[str, Callable[[], Iterator[Difference]]]] = [
        (IMAGES, lambda: input_differences.images(frames)),
        (IMAGES, lambda: input_differences.resized(frames, path)),
        (STATE, lambda: input_differences.state(frames, path)),
        (NORMALIZED, lambda: input_differences.normalized(frames, path)),
        (TOKENS, lambda: token_differences.prompt(frames)),
        (TOKENS, lambda: token_differences.tokens(frames, path)),
        (CHUNK, lambda: chunk_differences.chunk(frames, path)),
    ]
    return [difference for stage, look in looks for difference in _found(stage, look)]


def _found(stage: str, look: Callable[[], Iterator[Difference]]) -> list[Difference]:
    """What training's transforms do not take of the server's stage is a difference, and no reason to stop looking."""
    try:
        return list(look())
    except (ValueError, KeyError, IndexError, TypeError) as error:
        found = f"training's transforms do not take what the server has: {type(error).__name__}: {error}"
        cause = "the server has another robot's transforms, or another model config"
        return [Difference(stage, "transforms", found, cause, "serve with the recipe of the checkpoint")]


def _untold(frame: Frame) -> Difference:
    who = "the server" if stages.RAW not in frame.served else "training"
    return Difference(
        NORMALIZED,
        "state",
        f"{who} does not normalize at all",
        "one of the two was made without statistics",
        "serve the recipe and the statistics that the checkpoint was trained with",
    )
