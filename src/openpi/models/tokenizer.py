"""Prompts (and discretised states) as tokens. Source: the model specification, section 8. No JAX here."""

from __future__ import annotations

import importlib.resources
import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from openpi.shared import download

logger = logging.getLogger("openpi")

PALIGEMMA_TOKENIZER_URL = "gs://big_vision/paligemma_tokenizer.model"
# Of bin k on [-1, 1]; a state below -1 gets bin -1, one above falls into bin 255.
_STATE_BIN_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]


class PaligemmaTokenizer:
    """The prompt of pi0 and pi0.5.

    The sentencepiece model is opened on first use: making a recipe needs no file and no network.

    Attributes:
        max_len: length of the token arrays.
        model_path: sentencepiece model: a file, or `package:dotted.package/file` for a file inside a Python package.
            None = PaliGemma's, from the download cache or its bucket.
    """

    def __init__(self, max_len: int = 48, model_path: str | Path | None = None) -> None:
        self.max_len = max_len
        self.model_path = model_path
        self._cut_prompts: set[str] = set()

    def tokenize(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt, padded with 0.

        Args:
            prompt: a task in words; underscores and line breaks count as blanks.
            state: float[s], normalised to [-1, 1] and not padded, to be written into the prompt (pi0.5); None = leave
                it out (pi0).
        Returns:
            int64[max_len] tokens and bool[max_len], true on real tokens. What is too long loses its end, with a
            warning for each new prompt.
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            # The line break that starts the answer is encoded on its own, as in PaliGemma's training.
            tokens = self._model.encode(text, add_bos=True) + self._model.encode("\n")
        else:
            full = f"Task: {text}, State: {state_as_text(state)};\nAction: "
            tokens = self._model.encode(full, add_bos=True)
        if len(tokens) > self.max_len:
            self._warn_cut(text, tokens)
        return _pad(tokens, self.max_len, np.int64), _pad([True] * len(tokens), self.max_len, np.bool_)

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return load_sentencepiece(self.model_path)

    def _warn_cut(self, prompt: str, tokens: list[int]) -> None:
        if prompt in self._cut_prompts:
            return
        self._cut_prompts.add(prompt)
        logger.warning(
            "prompt '%s' has %d tokens and is cut to max_token_len=%d: the model does not see %r at its end. "
            "Shorten the prompt, or raise max_token_len and train with it",
            prompt,
            len(tokens),
            self.max_len,
            self._model.decode(tokens[self.max_len :]),
        )


def state_as_text(state: np.ndarray) -> str:
    """The 256 bins that a normalised state falls into, as numbers separated by blanks; -1 below the first bin."""
    return " ".join(map(str, np.digitize(np.asarray(state), _STATE_BIN_EDGES) - 1))


def load_sentencepiece(model_path: str | Path | None) -> sentencepiece.SentencePieceProcessor:
    """Opens a sentencepiece model; None = PaliGemma's.

    Raises:
        FileNotFoundError: it is neither there nor reachable; the message says where to put it.
    """
    return sentencepiece.SentencePieceProcessor(model_proto=_read_model(model_path))


def _read_model(model_path: str | Path | None) -> bytes:
    if model_path is None:
        return download.maybe_download(PALIGEMMA_TOKENIZER_URL, gs={"token": "anon"}).read_bytes()
    package, slash, name = str(model_path).removeprefix("package:").partition("/")
    if str(model_path).startswith("package:") and slash:
        return _read_resource(package, name)
    path = Path(model_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {path} does not exist; expected a sentencepiece model file, or package:dotted.package/file. "
            "Correct the model's tokenizer_path"
        )
    return path.read_bytes()


def _read_resource(package: str, name: str) -> bytes:
    try:
        return importlib.resources.files(package).joinpath(name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"tokenizer package:{package}/{name} does not exist ({error}); correct the model's tokenizer_path"
        ) from error


def _pad(values: list, length: int, dtype: type) -> np.ndarray:
    """The first `length` values, filled up with zeros."""
    padded = np.zeros(length, dtype=dtype)
    padded[: len(values)] = values[:length]
    return padded
