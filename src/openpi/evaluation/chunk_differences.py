"""Differences of what a robot gets of what a model gave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openpi import transforms
from openpi.evaluation import vector_causes
from openpi.evaluation.difference import CHUNK, Difference, Frame, TrainingPath, name_of, vector
from openpi.policies import stages


def chunk(frames: Sequence[Frame], path: TrainingPath) -> Iterator[Difference]:
    """Of what the server's model gave, what each way makes for the robot."""
    to_robot = transforms.compose(path.to_robot)
    ours: list[np.ndarray] = []
    for frame in frames:
        given = {"state": np.asarray(frame.served[stages.INPUTS]["state"]),
                 "actions": np.asarray(frame.served[stages.ACTIONS])}  # fmt: skip
        ours.append(np.asarray(to_robot(given)["actions"], np.float64))
    theirs = [np.asarray(frame.actions, np.float64) for frame in frames]
    if ours[0].shape != theirs[0].shape:
        found = f"chunks are {theirs[0].shape}, training's are {ours[0].shape} (rows, dimensions)"
        cause = "the output transforms cut other dimensions, or the horizon is another one"
        yield Difference(CHUNK, "actions", found, cause, "serve with the recipe of the checkpoint")
        return
    if (relative := _relative(frames, np.stack(ours), np.stack(theirs), path)) is not None:
        yield relative
        return
    width = theirs[0].shape[-1]
    rows = np.concatenate(ours).reshape(-1, width), np.concatenate(theirs).reshape(-1, width)
    order = ("the actions are in another order", "put them in the order of the contract")
    yield from vector(
        CHUNK,
        "actions",
        *rows,
        path.action_names,
        {"order": order, "units": ("the actions are in other units", "convert them once, in the output transforms")},
        ("actions are unnormalized by other statistics, or the output transforms are others",
         "serve with the statistics and the recipe of the checkpoint"),
    )  # fmt: skip


def _relative(frames: Sequence[Frame], ours: np.ndarray, theirs: np.ndarray, path: TrainingPath) -> Difference | None:
    """Where the state was added to dimensions in one of the ways only: the mask of relative actions differs."""
    state = np.stack([np.asarray(frame.served[stages.RAW]["state"], np.float64) for frame in frames])
    width = min(state.shape[1], ours.shape[-1])
    differs = ~vector_causes.are_close(ours, theirs).all(axis=(0, 1))
    dims = np.flatnonzero(differs)
    if not len(dims) or dims.max() >= width:
        return None
    added, absent = [], []
    for dim in dims:
        offset, own = theirs[..., dim] - ours[..., dim], state[:, None, dim]
        tolerance = 1e-3 * (1 + np.abs(state[:, dim]).max())
        if np.allclose(offset, own, atol=tolerance):
            added.append(name_of(path.action_names, dim))
        elif np.allclose(offset, -own, atol=tolerance):
            absent.append(name_of(path.action_names, dim))
        else:
            return None
    found = [f"adds the state to {', '.join(added)}, training does not" if added else ""]
    found.append(f"does not add the state to {', '.join(absent)}, training does" if absent else "")
    return Difference(
        CHUNK,
        "actions",
        "; ".join(f"the server {part}" for part in found if part),
        "the mask of relative actions (DeltaActions, AbsoluteActions) is another one",
        "serve with the mask that the checkpoint was trained with: trained_relative in its contract.json",
    )
