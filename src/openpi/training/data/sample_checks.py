"""What would surprise the owner of a sample: values that a training run or a robot would silently choke on.

A check looks at one stage of the pipeline, given the sample before and after it. It belongs to a kind of transform,
so chains put together by hand are checked like the registered ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from openpi import transforms
from openpi.data.dataset import Sample
from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.models.tokenizer import (
    BinningTokenizer,
    FASTTokenizer,
    FSQTokenizer,
    PaligemmaTokenizer,
    load_sentencepiece,
)
from openpi.policies import watch
from openpi.policies.contract import Contract
from openpi.policies.guards import ContractGuard, RangeGuard, far_outside, suspicious
from openpi.policies.robot_spec import find_spec
from openpi.shared import normalize, stats_check
from openpi.shared.collected_warnings import collected_warnings
from openpi.shared.tree import flatten
from openpi.training.data.sample_trace import Stage

# 2 % of all values lie outside q01..q99 by definition; what is this far out is not one of them.
FAR_OUTSIDE = 1.5
# Normalised by mean and deviation: one value in 16 000 of a bell curve.
FAR_SIGMAS = 4.0
MAX_ROUND_TRIP_ERROR = 1e-3
# Grey levels (of 255): below this an image shows nothing.
FLAT_IMAGE_STD = 1.0
MAX_NAMED_DIMS = 8
_TELL_OF_CUTS = (PaligemmaTokenizer, FASTTokenizer, BinningTokenizer, FSQTokenizer)
_MIN_IMAGE_SIDE = 8


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        is_surprise: worth red; otherwise a remark.
        code: of the guard that a server says the same by; empty = none.
    """

    key: str
    message: str
    is_surprise: bool = True
    code: str = ""


@dataclasses.dataclass(frozen=True)
class Context:
    """What the checks know besides the sample.

    Attributes:
        model: of the recipe.
        names: of the dimensions of `state` and `actions`, where known.
        episode_length: frames of the sample's episode; None for observations of a robot.
        unread_cameras: of the dataset, that the recipe does not read.
        contract: of the checkpoint, if there is one.
    """

    model: BaseModelConfig
    names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    episode_length: int | None = None
    unread_cameras: Sequence[str] = ()
    contract: Contract | None = None

    def dim_names(self, key: str, width: int) -> list[str]:
        """`width` names: the known ones, then `key[i]`."""
        known = list(self.names.get(key, ()))[:width]
        return known + [f"{key}[{i}]" for i in range(len(known), width)]


def check_stage(stage: Stage, before: Sample | None, context: Context, *, is_output: bool = False) -> list[Finding]:
    """All findings of one stage; `before` is None for the first one, `is_output` true on the way back."""
    findings = list(_not_finite(stage.sample, before))
    if before is None or stage.step is None:
        unread = [
            Finding(key, "the recipe does not read this camera", is_surprise=False) for key in context.unread_cameras
        ]
        return [*findings, *unread, *_raw_images(stage.sample), *_padding(stage.sample, context)]
    if not is_output:  # where the padding is still to be cut
        findings += _another_robot(stage.step.transform, before)
    match stage.step.transform:
        case transforms.RepackTransform():
            findings += _dropped(before, stage.sample)
            if context.contract is not None:
                findings += _told(suspicious(context.contract, stage.sample))
        case ContractGuard() as guard:
            findings += _told(suspicious(guard.contract, before))
            if guard.contract.seen is not None:
                findings += _told(watch.once(guard.contract.seen, before))
        case RangeGuard() as guard if "state" in before:
            findings += _told(far_outside(guard.contract, before["state"]))
        case transforms.InjectDefaultPrompt() if "prompt" in stage.sample and "prompt" not in before:
            findings.append(Finding("prompt", "the sample has no prompt; the default one is used", is_surprise=False))
        case transforms.Normalize() as step:
            findings += _normalised(step, before, stage.sample, context)
        case transforms.ResizeImages():
            findings += _model_images(before, context.model)
        case transforms.TokenizePrompt() | transforms.TokenizeFASTInputs() as step:
            findings += _prompt_length(step, before, stage.sample)
        case transforms.PadStatesAndActions() as step:
            findings += _too_wide(step, before)
    return findings


def check_inputs(sample: Sample, context: Context, *, is_training: bool) -> list[Finding]:
    """Findings about the whole model input."""
    return [*_cameras(sample, context.model), *_chunk(sample, context.model, is_training=is_training)]


def check_round_trip(recorded: np.ndarray, returned: np.ndarray) -> Finding:
    """Recorded actions that went to the model's space and back must be the recorded actions."""
    if recorded.shape != returned.shape:
        what = "dimensions" if recorded.shape[:-1] == returned.shape[:-1] else "steps"
        return Finding("actions", f"{recorded.shape} went in and {returned.shape} came out: {what} were lost or added")
    error = float(np.abs(recorded.astype(np.float64) - returned).max(initial=0.0))
    message = f"recorded actions come back from the output chain within {error:.3g}"
    expected = MAX_ROUND_TRIP_ERROR * max(1.0, float(np.abs(recorded).max(initial=0.0)))  # float32 has seven digits
    if error <= expected:
        return Finding("actions", message, is_surprise=False)
    return Finding("actions", f"{message}; expected {expected:.3g}: outputs do not undo inputs")


def _told(warnings: list[str]) -> list[Finding]:
    """Warnings of guards, `[code] subject: text`."""
    parts = [warning.partition(":") for warning in warnings]
    return [
        Finding(head.partition("] ")[2], text.strip(), code=head.partition("] ")[0].removeprefix("["))
        for head, _, text in parts
    ]


def _another_robot(transform: object, before: Sample) -> Iterator[Finding]:
    """Vectors that are not as wide as the spec of the robot transform says."""
    spec = find_spec([transform])
    if spec is None:
        return
    leaves = flatten(before)
    for vector in (*spec.state, spec.actions):
        width = np.shape(leaves.get(vector.key, np.zeros(vector.width)))[-1:]
        if width not in ((), (vector.width,)):
            message = f"has {width[0]} dimensions; robot '{spec.robot}' has {vector.width}: {', '.join(vector.names)}"
            yield Finding(vector.key, message)


# --- values -------------------------------------------------------------------------------------------------------


def _not_finite(sample: Sample, before: Sample | None) -> Iterator[Finding]:
    """NaN and infinity, at the stage where they first appear."""
    old = {} if before is None else flatten(before)
    for key, value in flatten(sample).items():
        bad = _num_not_finite(value)
        if bad and not (key in old and _num_not_finite(old[key])):
            yield Finding(key, f"{bad} of {np.asarray(value).size} values are NaN or infinite")


def _num_not_finite(value: object) -> int:
    array = np.asarray(value)
    return int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0


def _normalised(step: transforms.Normalize, before: Sample, after: Sample, context: Context) -> Iterator[Finding]:
    if step.norm_stats is None:
        yield Finding("state", "no normalisation statistics: values stay raw. Compute them with `openpi stats`")
        return
    old, new = flatten(before), flatten(after)
    norm_stats = flatten(step.norm_stats)
    dims = stats_check.Dims(
        {key: np.shape(old[key])[-1] for key in norm_stats if np.ndim(old.get(key, 0))},
        context.names,
        context.model.action_dim,
    )
    for problem in stats_check.find_problems(norm_stats, use_quantiles=step.use_quantiles, dims=dims):
        yield Finding("statistics", f"training and serving refuse them: {problem}")
    flat = stats_check.flat(norm_stats, use_quantiles=step.use_quantiles, dims=dims)
    for key, stats in norm_stats.items():
        if key not in new:
            continue  # observations have no actions; training is checked at the end
        names = context.dim_names(key, stats.width)
        if step.use_quantiles:
            yield from _outside_quantiles(key, stats, np.asarray(old[key]), np.asarray(new[key]), names)
        else:
            yield from _outside_sigmas(key, np.asarray(old[key]), np.asarray(new[key]), names)
        if key in flat:
            yield Finding(key, f"degenerate statistics, small changes become huge: {dims.labels(key, flat[key])}")


def _outside_quantiles(
    key: str, stats: normalize.NormStats, old: np.ndarray, new: np.ndarray, names: list[str]
) -> Iterator[Finding]:
    assert stats.q01 is not None  # checked when the transform was made
    assert stats.q99 is not None
    size, value = _largest(old, new)
    outside = np.flatnonzero(size > 1 + 1e-6)
    if outside.size == 0:
        return
    described = [
        f"{names[i]} = {value[i]:.4g} (q01..q99 {stats.q01[i]:.4g}..{stats.q99[i]:.4g}, |x| = {size[i]:.3g})"
        for i in outside[np.argsort(-size[outside])][:MAX_NAMED_DIMS]
    ]
    message = f"{outside.size} of {size.size} dimensions leave q01..q99: {_listed(described, outside.size)}"
    yield Finding(key, message, is_surprise=bool(size.max() > FAR_OUTSIDE))


def _outside_sigmas(key: str, old: np.ndarray, new: np.ndarray, names: list[str]) -> Iterator[Finding]:
    size, value = _largest(old, new)
    outside = np.flatnonzero(size > FAR_SIGMAS)
    if outside.size:
        described = [
            f"{names[i]} = {value[i]:.4g} ({size[i]:.3g} deviations from the mean)"
            for i in outside[np.argsort(-size[outside])][:MAX_NAMED_DIMS]
        ]
        yield Finding(key, f"{outside.size} of {size.size} dimensions are far out: {_listed(described, outside.size)}")


def _largest(old: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per dimension, over the steps of a chunk: the largest normalised size, and the raw value it has."""
    rows, raw = new.reshape(-1, new.shape[-1]), old.reshape(-1, old.shape[-1])
    size = np.nan_to_num(np.abs(rows), nan=0.0, posinf=0.0)
    at = size.argmax(axis=0)
    columns = np.arange(size.shape[-1])
    return size[at, columns], raw[at, columns]


# --- images -------------------------------------------------------------------------------------------------------


def is_image(value: npt.ArrayLike) -> bool:
    """An array that looks like one colour image, [h, w, 3] or [3, h, w]."""
    shape = np.shape(value)
    return len(shape) == 3 and 3 in (shape[0], shape[-1]) and sorted(shape)[1] >= _MIN_IMAGE_SIDE


def _raw_images(sample: Sample) -> Iterator[Finding]:
    for key, value in flatten(sample).items():
        if not is_image(value):
            continue
        array = np.asarray(value)
        if array.dtype != np.uint8:
            low, high = array.min(), array.max()
            fits = array.dtype.kind == "f" and low >= 0 and high <= 1
            expected = "read as [0, 1]" if fits else "expected uint8 in 0..255, or floats in [0, 1]"
            yield Finding(key, f"is {array.dtype} in {low:.4g}..{high:.4g}; {expected}", is_surprise=not fits)
            if not fits:
                continue
        yield from _flat_image(key, array)


def _flat_image(key: str, array: np.ndarray) -> Iterator[Finding]:
    levels = array.astype(np.float64) * (255 if array.dtype.kind == "f" else 1)
    if levels.max() == 0:
        yield Finding(key, "is all black")
    elif levels.std() < FLAT_IMAGE_STD:
        yield Finding(key, f"is one colour (mean {levels.mean():.0f} of 255, deviation {levels.std():.2g})")


def _model_images(sample: Sample, model: BaseModelConfig) -> Iterator[Finding]:
    """Images as the robot transforms leave them, before resizing hides their shape."""
    masks = sample.get("image_mask", {})
    for slot, value in sample.get("image", {}).items():
        key, array = f"image/{slot}", np.asarray(value)
        if array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
            yield Finding(key, f"has shape {array.shape}; expected [height, width, 3]: swapped axes?")
            continue
        if array.dtype != np.uint8:
            yield Finding(key, f"is {array.dtype}; expected uint8 in 0..255")
        if not np.all(masks.get(slot, True)):
            yield Finding(f"image_mask/{slot}", "is false: the model ignores this camera", is_surprise=False)
        elif model.model_type is not ModelType.PI0_FAST or array.any():  # which is shown black images on purpose
            yield from _flat_image(key, array)


def _cameras(sample: Sample, model: BaseModelConfig) -> Iterator[Finding]:
    """Slots that the model wants and the sample lacks, and the reverse."""
    wanted = getattr(model, "image_keys", None)
    if wanted is None:  # pi0-FAST takes any
        return
    found = sample.get("image", {})
    for slot in wanted:
        if slot not in found:
            yield Finding(f"image/{slot}", f"is missing; the model takes {', '.join(wanted)}")
    for slot in found:
        if slot not in wanted:
            yield Finding(f"image/{slot}", f"is not used; the model takes {', '.join(wanted)}")


# --- recording ----------------------------------------------------------------------------------------------------


def _padding(sample: Sample, context: Context) -> Iterator[Finding]:
    """How much of the action chunk lies past the end of the episode."""
    length, horizon = context.episode_length, context.model.action_horizon
    if length is not None and length < horizon:
        yield Finding("actions", f"the episode has {length} frames, the model's chunks {horizon}: ends are repeated")
    for key, value in flatten(sample).items():
        if key.endswith("_is_pad") and (share := float(np.mean(value))) > 0:
            message = f"{share:.0%} of the chunk lies past the end of the episode and repeats its last step"
            yield Finding(key.removesuffix("_is_pad"), message, is_surprise=share > 0.5)


def _dropped(before: Sample, after: Sample) -> Iterator[Finding]:
    kept = {id(value) for value in flatten(after).values()}
    for key, value in flatten(before).items():
        if is_image(value) and id(value) not in kept:
            yield Finding(key, "this camera is dropped by the repack transform", is_surprise=False)
        elif key == "prompt" and "prompt" not in flatten(after):
            yield Finding("prompt", "the prompt is dropped: add 'prompt': 'prompt' to the repack transform")


def _chunk(sample: Sample, model: BaseModelConfig, *, is_training: bool) -> Iterator[Finding]:
    if not is_training:
        return
    if "actions" not in sample:
        yield Finding("actions", "the sample has no actions; training needs them")
    elif np.ndim(sample["actions"]) != 2 or np.shape(sample["actions"])[0] != model.action_horizon:
        shape = np.shape(sample["actions"])
        yield Finding("actions", f"have shape {shape}; expected [{model.action_horizon}, {model.action_dim}]")


def _too_wide(step: transforms.PadStatesAndActions, before: Sample) -> Iterator[Finding]:
    for key in ("state", "actions"):
        width = np.shape(before.get(key, 0.0))[-1:] or (0,)
        if width[0] > step.model_action_dim:
            yield Finding(key, f"has {width[0]} dimensions, the model only {step.model_action_dim} (model.action_dim)")


def _prompt_length(
    step: transforms.TokenizePrompt | transforms.TokenizeFASTInputs, before: Sample, after: Sample
) -> Iterator[Finding]:
    mask, tokenizer = np.asarray(after["tokenized_prompt_mask"]), step.tokenizer
    if "prompt" in before and not np.asarray(before["prompt"]).item().strip():
        yield Finding("prompt", "has no words, so nothing says what to do")
    if isinstance(tokenizer, PaligemmaTokenizer):
        seen = load_sentencepiece(tokenizer.model_path).decode(after["tokenized_prompt"][mask].tolist())
        yield Finding("tokenized_prompt", f"the model reads {seen!r}", is_surprise=False)
    with collected_warnings() as cut:
        step(before)
    for warning in cut:
        yield Finding("tokenized_prompt", warning.partition(":")[2].strip())
    if mask.all() and not isinstance(tokenizer, _TELL_OF_CUTS):
        yield Finding("tokenized_prompt", f"fills all {mask.size} tokens, is probably cut: raise model.max_token_len")


def _listed(items: list[str], count: int) -> str:
    rest = f", and {count - len(items)} more" if count > len(items) else ""
    return ", ".join(items) + rest
