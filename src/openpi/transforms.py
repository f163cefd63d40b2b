"""Sample -> sample: the steps between a dataset or a robot and a model.

A sample is a possibly nested dict of NumPy arrays for one time step. No transform edits the dict or the
arrays it is given. Paths into a sample are '/'-joined, so `{"observation/image": x}` and `{"observation":
{"image": x}}` are the same once flattened. Source: the training specification, sections 1 to 3.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi.shared import image_tools
from openpi.shared import tree as _tree
from openpi.shared.errors import missing_key
from openpi.shared.normalize import NormStats
from openpi_client.image_tools import resize_each

DataDict = dict[str, Any]


@runtime_checkable
class DataTransformFn(Protocol):
    """Anything that makes a sample of a sample; dataclasses of one's own may name it as their base."""

    def __call__(self, data: DataDict, /) -> DataDict: ...


# Keeps the division finite where a standard deviation or quantile range is zero; part of the published
# formulas.
_EPSILON = 1e-6


@runtime_checkable
class PromptTokenizer(Protocol):
    """Text (and state) to tokens; `openpi.models.tokenizer.PaligemmaTokenizer` is one."""

    def tokenize(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]: ...


@runtime_checkable
class ActionTokenizer(Protocol):
    """Text, state and actions to tokens and back; `openpi.models.tokenizer.FASTTokenizer` is one."""

    def tokenize(
        self, prompt: str, state: np.ndarray, actions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...

    def extract_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class CompositeTransform:
    """Several transforms as one, applied left to right."""

    transforms: Sequence[DataTransformFn]

    def __call__(self, data: DataDict) -> DataDict:
        for transform in self.transforms:
            data = transform(data)
        return data


def compose(transforms: Sequence[DataTransformFn]) -> DataTransformFn:
    """One transform that applies the given ones left to right."""
    return CompositeTransform(tuple(transforms))


@dataclasses.dataclass(frozen=True)
class Group:
    """Transforms on the way to the model, and those on the way back.

    Attributes:
        inputs: applied in order to observations (and actions, in training).
        outputs: applied in order to what the model returns.
    """

    inputs: Sequence[DataTransformFn] = ()
    outputs: Sequence[DataTransformFn] = ()

    def push(self, *, inputs: Sequence[DataTransformFn] = (), outputs: Sequence[DataTransformFn] = ()) -> Group:
        """A group one layer nearer to the model: inputs go to the end, outputs to the front."""
        return Group(inputs=(*self.inputs, *inputs), outputs=(*outputs, *self.outputs))


@dataclasses.dataclass(frozen=True)
class RepackTransform:
    """Renames and regroups; what is not mentioned is dropped.

    Attributes:
        structure: nested dicts and lists in the shape of the output, whose leaves are '/'-joined paths into
            the input. Output keys are taken literally.
    """

    structure: Any

    def __call__(self, data: DataDict) -> DataDict:
        return _fill(self.structure, flatten_dict(data), ())


def _fill(structure: Any, leaves: Mapping[str, object], place: tuple[str, ...]) -> Any:
    if isinstance(structure, Mapping):
        return {key: _fill(value, leaves, (*place, str(key))) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [_fill(value, leaves, (*place, str(i))) for i, value in enumerate(structure)]
    if structure not in leaves:
        wanted_by = f"RepackTransform, for '{'/'.join(place)}'," if place else "RepackTransform"
        raise missing_key(structure, leaves, wanted_by=wanted_by, fix="Change the source path in its structure.")
    return leaves[structure]


@dataclasses.dataclass(frozen=True)
class InjectDefaultPrompt:
    """Sets `prompt` on samples that carry none, or None, as clients send that always send the same keys.

    Attributes:
        prompt: None = leave samples as they are.
    """

    prompt: str | None

    def __call__(self, data: DataDict) -> DataDict:
        if self.prompt is None or data.get("prompt") is not None:
            return data
        return {**data, "prompt": np.asarray(self.prompt)}


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Brings each key that has statistics to about unit scale; nothing is clipped. Inverse: `Unnormalize`.

    z-score: `(x - mean) / (std + 1e-6)`; quantiles: `(x - q01) / (q99 - q01 + 1e-6) * 2 - 1`. Statistics may
    be wider than the data (their first entries are used), never narrower.

    Attributes:
        norm_stats: per flattened key; None = leave samples as they are.
        use_quantiles: which formula.
        strict: fail on a key that has statistics but is not in the data.
    """

    norm_stats: Mapping[str, Any] | None
    use_quantiles: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        _check_quantiles(self.norm_stats, self.use_quantiles)

    def __call__(self, data: DataDict) -> DataDict:
        if self.norm_stats is None:
            return data
        scale = _to_quantile_range if self.use_quantiles else _to_zscore
        return _apply_stats(data, self.norm_stats, scale, strict=self.strict)


@dataclasses.dataclass(frozen=True)
class Unnormalize:
    """Inverse of `Normalize`; every key with statistics must be there.

    Statistics may be narrower than the data, which the model has padded: the dimensions beyond them pass
    through (quantiles) or are scaled by 1 + 1e-6 (z-score). They are never wider.

    Attributes:
        norm_stats: per flattened key; None = leave samples as they are.
        use_quantiles: which formula.
    """

    norm_stats: Mapping[str, Any] | None
    use_quantiles: bool = False

    def __post_init__(self) -> None:
        _check_quantiles(self.norm_stats, self.use_quantiles)

    def __call__(self, data: DataDict) -> DataDict:
        if self.norm_stats is None:
            return data
        scale = _from_quantile_range if self.use_quantiles else _from_zscore
        return _apply_stats(data, self.norm_stats, scale, strict=True)


def _check_quantiles(norm_stats: Mapping[str, NormStats] | None, use_quantiles: bool) -> None:
    if norm_stats is None or not use_quantiles:
        return
    lacking = [key for key, stats in flatten_dict(norm_stats).items() if stats.q01 is None or stats.q99 is None]
    if lacking:
        raise ValueError(
            f"quantile normalisation needs q01 and q99, but the statistics of {', '.join(lacking)} have "
            "none; compute them again with `openpi stats`, or use z-score normalisation"
        )


def _apply_stats(
    data: DataDict,
    norm_stats: Mapping[str, object],
    scale: Callable[[np.ndarray, NormStats, str], np.ndarray],
    *,
    strict: bool,
) -> DataDict:
    flat_stats = flatten_dict(norm_stats)
    flat = flatten_dict(data)
    absent = [key for key in flat_stats if key not in flat]
    if strict and absent:
        raise ValueError(
            f"there are normalisation statistics for {', '.join(absent)}, which the sample lacks; found: "
            f"{', '.join(flat)}. Keep the key in the transforms before this one"
        )
    scaled = {
        key: scale(np.asarray(value), flat_stats[key], key) if key in flat_stats else value
        for key, value in flat.items()
    }
    return unflatten_dict(scaled)


def _to_zscore(x: np.ndarray, stats: NormStats, key: str) -> np.ndarray:
    n = _check_width(x, stats, key, at_least=True)
    return (x - stats.mean[..., :n]) / (stats.std[..., :n] + _EPSILON)


def _from_zscore(x: np.ndarray, stats: NormStats, key: str) -> np.ndarray:
    n = _check_width(x, stats, key, at_least=False)
    return x * (pad_to_dim(stats.std, n, value=1.0) + _EPSILON) + pad_to_dim(stats.mean, n)


def _to_quantile_range(x: np.ndarray, stats: NormStats, key: str) -> np.ndarray:
    n = _check_width(x, stats, key, at_least=True)
    q01, q99 = _quantiles(stats)
    low, high = q01[..., :n], q99[..., :n]
    return (x - low) / (high - low + _EPSILON) * 2.0 - 1.0


def _from_quantile_range(x: np.ndarray, stats: NormStats, key: str) -> np.ndarray:
    _check_width(x, stats, key, at_least=False)
    low, high = _quantiles(stats)
    m = low.shape[-1]
    scaled = (x[..., :m] + 1.0) / 2.0 * (high - low + _EPSILON) + low
    return np.concatenate([scaled, x[..., m:]], axis=-1) if m < x.shape[-1] else scaled


def _quantiles(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    assert stats.q01 is not None  # checked when the transform was made
    assert stats.q99 is not None
    return stats.q01, stats.q99


def _check_width(x: np.ndarray, stats: NormStats, key: str, *, at_least: bool) -> int:
    """The width of `x`, after checking it against the width of the statistics."""
    width = x.shape[-1] if x.ndim else 0
    fits = stats.width >= width if at_least else stats.width <= width
    if width and fits:
        return width
    relation = "at least as wide as the data" if at_least else "no wider than the model's output"
    raise ValueError(
        f"the normalisation statistics of '{key}' have {stats.width} dimensions and the data has {width} "
        f"(shape {x.shape}); statistics must be {relation}. They were probably computed for another robot or "
        "another set of transforms: compute them for this recipe with `openpi stats`, or correct its asset id"
    )


@dataclasses.dataclass(frozen=True)
class ChannelsFirst:
    """Cameras as the published loader hands them out, [..., 3, h, w]: views of [..., h, w, 3], uint8 all the same.

    Attributes:
        cameras: keys of a sample; those that it lacks are passed over.
    """

    cameras: Sequence[str]

    def __call__(self, data: DataDict) -> DataDict:
        return {**data, **{key: np.moveaxis(data[key], -1, -3) for key in self.cameras if key in data}}


@dataclasses.dataclass(frozen=True)
class ResizeImages:
    """Resizes every image under `image` with its aspect kept, on centred black; uint8 [h, w, c], also of [3, h, w]."""

    height: int
    width: int

    def __call__(self, data: DataDict) -> DataDict:
        given = _require(data, "image", "ResizeImages")
        images = {key: image_tools.channels_last(np.asarray(image)) for key, image in given.items()}
        for key, image in images.items():
            self._check(key, image)
        return {**data, "image": resize_each(images, self.height, self.width)}

    def _check(self, key: str, image: np.ndarray) -> None:
        # Floats pass where the size fits: they are in [-1, 1] then, as models take them. Of others we cannot tell.
        if image.shape[-3:-1] != (self.height, self.width) and image.dtype != np.uint8:
            raise ValueError(
                f"image '{key}' is to be resized, for which it has to be uint8; it is {image.dtype}. Use "
                "image_tools.convert_to_uint8 on floats in [0, 1] in the robot's inputs"
            )


@dataclasses.dataclass(frozen=True)
class SubsampleActions:
    """Keeps every `stride`-th action of a chunk."""

    stride: int

    def __call__(self, data: DataDict) -> DataDict:
        return {**data, "actions": _require(data, "actions", "SubsampleActions")[:: self.stride]}


@dataclasses.dataclass(frozen=True)
class DeltaActions:
    """Expresses actions relative to the measured state where `mask` is true. Inverse: `AbsoluteActions`.

    `actions` is [h, d] or [d], `state` [s]; the mask covers their first entries. A float action keeps its
    dtype. Samples without actions pass through.

    Attributes:
        mask: None = leave samples as they are.
    """

    mask: Sequence[bool] | None

    def __call__(self, data: DataDict) -> DataDict:
        return _shift_actions(data, self.mask, sign=-1)


@dataclasses.dataclass(frozen=True)
class AbsoluteActions:
    """Inverse of `DeltaActions`: adds the measured state where `mask` is true."""

    mask: Sequence[bool] | None

    def __call__(self, data: DataDict) -> DataDict:
        return _shift_actions(data, self.mask, sign=1)


def _shift_actions(data: DataDict, mask: Sequence[bool] | None, *, sign: int) -> DataDict:
    if "actions" not in data or mask is None:
        return data
    actions = np.asarray(data["actions"])
    state = np.asarray(_require(data, "state", "a transform between absolute and relative actions"))
    chosen = np.asarray(mask, dtype=bool)
    width = len(chosen)
    for name, array in (("actions", actions), ("state", state)):
        if array.ndim == 0 or array.shape[-1] < width:
            raise ValueError(
                f"the mask of relative actions has {width} entries and '{name}' has shape {array.shape}; "
                f"expected at most as many entries as '{name}' has dimensions. Correct the mask"
            )
    offset = np.where(chosen, state[..., :width], 0)
    if actions.ndim > state.ndim:
        offset = np.expand_dims(offset, -2)
    dtype = actions.dtype if np.issubdtype(actions.dtype, np.floating) else np.result_type(actions, offset)
    shifted = actions.astype(dtype)
    shifted[..., :width] = actions[..., :width] + sign * offset
    return {**data, "actions": shifted}


@dataclasses.dataclass(frozen=True)
class TokenizePrompt:
    """Replaces `prompt` by `tokenized_prompt` and `tokenized_prompt_mask`.

    Attributes:
        discrete_state_input: write the state, normalised and not yet padded, into the prompt.
    """

    tokenizer: PromptTokenizer
    discrete_state_input: bool = False

    def __call__(self, data: DataDict) -> DataDict:
        prompt, rest = _pop_prompt(data)
        state = None
        if self.discrete_state_input:
            state = data.get("state")
            if state is None:
                raise ValueError(
                    f"the prompt of this model carries the state, but 'state' is missing; found: {', '.join(data)}"
                )
        tokens, mask = self.tokenizer.tokenize(prompt, state)
        return {**rest, "tokenized_prompt": tokens, "tokenized_prompt_mask": mask}


@dataclasses.dataclass(frozen=True)
class TokenizeFASTInputs:
    """Replaces `prompt` by the tokens of prompt, state and (in training) actions, with their masks."""

    tokenizer: ActionTokenizer

    def __call__(self, data: DataDict) -> DataDict:
        prompt, rest = _pop_prompt(data)
        state = _require(data, "state", "TokenizeFASTInputs")
        tokens, token_mask, ar_mask, loss_mask = self.tokenizer.tokenize(prompt, state, data.get("actions"))
        return {
            **rest,
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": token_mask,
            "token_ar_mask": ar_mask,
            "token_loss_mask": loss_mask,
        }


@dataclasses.dataclass(frozen=True)
class ExtractFASTActions:
    """Replaces generated token ids under `actions` by float[action_horizon, action_dim].

    Raises:
        UndecodableActionsError: the tokens are no such chunk; a robot must not be sent zeros instead.
    """

    tokenizer: ActionTokenizer
    action_horizon: int
    action_dim: int

    def __call__(self, data: DataDict) -> DataDict:
        if "actions" not in data:
            return data
        tokens = np.asarray(data["actions"]).astype(np.int32)
        # Tokenizers written for the published interface know only `extract_actions`.
        decode = getattr(self.tokenizer, "decode_actions", None) or self.tokenizer.extract_actions
        return {
            **data,
            "actions": decode(tokens, self.action_horizon, self.action_dim),
        }

    def grammar(self) -> object | None:
        """What the tokenizer lets a model write, see `ActionGrammar`; None = anything."""
        make = getattr(self.tokenizer, "grammar", None)
        return None if make is None else make(self.action_horizon, self.action_dim)


def action_grammar(transforms: Iterable[DataTransformFn]) -> object | None:
    """The grammar of the action tokens that these output transforms read; None if they read none."""
    reader = _token_reader(transforms)
    return None if reader is None else reader.grammar()


def action_codec(transforms: Iterable[DataTransformFn]) -> Any | None:
    """The FAST codec that these output transforms decode with; None without one."""
    return getattr(getattr(_token_reader(transforms), "tokenizer", None), "codec", None)


def _token_reader(transforms: Iterable[DataTransformFn]) -> ExtractFASTActions | None:
    return next((step for step in transforms if isinstance(step, ExtractFASTActions)), None)


@dataclasses.dataclass(frozen=True)
class PromptFromLeRobotTask:
    """Sets `prompt` to the text of the frame's `task_index`.

    Attributes:
        tasks: the dataset's task table.
    """

    tasks: Mapping[int, str]

    def __call__(self, data: DataDict) -> DataDict:
        if "task_index" not in data:
            raise ValueError(
                f"the prompt comes from the dataset's task, but 'task_index' is missing; found: {', '.join(data)}"
            )
        index = int(data["task_index"])
        if index not in self.tasks:
            raise ValueError(
                f"task_index={index} is not in the dataset's task table, which has {sorted(self.tasks)}; "
                "the dataset's meta/tasks file is incomplete"
            )
        return {**data, "prompt": self.tasks[index]}


@dataclasses.dataclass(frozen=True)
class PadStatesAndActions:
    """Pads `state` and `actions` with zeros to the width of the model; longer ones stay."""

    model_action_dim: int

    def __call__(self, data: DataDict) -> DataDict:
        padded = {"state": pad_to_dim(_require(data, "state", "PadStatesAndActions"), self.model_action_dim)}
        if "actions" in data:
            padded["actions"] = pad_to_dim(data["actions"], self.model_action_dim)
        return {**data, **padded}


def flatten_dict(tree: Mapping[str, object]) -> _tree.Leaves:
    """Nested dicts -> one dict keyed by '/'-joined paths; empty dicts vanish."""
    return _tree.flatten(tree)


def unflatten_dict(tree: Mapping[str, object]) -> DataDict:
    """Inverse of `flatten_dict`."""
    return _tree.unflatten(tree)


def transform_dict(patterns: Mapping[str, str | None], tree: Mapping[str, object]) -> dict[str, object]:
    """Renames and removes leaves by regular expressions on their flattened paths.

    Args:
        patterns: an expression must match a whole path; the first that does wins. Its value is the
            replacement (groups as in `re.sub`), or None to remove the leaf. Unmatched leaves stay.
    Raises:
        ValueError: two leaves get the same path, or one gets a path that leads through another.
    """
    old_paths: dict[str, str] = {}
    flat = flatten_dict(tree)
    for path in flat:
        new_path = _rename(path, patterns)
        if new_path is None:
            continue
        if new_path in old_paths:
            raise ValueError(
                f"{_fate(old_paths[new_path], new_path)} and {_fate(path, new_path)}; two leaves cannot have one path; "
                "change the patterns"
            )
        old_paths[new_path] = path
    for new_path, path in old_paths.items():
        parts = new_path.split("/")
        for parent in ("/".join(parts[:end]) for end in range(1, len(parts))):
            if parent in old_paths:
                raise ValueError(
                    f"{_fate(old_paths[parent], parent)}, a leaf, and {_fate(path, new_path)}, which cannot lie below "
                    "it; change the patterns"
                )
    return unflatten_dict({new_path: flat[path] for new_path, path in old_paths.items()})


def _fate(path: str, new_path: str) -> str:
    return f"'{path}' stays" if path == new_path else f"'{path}' becomes '{new_path}'"


def _rename(path: str, patterns: Mapping[str, str | None]) -> str | None:
    for pattern, replacement in patterns.items():
        try:
            if re.fullmatch(pattern, path):
                return None if replacement is None else re.sub(pattern, replacement, path, count=1)
        except (re.error, IndexError) as error:
            raise ValueError(
                f"the pattern {pattern!r} with the replacement {replacement!r} is no regular expression: {error}"
            ) from error
    return path


def apply_tree(
    tree: Mapping[str, object],
    selector: Mapping[str, object],
    fn: Callable[[object, object], object],
    *,
    strict: bool = False,
) -> dict[str, object]:
    """`fn(leaf, selected)` for every leaf whose path is also in `selector`; other leaves stay.

    Raises:
        ValueError: `strict`, and `selector` has a path that `tree` lacks.
    """
    flat, selected = flatten_dict(tree), flatten_dict(selector)
    absent = [path for path in selected if path not in flat]
    if strict and absent:
        raise ValueError(f"{', '.join(absent)} not found; there is {', '.join(flat)}")
    return unflatten_dict({path: fn(leaf, selected[path]) if path in selected else leaf for path, leaf in flat.items()})


def pad_to_dim(x: np.ndarray, target_dim: int, axis: int = -1, value: float = 0.0) -> np.ndarray:
    """`x` filled up with `value` at the end of `axis`; returned as it is when long enough."""
    x = np.asarray(x)
    missing = target_dim - x.shape[axis]
    if missing <= 0:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, missing)
    return np.pad(x, padding, constant_values=value)


def make_bool_mask(*dims: int) -> tuple[bool, ...]:
    """Runs of booleans: 6 is six times True, -1 once False: `(6, -1)` for six joints and a gripper."""
    return tuple(dim > 0 for dim in dims for _ in range(abs(dim)))


def _require(data: DataDict, key: str, wanted_by: str) -> Any:
    if key not in data:
        raise missing_key(key, data, wanted_by=wanted_by)
    return data[key]


def _pop_prompt(data: DataDict) -> tuple[str, DataDict]:
    """The prompt as text, and the sample without it."""
    if data.get("prompt") is None:
        raise ValueError(
            f"Prompt is required, but the sample has no 'prompt'; found: {', '.join(data)}. Send one, start "
            "the server with --default-prompt, or keep 'prompt' in the repack transform and set "
            "prompt_from_task for training"
        )
    prompt = data["prompt"]
    text = np.asarray(prompt).item() if isinstance(prompt, (list, tuple, np.ndarray, np.generic)) else prompt
    if isinstance(text, bytes):
        text = text.decode()
    return text, {key: value for key, value in data.items() if key != "prompt"}
