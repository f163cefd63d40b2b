"""Differences of what models take but for the text: pictures and state, before and after they are normalized."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openpi import transforms
from openpi.evaluation import image_causes, vector_causes
from openpi.evaluation.difference import (
    IMAGES,
    NORMALIZED,
    STATE,
    Difference,
    Frame,
    TrainingPath,
    made,
    rows_of,
    shown,
    vector,
)
from openpi.policies import stages


def images(frames: Sequence[Frame]) -> Iterator[Difference]:
    """Of the cameras' pictures as the robot's transforms leave them, by the model's image."""
    ours, theirs = ([getattr(frame, way)[stages.RAW] for frame in frames] for way in ("trained", "served"))
    slots = {way: set(raw[0].get("image", {})) for way, raw in (("trained", ours), ("served", theirs))}
    for slot in sorted(slots["trained"] ^ slots["served"]):
        there, lacking = ("training", "the server") if slot in slots["trained"] else ("the server", "training")
        yield Difference(
            IMAGES,
            f"image/{slot}",
            f"{there} has it, {lacking} has not",
            "the robot's input transforms are not the same",
            "serve with the recipe of the checkpoint",
        )
    common = sorted(slots["trained"] & slots["served"])
    trained = {slot: [np.asarray(raw["image"][slot]) for raw in ours] for slot in common}
    for slot in common:
        served = [np.asarray(raw["image"][slot]) for raw in theirs]
        masks = [[bool(np.all(raw.get("image_mask", {}).get(slot, True))) for raw in way] for way in (ours, theirs)]
        if masks[0] != masks[1]:
            yield _difference_of_masks(slot, is_hidden=not all(masks[1]))
        if served[0].dtype.kind != trained[slot][0].dtype.kind:
            yield Difference(
                IMAGES,
                f"image/{slot}",
                f"{served[0].dtype} instead of {trained[slot][0].dtype}",
                "the pictures are of another dtype, and so of another range",
                "hand the camera's uint8 picture on as it is",
            )
        elif not all(image_causes.are_same(a, b) for a, b in zip(trained[slot], served, strict=True)):
            what = image_causes.explain(slot, trained, served)
            yield Difference(
                IMAGES,
                f"image/{slot}",
                what,
                "the robot's input transforms make another picture of the same camera",
                "undo it in the transforms that the server was started with",
            )


def _difference_of_masks(slot: str, *, is_hidden: bool) -> Difference:
    return Difference(
        IMAGES,
        f"image_mask/{slot}",
        "the server hides this camera from the model" if is_hidden else "training hid this camera from the model",
        "the robot's input transforms mask another camera",
        "serve with the recipe of the checkpoint",
    )


def resized(frames: Sequence[Frame], path: TrainingPath) -> Iterator[Difference]:
    """Of the same pictures as the server has them, what each way makes for the model."""
    resizes = [step for step in path.after if isinstance(step, transforms.ResizeImages)]
    raw = [frame.served[stages.RAW].get("image", {}) for frame in frames]
    made = [frame.served[stages.INPUTS].get("image", {}) for frame in frames]
    for slot in sorted(set(raw[0]) & set(made[0])):
        served = [np.asarray(images[slot]) for images in made]
        before = [np.asarray(images[slot]) for images in raw]
        ours = (
            before
            if not resizes
            else [transforms.compose(resizes)({"image": {slot: b}})["image"][slot] for b in before]
        )
        if all(image_causes.are_same(np.asarray(a), b) for a, b in zip(ours, served, strict=True)):
            continue
        yield Difference(
            IMAGES,
            f"image/{slot}",
            image_causes.explain_resize(before, served),
            "pictures are brought to the model's size in another way than in training",
            "resize by openpi_client.image_tools.resize_with_pad, which training uses, or send the camera's picture",
        )


def state(frames: Sequence[Frame], path: TrainingPath) -> Iterator[Difference]:
    """Of the state as the robot's transforms leave it."""
    dtypes = [np.asarray(way[stages.RAW].get("state", 0.0)).dtype for way in (frames[0].trained, frames[0].served)]
    if dtypes[1].kind != dtypes[0].kind or dtypes[1].itemsize < min(4, dtypes[0].itemsize):
        yield Difference(
            STATE,
            "state",
            f"{dtypes[1]} instead of {dtypes[0]}",
            "the state is of another dtype, which rounds its values",
            "hand it on as float32",
        )
        return
    yield from vector(
        STATE,
        "state",
        rows_of(frames, lambda f: f.trained[stages.RAW].get("state")),
        rows_of(frames, lambda f: f.served[stages.RAW].get("state")),
        path.state_names,
        {
            "order": ("the values of the state are in another order", "put them in the order of the contract"),
            "units": ("the state is in other units", "convert it where the state is put together"),
            "sign": ("a joint turns the other way round", "change its sign where the state is put together"),
        },
        ("the robot's input transforms make another state", "serve with the transforms that training had"),
    )


def normalized(frames: Sequence[Frame], path: TrainingPath) -> Iterator[Difference]:
    """Of what both ways make of the server's state: normalized, and as wide as the model has it."""
    if "state" not in frames[0].served[stages.RAW]:
        return

    def expected(frame: Frame) -> object:
        state = {"state": np.asarray(frame.served[stages.RAW]["state"])}
        return (state if path.normalize is None else path.normalize(state))["state"]

    theirs = rows_of(frames, lambda f: f.served[stages.NORMALIZED].get("state"))
    cause = ("the statistics are those of another run or dataset, or of another kind (quantiles, z-score)",
             "serve with the statistics in the checkpoint's assets, and with its recipe")  # fmt: skip
    told = list(vector(NORMALIZED, "state", rows_of(frames, expected), theirs, path.state_names, {}, cause))
    yield from told
    ours = rows_of(frames, lambda f: made(f, path)["state"])
    padded = rows_of(frames, lambda f: f.served[stages.INPUTS].get("state"))
    if (
        told
        or ours is None
        or padded is None
        or (ours.shape == padded.shape and vector_causes.are_close(ours, padded).all())
    ):
        return
    yield Difference(
        NORMALIZED,
        "state",
        f"the model gets {padded.shape[1]} values, {shown(padded[0])}, instead of {ours.shape[1]}, {shown(ours[0])}",
        "the state is padded to the model's width in another way, on the other side maybe",
        "pad by transforms.PadStatesAndActions: zeros behind the values",
    )
