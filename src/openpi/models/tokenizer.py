"""Prompts (and discretised states) as tokens. Source: the model specification, section 8. No JAX here."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece

from openpi.models.fast_codec import FastCodec, UndecodableActionsError, load_codec
from openpi.shared import download
from openpi.shared.collected_warnings import Warnings
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import content_instead

if TYPE_CHECKING:
    from openpi.models.action_grammar import ActionGrammar

logger = logging.getLogger(__name__)

PALIGEMMA_TOKENIZER_URL = "gs://big_vision/paligemma_tokenizer.model"
# Of bin k on [-1, 1]; a state below -1 gets bin -1, one above falls into bin 255.
_STATE_BIN_EDGES = np.linspace(-1, 1, 256 + 1)[:-1]
_STATE = ", State: "
_QUOTED = 50  # characters of a prompt


class PaligemmaTokenizer:
    """The prompt of pi0 and pi0.5.

    The sentencepiece model is opened on first use: making a recipe needs no file and no network.

    Attributes:
        max_len: length of the token arrays.
        model_path: sentencepiece model: a file, or `package:dotted.package/file` for a file inside a Python
            package. None = PaliGemma's, from the download cache or its bucket.
    """

    def __init__(self, max_len: int = 48, model_path: str | Path | None = None) -> None:
        self.max_len = max_len
        self.model_path = model_path
        self._warn = Warnings()

    def tokenize(self, prompt: str, state: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a prompt, padded with 0.

        Args:
            prompt: a task in words; underscores and line breaks count as blanks.
            state: float[s], normalised to [-1, 1] and not padded, to be written into the prompt (pi0.5); None
                = leave it out (pi0).
        Returns:
            int64[max_len] tokens and bool[max_len], true on real tokens. What is too long loses its end, with
            a warning (`collected_warnings`).
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            # The line break that starts the answer is encoded on its own, as in PaliGemma's training.
            tokens = self._model.encode(text, add_bos=True) + self._model.encode("\n")
        else:
            full = f"Task: {text}{_STATE}{state_as_text(state)};\nAction: "
            tokens = self._model.encode(full, add_bos=True)
        if len(tokens) > self.max_len:
            self._warn([_cut(self._model, tokens, self.max_len, text, has_state=state is not None)])
        return _pad(tokens, self.max_len, np.int64), _pad([True] * len(tokens), self.max_len, np.bool_)

    def open(self) -> None:
        """Now and not with the first prompt; errors as of `load_sentencepiece`."""
        self._model  # noqa: B018

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return load_sentencepiece(self.model_path)


class BinningTokenizer:
    """Prompt in the form of pi0-FAST; generated tokens are bins of [-1, 1]. RoboArena baseline, only served.

    Attributes:
        max_len: length of the token arrays.
        n_bins: per action value.
        model_path: as of `PaligemmaTokenizer`.
    """

    def __init__(self, max_len: int = 256, n_bins: int = 256, model_path: str | Path | None = None) -> None:
        self.max_len = max_len
        self.n_bins = n_bins
        self._text = _ActionText(max_len, model_path)

    def tokenize(
        self, prompt: str, state: np.ndarray, actions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `FASTTokenizer.tokenize`, without actions.

        Raises:
            NotImplementedError: actions are given; this baseline cannot be trained.
        """
        if actions is not None:
            raise NotImplementedError("BinningTokenizer serves existing checkpoints only; train with FASTTokenizer")
        return self._text.tokens_and_masks(prompt, state, None)

    def decode_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray:
        """float64[action_horizon, action_dim] in [-1, 1), of the first tokens.

        Raises:
            UndecodableActionsError: too few tokens, or some that are no bins.
        """
        bins = self._text.action_ids(tokens)
        count = action_horizon * action_dim
        if len(bins) < count:
            raise UndecodableActionsError(f"{len(bins)} action tokens were generated; a chunk has {count}")
        chosen = np.array(bins[:count])
        if chosen.min(initial=0) < 0 or chosen.max(initial=0) >= self.n_bins:
            raise UndecodableActionsError(f"{chosen.min()} to {chosen.max()} are no bins 0 to {self.n_bins - 1}")
        return chosen.reshape(action_horizon, action_dim) / self.n_bins * 2 - 1

    def extract_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray:
        """As `decode_actions`; float32 zeros, and a warning, if no chunk: the published form."""
        return _or_zeros(self.decode_actions, tokens, action_horizon, action_dim)


class FASTTokenizer:
    """Prompt, state and actions as text for pi0-FAST: actions are compressed by DCT and byte-pair encoding.

    Models are opened on first use.

    Attributes:
        max_len: length of the token arrays.
        fast_tokenizer_path: folder of a FAST processor, or its name on the Hugging Face hub.
        model_path: as of `PaligemmaTokenizer`.
    """

    def __init__(
        self,
        max_len: int = 256,
        fast_tokenizer_path: str | Path = "physical-intelligence/fast",
        model_path: str | Path | None = None,
    ) -> None:
        self.max_len = max_len
        self.fast_tokenizer_path = fast_tokenizer_path
        self._text = _ActionText(max_len, model_path)

    @cached_property
    def codec(self) -> FastCodec:
        """The action codec, opened on first use."""
        return load_codec(self.fast_tokenizer_path)

    def tokenize(
        self, prompt: str, state: np.ndarray, actions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens and masks, each [max_len].

        Args:
            state: float[s], normalised.
            actions: float[h, d], normalised; None at inference.
        Returns:
            int64 tokens padded with 0; bool, true on real tokens; int64, 1 where attention is causal (the
            actions); bool, true on tokens that are trained (the actions).
        """
        return self._text.tokens_and_masks(prompt, state, None if actions is None else self.codec.encode(actions))

    def check_fits(self, vocab_size: int) -> None:
        """Raises ValueError unless every action id has a token, that the model has and that survives being text.

        Args:
            vocab_size: of the model.
        """
        self._text.check_fits(self.codec.bpe.get_vocab_size(), vocab_size)

    def decode_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray:
        """float64[action_horizon, action_dim] from generated tokens.

        Raises:
            UndecodableActionsError: they are not exactly such a chunk.
        """
        try:
            return self.codec.decode(self._text.action_ids(tokens), action_horizon, action_dim)
        except UndecodableActionsError as error:
            if self._text.has_end(tokens):
                raise
            raise UndecodableActionsError(
                f"{error}: the model had not come to an end after {len(tokens)} tokens, and may write no more "
                "(model.max_token_len, at least 256)"
            ) from error

    def extract_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray:
        """As `decode_actions`; float32 zeros, and a warning, if no chunk: the published form."""
        return _or_zeros(self.decode_actions, tokens, action_horizon, action_dim)

    def grammar(self, action_horizon: int, action_dim: int) -> ActionGrammar:
        """What a model may write so that `decode_actions` succeeds."""
        from openpi.models.action_grammar import ActionGrammar

        return ActionGrammar(
            opening=np.array(self._text.opening),
            closing=np.array(self._text.closing),
            last_action_token=self._text.last_action_token,
            ids=self.codec.id_table(),
            num_values=action_horizon * action_dim,
        )


class FSQTokenizer:
    """Prompt in the form of pi0-FAST for the finite-scalar-quantisation baseline of RoboArena.

    Its learned decoder is not part of this build, because how its checkpoint names the parameters is not known:
    prompts can be made, a policy cannot (see `check_can_decode`).
    """

    _NO_DECODER = (
        "FSQTokenizer cannot decode actions: its learned decoder is not part of this build. Serve one of the other "
        "DROID checkpoints, such as pi05_droid"
    )

    def __init__(
        self,
        max_len: int = 256,
        fsq_tokenizer_path: str | Path | None = None,
        model_path: str | Path | None = None,
    ) -> None:
        self.max_len = max_len
        self.fsq_tokenizer_path = fsq_tokenizer_path
        self._text = _ActionText(max_len, model_path)

    def tokenize(
        self, prompt: str, state: np.ndarray, actions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `BinningTokenizer.tokenize`."""
        if actions is not None:
            raise NotImplementedError("FSQTokenizer serves existing checkpoints only; train with FASTTokenizer")
        return self._text.tokens_and_masks(prompt, state, None)

    @classmethod
    def check_can_decode(cls) -> None:
        """Raises ValueError; a policy asks before it loads anything."""
        raise ValueError(cls._NO_DECODER)

    def decode_actions(self, tokens: np.ndarray, action_horizon: int, action_dim: int) -> np.ndarray:
        """Raises ValueError."""
        raise ValueError(self._NO_DECODER)

    extract_actions = decode_actions


class _ActionText:
    """The text form that the action tokenizers share:

    `Task: ..., State: ...;` line break, then `Action: ` <action ids> `|` end-of-sequence.

    Action id k is the sentencepiece piece k before the last `<loc>`; the 128 `<seg>` pieces after it are
    skipped.
    """

    _MARKER = "Action: "
    _NUM_SEG = 128

    def __init__(self, max_len: int, model_path: str | Path | None) -> None:
        self._max_len = max_len
        self._model_path = model_path
        self._warn = Warnings()

    @cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        return load_sentencepiece(self._model_path)

    def tokens_and_masks(
        self, prompt: str, state: np.ndarray, action_ids: list[int] | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        text = prompt.lower().strip().replace("_", " ")
        prefix = self._model.encode(f"Task: {text}{_STATE}{state_as_text(state)};\n", add_bos=True)
        postfix = [] if action_ids is None else [*self.opening, *self._mirror(action_ids), *self.closing]
        tokens = prefix + postfix
        if len(prefix) > self._max_len:
            self._warn([_cut(self._model, prefix, self._max_len, text, has_state=True)])
        if postfix and len(tokens) > self._max_len:
            self._warn(
                [
                    f"actions: a sample has {len(tokens)} tokens and is cut to {self._max_len} (max_token_len): the "
                    "model does not learn the end of its actions. Raise max_token_len"
                ]
            )
        is_target = [False] * len(prefix) + [True] * len(postfix)
        n = self._max_len
        return (
            _pad(tokens, n, np.int64),
            _pad([True] * len(tokens), n, np.bool_),
            _pad(is_target, n, np.int64),
            _pad(is_target, n, np.bool_),
        )

    def action_ids(self, tokens: np.ndarray) -> list[int]:
        """Generated tokens -> action ids.

        Goes through text and back: that is how checkpoints were evaluated, and it drops what is no piece of
        text.

        Raises:
            UndecodableActionsError: the marker of actions is not among them.
        """
        text = self._model.decode(np.asarray(tokens).astype(int).tolist())
        _, marker, rest = text.partition(self._MARKER)
        if not marker:
            raise UndecodableActionsError(f"the generated text has no '{self._MARKER}': {text[:60]!r}")
        return self._mirror(self._model.encode(rest.split("|")[0].strip()))

    def has_end(self, tokens: np.ndarray) -> bool:
        """Whether the end of the sequence is among generated tokens."""
        return self._model.eos_id() in np.asarray(tokens).astype(int)

    @cached_property
    def opening(self) -> list[int]:
        """Tokens before the actions."""
        return self._model.encode(self._MARKER)

    @cached_property
    def closing(self) -> list[int]:
        """Tokens after the actions."""
        return self._model.encode("|", add_eos=True)

    @property
    def last_action_token(self) -> int:
        """The token of action id 0."""
        return self._model.vocab_size() - 1 - self._NUM_SEG

    def check_fits(self, num_ids: int, vocab_size: int) -> None:
        """Raises ValueError unless `num_ids` action ids can be written by a model and read back."""
        if self._model.vocab_size() > vocab_size:
            raise ValueError(
                f"the text tokenizer has {self._model.vocab_size()} tokens and the model {vocab_size}; give the model "
                "(paligemma_variant) at least as many, or use a smaller tokenizer_path"
            )
        if self._model_path is None:  # the published pair: known to fit
            return
        lost = [i for i in range(num_ids) if i > self.last_action_token or not self._comes_back(i)]
        if lost:
            raise ValueError(
                f"the text tokenizer {self._model_path} ({self._model.vocab_size()} tokens) has no token of its own "
                f"for {len(lost)} of the {num_ids} action ids (the first is {lost[0]}). Fit an action tokenizer with a "
                "smaller vocabulary (openpi tokenizer fit --vocab-size), or use a larger one (tokenizer_path)"
            )

    def _comes_back(self, action_id: int) -> bool:
        written = [*self.opening, *self._mirror([action_id]), *self.closing]
        return self.action_ids(np.array(written)) == [action_id]

    def _mirror(self, ids: list[int]) -> list[int]:
        """Action ids <-> sentencepiece ids; its own inverse."""
        return [self.last_action_token - int(i) for i in ids]


def state_as_text(state: np.ndarray) -> str:
    """The 256 bins that a normalised state falls into, separated by blanks; -1 below the first bin.

    Raises:
        ValueError: a value that is not finite, which would read as the largest.
    """
    values = np.asarray(state, float).reshape(-1)
    if not np.isfinite(values).all():
        dim = int(np.argmin(np.isfinite(values)))
        raise ValueError(
            f"the normalised state is {values[dim]} in dimension {dim}; expected finite numbers. Look for NaN in what "
            "was measured, and in the statistics"
        )
    return " ".join(map(str, np.digitize(np.asarray(state), _STATE_BIN_EDGES) - 1))


def _cut(
    model: sentencepiece.SentencePieceProcessor, tokens: list[int], max_len: int, prompt: str, *, has_state: bool
) -> str:
    """The warning about a prompt of which `max_len` tokens are kept."""
    _, state_begins, seen = model.decode(tokens[:max_len]).rpartition(_STATE)
    if not has_state:
        lost = "its end"
    elif not state_begins:
        lost = "its end, nor the state behind it"
    else:
        lost = "what follows the state" if ";" in seen else "the end of the state"
    return (
        f"prompt: has {len(tokens)} tokens and is cut to {max_len} (max_token_len): the model does not see {lost}. "
        f"Shorten '{textwrap.shorten(prompt, _QUOTED, placeholder='...')}', or train with a larger max_token_len"
    )


def _or_zeros(decode: Callable[..., np.ndarray], tokens: np.ndarray, horizon: int, dim: int) -> np.ndarray:
    try:
        return decode(tokens, horizon, dim)
    except UndecodableActionsError as error:
        logger.warning("%s: using zeros", error)
        return np.zeros((horizon, dim), dtype=np.float32)


def load_sentencepiece(model_path: str | Path | None) -> sentencepiece.SentencePieceProcessor:
    """Opens a sentencepiece model; None = PaliGemma's.

    Raises:
        FileNotFoundError, ConnectionError: it is neither there nor reachable; the message says where to put
        it.
    """
    content = _read_model(model_path)
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        place = model_path or PALIGEMMA_TOKENIZER_URL
        why = content_instead(content) or f"{first_line(error)}. Bring it here again"
        raise ValueError(f"tokenizer {place} is no sentencepiece model: {why}") from error


def _read_model(model_path: str | Path | None) -> bytes:
    if model_path is None:
        return download.maybe_download(PALIGEMMA_TOKENIZER_URL, gs={"token": "anon"}).read_bytes()
    if str(model_path).startswith("package:"):
        return _read_resource(str(model_path))
    path = Path(model_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"tokenizer {path} does not exist; expected a sentencepiece model file, or "
            "package:dotted.package/file. Correct the model's tokenizer_path"
        )
    return path.read_bytes()


def _read_resource(url: str) -> bytes:
    try:
        return download.maybe_download(url).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"tokenizer {url} does not exist ({error}); correct the model's tokenizer_path"
        ) from error


def _pad(values: list, length: int, dtype: type) -> np.ndarray:
    """The first `length` values, filled up with zeros."""
    padded = np.zeros(length, dtype=dtype)
    padded[: len(values)] = values[:length]
    return padded
