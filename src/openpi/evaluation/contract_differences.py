"""What a server says of its policy beside what the dataset and its recipe say: keys, names, units, rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from openpi.evaluation.difference import CHUNK, IMAGES, KEYS, STATE, Difference
from openpi.policies.images import is_unit_range, layout_of
from openpi.shared.tree import flatten
from openpi_client.base_policy import Metadata

_SERVE = "serve the checkpoint with its own recipe, or name the recipe it was trained with"


def find(trained: Metadata, served: Metadata) -> Iterator[Difference]:
    """Between two contracts, as of `Contract.as_metadata`, but for the rate, which is the dataset's."""
    for fact in ("robot", "model_type"):
        if trained.get(fact) != served.get(fact):
            yield _other(KEYS, fact, trained.get(fact), served.get(fact), "the server has another recipe", _SERVE)
    yield from _keyed(KEYS, "camera", IMAGES, trained.get("cameras", ()), served.get("cameras", ()))
    yield from _keyed(KEYS, "state", STATE, trained.get("state", ()), served.get("state", ()))
    ours, theirs = trained.get("actions", {}), served.get("actions", {})
    for fact in ("names", "units", "kind", "horizon"):
        if ours.get(fact) != theirs.get(fact):
            cause = "the actions are others than those of training"
            yield _other(CHUNK, f"actions, {fact}", ours.get(fact), theirs.get(fact), cause, _SERVE)


def rate(recorded_hz: float | None, played_hz: float | None) -> Iterator[Difference]:
    """Of the rows of a chunk; unknown ones do not differ."""
    if recorded_hz and played_hz and not math.isclose(recorded_hz, played_hz, rel_tol=0.02):
        yield Difference(
            CHUNK,
            "control_hz",
            f"{played_hz:g} Hz, and the dataset was recorded at {recorded_hz:g} Hz",
            f"rows of a chunk are played at another rate, {played_hz / recorded_hz:.2g} times as fast",
            "run the robot's loop at the rate of the dataset, or train on frames at the rate of the robot",
        )


def observation(served: Metadata, sent: Mapping[str, object]) -> Iterator[Difference]:
    """Between what a server takes and what is sent.

    Args:
        served: its contract, as of `Contract.as_metadata`.
    """
    leaves = flatten(sent)
    cameras = {camera["key"]: camera for camera in served.get("cameras", ())}
    vectors = {vector["key"]: vector for vector in served.get("state", ())}
    needed = [key for key, camera in cameras.items() if camera.get("required", True)] + list(vectors)
    if missing := [key for key in needed if key not in leaves]:
        yield Difference(
            KEYS,
            ", ".join(missing),
            f"missing; found: {', '.join(leaves)}",
            "the dataset's columns have other names than the server takes",
            "rename them by the repack transform of the recipe, or in the robot's program",
        )
    pictures = {key: np.asarray(value) for key, value in leaves.items() if np.ndim(value) == 3}
    extra = [key for key in pictures if key not in cameras]
    if extra and any(key not in pictures for key in cameras):  # else they are more than the server looks at
        found, cause = f"the server takes {', '.join(cameras)}", "the server has no such camera"
        yield Difference(KEYS, ", ".join(extra), found, cause, "leave it out, or rename it to the camera it stands for")
    for key, picture in pictures.items():
        yield from _picture(key, picture, cameras.get(key))
    for key in vectors.keys() & leaves.keys():
        width = np.size(leaves[key])
        if width != vectors[key]["width"]:
            found = f"{width} values; the server takes {vectors[key]['width']}"
            yield Difference(KEYS, key, found, "the state of another robot", "choose the checkpoint of this robot")


def _picture(key: str, picture: np.ndarray, camera: Mapping[str, object] | None) -> Iterator[Difference]:
    if camera is None:
        return
    if picture.dtype != np.uint8 and not (
        picture.dtype.kind == "f" and is_unit_range(float(picture.min()), float(picture.max()))
    ):
        found = f"{picture.dtype} in {picture.min():.3g} to {picture.max():.3g}; expected uint8 in 0 to 255"
        yield Difference(KEYS, key, found, "the pictures are of another dtype", "send the camera's picture as it is")
    if camera.get("layout", "any") not in ("any", layout_of(picture, key)):
        found = f"shape {picture.shape}; expected the layout {camera['layout']}"
        yield Difference(KEYS, key, found, "the axes of the picture are in another order", "transpose it")


def _keyed(
    stage: str, what: str, facts_stage: str, trained: Sequence[Metadata], served: Sequence[Metadata]
) -> Iterator[Difference]:
    ours, theirs = ({entry["key"]: entry for entry in entries} for entries in (trained, served))
    if set(ours) != set(theirs):
        yield _other(stage, what, sorted(ours), sorted(theirs), f"other keys of the {what}", _SERVE)
    for key in sorted(ours.keys() & theirs.keys()):
        for fact in sorted((ours[key].keys() | theirs[key].keys()) - {"key"}):
            if ours[key].get(fact) != theirs[key].get(fact):
                cause = f"the server takes another {what} than training had"
                yield _other(facts_stage, f"{key}, {fact}", ours[key].get(fact), theirs[key].get(fact), cause, _SERVE)


def _other(stage: str, subject: str, trained: object, served: object, cause: str, fix: str) -> Difference:
    return Difference(stage, subject, f"{served!r} instead of {trained!r}", cause, fix)
