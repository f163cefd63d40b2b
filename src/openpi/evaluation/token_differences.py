"""Differences of the prompt and its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from openpi.evaluation.difference import TOKENS, Difference, Frame, TrainingPath, made, shown, text_of
from openpi.models.tokenizer import load_sentencepiece
from openpi.policies import stages
from openpi.shared.tree import Tree


def prompt(frames: Sequence[Frame]) -> Iterator[Difference]:
    """Of the text, before it is tokenized."""
    for frame in frames:
        ours, theirs = (text_of(way[stages.RAW].get("prompt")) for way in (frame.trained, frame.served))
        if ours != theirs and not (ours is None and _have_same_tokens(frame)):  # both have the recipe's default
            yield Difference(
                TOKENS,
                "prompt",
                f"{shown(theirs)} instead of {shown(ours)}",
                "the server replaces the prompt: a default, or a transform of the robot's",
                "start the server without --default-prompt, or with that of training",
            )
            return


def _have_same_tokens(frame: Frame) -> bool:
    ours, theirs = (way[stages.INPUTS].get("tokenized_prompt") for way in (frame.trained, frame.served))
    return ours is not None and theirs is not None and np.array_equal(ours, theirs)


def tokens(frames: Sequence[Frame], path: TrainingPath) -> Iterator[Difference]:
    """Of what both ways make of the server's text, the first there is."""
    for frame in frames:
        ours, theirs = made(frame, path), frame.served[stages.INPUTS]
        if "tokenized_prompt" not in ours and "tokenized_prompt" not in theirs:
            continue
        if "tokenized_prompt" not in ours or "tokenized_prompt" not in theirs:
            who = "the server" if "tokenized_prompt" in theirs else "training"
            found, cause = f"only {who} has tokens", "the models are not of one kind"
            yield Difference(TOKENS, "tokenized_prompt", found, cause, "serve with the recipe of the checkpoint")
            return
        told = _token_difference(ours, theirs, path, text_of(frame.served[stages.RAW].get("prompt")))
        if told is not None:
            yield told
            return


def _token_difference(ours: Tree, theirs: Tree, path: TrainingPath, prompt: str | None) -> Difference | None:
    a, b = (np.asarray(way["tokenized_prompt"]) for way in (ours, theirs))
    masks = [np.asarray(way["tokenized_prompt_mask"], bool) for way in (ours, theirs)]
    valid = a[masks[0]], b[masks[1]]
    if np.array_equal(valid[0], valid[1]):
        if a.shape == b.shape and np.array_equal(masks[0], masks[1]):
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
    found = f"{shown(texts[1])} instead of {shown(texts[0])}, read with training's tokenizer"
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


def _reader(path: TrainingPath) -> Callable[[np.ndarray], str] | None:
    """Tokens of training's tokenizer -> text; None for tokenizers that do not say their file."""
    tokenizers = [getattr(step, "tokenizer", None) for step in path.after]
    tokenizer = next((each for each in tokenizers if hasattr(each, "model_path")), None)
    if tokenizer is None:
        return None
    pieces = load_sentencepiece(tokenizer.model_path)
    size = pieces.vocab_size()
    return lambda ids: pieces.decode([int(i) for i in ids if 0 <= i < size])


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())
