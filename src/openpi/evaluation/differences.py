"""Where a server's way from an observation to an action is not the way of training.

The ways are cut into stages. Each stage of the server's is compared with what training's transforms make of the stage
*before* as the server has it, so that one difference is told once, where it is, and not at every stage behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openpi import transforms
from openpi.evaluation import image_causes, vector_causes
from openpi.models.tokenizer import load_sentencepiece
from openpi.policies import stages

KEYS, IMAGES, STATE, NORMALIZED, TOKENS, CHUNK = STAGES = ("keys", "images", "state", "normalized", "tokens", "chunk")

_MOST_TEXT = 160


@dataclasses.dataclass(frozen=True)
class Difference:
    """Attributes:
    stage: of `STAGES`.
    subject: a key, or a fact.
    found: what differs.
    cause: why, most likely.
    fix: what to do.
    """

    stage: str
    subject: str
    found: str
    cause: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Path:
    """The transforms of training, in parts.

    Attributes:
        normalize: None = the recipe does not.
        after: from the normalized sample to what the model takes.
        to_robot: from what the model gives to the robot's actions.
        state_names, action_names: of their dimensions, as many as are known.
    """

    normalize: transforms.DataTransformFn | None
    after: Sequence[transforms.DataTransformFn]
    to_robot: Sequence[transforms.DataTransformFn]
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Frame:
    """One observation on both ways.

    Attributes:
        trained, served: as of `policies.stages`.
        actions: float[ah w], that the server answered.
    """

    trained: stages.Stages
    served: stages.Stages
    actions: np.ndarray


def find(frames: Sequence[Frame], path: Path) -> list[Difference]:
    """All that is found, in the order of the stages behind `keys`."""
    if any(stages.RAW not in frame.served or stages.RAW not in frame.trained for frame in frames):
        return [_untold(frames[0])]
    looks: list[tuple[str, Callable[[], Iterator[Difference]]]] = [
        (IMAGES, lambda: _images(frames)),
        (IMAGES, lambda: _resized(frames, path)),
        (STATE, lambda: _state(frames, path)),
        (NORMALIZED, lambda: _normalized(frames, path)),
        (TOKENS, lambda: _prompt(frames)),
        (TOKENS, lambda: _tokens(frames, path)),
        (CHUNK, lambda: _chunk(frames, path)),
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


def _images(frames: Sequence[Frame]) -> Iterator[Difference]:
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


def _resized(frames: Sequence[Frame], path: Path) -> Iterator[Difference]:
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


def _state(frames: Sequence[Frame], path: Path) -> Iterator[Difference]:
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
    yield from _vector(
        STATE,
        "state",
        _rows(frames, lambda f: f.trained[stages.RAW].get("state")),
        _rows(frames, lambda f: f.served[stages.RAW].get("state")),
        path.state_names,
        {
            "order": ("the values of the state are in another order", "put them in the order of the contract"),
            "units": ("the state is in other units", "convert it where the state is put together"),
            "sign": ("a joint turns the other way round", "change its sign where the state is put together"),
        },
        ("the robot's input transforms make another state", "serve with the transforms that training had"),
    )


def _normalized(frames: Sequence[Frame], path: Path) -> Iterator[Difference]:
    if "state" not in frames[0].served[stages.RAW]:
        return

    def expected(frame: Frame) -> Any:
        state = {"state": np.asarray(frame.served[stages.RAW]["state"])}
        return (state if path.normalize is None else path.normalize(state))["state"]

    theirs = _rows(frames, lambda f: f.served[stages.NORMALIZED].get("state"))
    cause = ("the statistics are those of another run or dataset, or of another kind (quantiles, z-score)",
             "serve with the statistics in the checkpoint's assets, and with its recipe")  # fmt: skip
    told = list(_vector(NORMALIZED, "state", _rows(frames, expected), theirs, path.state_names, {}, cause))
    yield from told
    ours = _rows(frames, lambda f: _made(f, path)["state"])
    padded = _rows(frames, lambda f: f.served[stages.INPUTS].get("state"))
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
        f"the model gets {padded.shape[1]} values, {_shown(padded[0])}, instead of {ours.shape[1]}, {_shown(ours[0])}",
        "the state is padded to the model's width in another way, on the other side maybe",
        "pad by transforms.PadStatesAndActions: zeros behind the values",
    )


def _prompt(frames: Sequence[Frame]) -> Iterator[Difference]:
    for frame in frames:
        ours, theirs = (_text(way[stages.RAW].get("prompt")) for way in (frame.trained, frame.served))
        if ours != theirs:
            yield Difference(
                TOKENS,
                "prompt",
                f"{_shown(theirs)} instead of {_shown(ours)}",
                "the server replaces the prompt: a default, or a transform of the robot's",
                "start the server without --default-prompt, or with that of training",
            )
            return


def _tokens(frames: Sequence[Frame], path: Path) -> Iterator[Difference]:
    for frame in frames:
        ours, theirs = _made(frame, path), frame.served[stages.INPUTS]
        if "tokenized_prompt" not in ours and "tokenized_prompt" not in theirs:
            continue
        if "tokenized_prompt" not in ours or "tokenized_prompt" not in theirs:
            who = "the server" if "tokenized_prompt" in theirs else "training"
            found, cause = f"only {who} has tokens", "the models are not of one kind"
            yield Difference(TOKENS, "tokenized_prompt", found, cause, "serve with the recipe of the checkpoint")
            return
        told = _token_difference(ours, theirs, path, _text(frame.served[stages.RAW].get("prompt")))
        if told is not None:
            yield told
            return


def _token_difference(ours: Any, theirs: Any, path: Path, prompt: str | None) -> Difference | None:
    a, b = (np.asarray(way["tokenized_prompt"]) for way in (ours, theirs))
    masks = [np.asarray(way["tokenized_prompt_mask"], bool) for way in (ours, theirs)]
    valid = a[masks[0]], b[masks[1]]
    if np.array_equal(*valid):
        if a.shape == b.shape and np.array_equal(*masks):
            return None
        if a.shape != b.shape:
            found, cause = f"{b.size} tokens instead of {a.size}", "the model's max_token_len is another one"
        else:
            first = [int(mask.argmax()) for mask in masks]
            found = f"the text begins at token {first[1]} instead of {first[0]}"
            cause = "the prompt is padded on the other side"
        fix = "serve with the model config of the checkpoint; prompts are padded behind the text"
        return Difference(TOKENS, "tokenized_prompt", found, cause, fix)
    read = _reader(path)
    texts = None if read is None else [read(ids) for ids in valid]
    if texts is None:
        found = f"{valid[1][:8].tolist()}... instead of {valid[0][:8].tolist()}..."
        return Difference(TOKENS, "tokenized_prompt", found, *_OTHER_TOKENS)
    found = f"{_shown(texts[1])} instead of {_shown(texts[0])}, read with training's tokenizer"
    is_readable = prompt is not None and _plain(prompt) in _plain(texts[1]) and texts[0] != texts[1]
    return Difference(TOKENS, "tokenized_prompt", found, *(_OTHER_TEMPLATE if is_readable else _OTHER_TOKENS))


_OTHER_TEMPLATE = (
    "another prompt template: the text around the prompt, or the state in it",
    "serve with the model config of the checkpoint (pi05, discrete_state_input)",
)
_OTHER_TOKENS = (
    "another tokenizer: the same text has other numbers",
    "serve with the tokenizer in the checkpoint's assets; check tokenizer_path of the model config",
)


def _reader(path: Path) -> Callable[[np.ndarray], str] | None:
    """Tokens of training's tokenizer -> text; None for tokenizers that do not say their file."""
    tokenizers = [getattr(step, "tokenizer", None) for step in path.after]
    tokenizer = next((each for each in tokenizers if hasattr(each, "model_path")), None)
    if tokenizer is None:
        return None
    pieces = load_sentencepiece(tokenizer.model_path)
    size = pieces.vocab_size()
    return lambda ids: pieces.decode([int(i) for i in ids if 0 <= i < size])


def _chunk(frames: Sequence[Frame], path: Path) -> Iterator[Difference]:
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
    yield from _vector(
        CHUNK,
        "actions",
        *rows,
        path.action_names,
        {"order": order, "units": ("the actions are in other units", "convert them once, in the output transforms")},
        ("actions are unnormalized by other statistics, or the output transforms are others",
         "serve with the statistics and the recipe of the checkpoint"),
    )  # fmt: skip


def _relative(frames: Sequence[Frame], ours: np.ndarray, theirs: np.ndarray, path: Path) -> Difference | None:
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
            added.append(_name(path.action_names, dim))
        elif np.allclose(offset, -own, atol=tolerance):
            absent.append(_name(path.action_names, dim))
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


def _vector(
    stage: str,
    subject: str,
    ours: np.ndarray | None,
    theirs: np.ndarray | None,
    names: Sequence[str],
    causes: Mapping[str, tuple[str, str]],
    otherwise: tuple[str, str],
) -> Iterator[Difference]:
    if ours is None or theirs is None or ours.shape != theirs.shape:
        widths = ["none" if rows is None else f"{rows.shape[1]} values" for rows in (theirs, ours)]
        if widths[0] != widths[1]:
            yield Difference(stage, subject, f"{widths[0]} instead of {widths[1]}", *otherwise)
        return
    told = [_name(names, i) for i in range(ours.shape[1])]
    if (cause := vector_causes.explain(ours, theirs, told)) is not None:
        yield Difference(stage, subject, cause.found, *causes.get(cause.kind, otherwise))


def _made(frame: Frame, path: Path) -> Mapping[str, Any]:
    """What training makes for the model of the server's normalized sample."""
    raw, normalized = frame.served[stages.RAW], frame.served[stages.NORMALIZED]
    return transforms.compose([step for step in path.after if not isinstance(step, transforms.ResizeImages)])(
        {**raw, "state": np.asarray(normalized["state"])}
    )


def _rows(frames: Sequence[Frame], of: Callable[[Frame], Any]) -> np.ndarray | None:
    values = [of(frame) for frame in frames]
    if any(value is None for value in values):
        return None
    return np.stack([np.asarray(value, np.float64).reshape(-1) for value in values])


def _name(names: Sequence[str], dim: int) -> str:
    return names[dim] if dim < len(names) else f"[{dim}]"


def _text(value: Any) -> str | None:
    if value is None:
        return None
    item = value if isinstance(value, (str, bytes)) else np.asarray(value).item()
    return item.decode(errors="replace") if isinstance(item, bytes) else str(item)


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())


def _shown(value: Any) -> str:
    text = np.array2string(value, precision=3, max_line_width=10_000) if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."
