"""The FAST action codec: a chunk's cosine transform, rounded, as byte-pair encoded text.

Source: the model specification, section 8.3. Legend: t time, d dimension, f frequency.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers
import tokenizers.trainers

from openpi.shared import download, strict_json
from openpi.shared.collected_warnings import Warnings
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.shared.typed_values import fitted

_LAST_CHARACTER = 0xD7FF  # those that follow are no text
_ONE_BYTE = 0x7F  # the last character that UTF-8 writes in one
_CONFIG_FILE, _BPE_FILE = "processor_config.json", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class FastCodec:
    """Encodes float[t, d] as ids and back, lossily.

    Attributes:
        bpe: byte-pair encoder over the characters that stand for coefficients.
        scale: coefficients are multiplied by it before rounding; the rounding error is 0.5 / scale.
        min_token: the coefficient that becomes character 0.
    """

    bpe: tokenizers.Tokenizer
    scale: float
    min_token: int
    _warn: Warnings = dataclasses.field(default_factory=Warnings, init=False, repr=False, compare=False)

    def encode(self, actions: np.ndarray) -> list[int]:
        """Ids of float[t, d], with a warning where they stand for others. Raises as `ids_of`."""
        characters = self._characters(actions)
        ids = self._ids(characters)
        if not self._says_all(characters) and (error := self.error_beyond_rounding(actions, ids)):
            self._warn(
                [
                    f"action tokenizer: a chunk goes beyond its range and comes back up to {error:.2g} off (normalised "
                    "units): the model learns other actions there. Fit one to these (`openpi tokenizer fit`), or look "
                    "for outliers with `openpi stats`"
                ]
            )
        return ids

    def ids_of(self, actions: np.ndarray) -> list[int]:
        """Of float[t, d]; coefficients outside the codec's range become its nearest, see `error_beyond_rounding`.

        Raises:
            ValueError: actions that are not finite, or so large that no character stands for them.
        """
        return self._ids(self._characters(actions))

    def _characters(self, actions: np.ndarray) -> np.ndarray:
        """int[t d], what stands for each coefficient, if the codec has it. Raises as `ids_of`."""
        actions = np.asarray(actions, dtype=np.float64)
        coefficients = np.around(_dct(len(actions)) @ actions * self.scale)
        if not (np.abs(coefficients) < _LAST_CHARACTER + min(self.min_token, 0)).all():  # false for NaN, too
            dim = int(np.argmin(np.isfinite(actions).all(axis=0))) if not np.isfinite(actions).all() else None
            what = f"values that are not finite in dimension {dim}" if dim is not None else "values"
            raise ValueError(
                f"an action chunk has {what} in {actions.min():.4g}..{actions.max():.4g}; expected normalised actions, "
                "about -1..1. Look for outliers with `openpi stats`"
            )
        return coefficients.astype(int).ravel() - self.min_token

    def _ids(self, characters: np.ndarray) -> list[int]:
        return self._text_ids("".join(map(chr, np.clip(characters, 0, self.largest_character))))

    def _text_ids(self, text: str) -> list[int]:
        return self.bpe.encode(text, add_special_tokens=False).ids

    def _says_all(self, characters: np.ndarray) -> bool:
        """Whether they come back as they are; a look into a table, as this is asked of every sample."""
        is_within = (characters >= 0) & (characters <= self.largest_character)
        return bool(is_within.all() and self._sayable[characters].all())

    @functools.cached_property
    def _sayable(self) -> np.ndarray:
        """bool[characters]: those that come back. The published codec lacks some bytes."""
        every = map(chr, range(self.largest_character + 1))
        return np.array([self.bpe.decode(self._text_ids(c), skip_special_tokens=False) == c for c in every])

    def error_beyond_rounding(self, actions: np.ndarray, ids: list[int]) -> float:
        """The largest error of float[t, d] that come back from their ids; 0 where it may be of rounding, infinite where
        nothing comes back: the codec has no character for one of the coefficients.
        """
        try:
            error = np.abs(self.decode(ids, *np.shape(actions)) - actions).max(initial=0)
        except UndecodableActionsError:
            return float("inf")
        return 0.0 if error <= 0.501 / self.scale * np.sqrt(len(actions)) else float(error)

    def decode(self, ids: list[int], num_steps: int, dim: int) -> np.ndarray:
        """float64[num_steps, dim].

        Raises:
            UndecodableActionsError: the ids do not make exactly such a chunk.
        """
        known = [i for i in ids if 0 <= i < self.bpe.get_vocab_size()]
        if len(known) != len(ids):
            strange = next(i for i in ids if i not in known)
            raise UndecodableActionsError(f"action id {strange} is outside the codec's {self.bpe.get_vocab_size()} ids")
        text = self.bpe.decode(known, skip_special_tokens=False)
        if len(text) != num_steps * dim:
            raise UndecodableActionsError(
                f"the tokens hold {len(text)} coefficients; {num_steps} x {dim} actions have {num_steps * dim}"
            )
        characters = np.array([ord(c) for c in text])
        if characters.max(initial=0) > self.largest_character:
            raise UndecodableActionsError(
                f"the tokens hold the coefficient {characters.max() + self.min_token}, beyond the codec's largest, "
                f"{self.largest_character + self.min_token}"
            )
        coefficients = (characters + self.min_token).astype(np.float64)
        return _dct(num_steps).T @ (coefficients.reshape(num_steps, dim) / self.scale)

    @property
    def largest_character(self) -> int:
        """Upper bound of the characters that were trained: a vocabulary is at least as large as their range.

        Rounded up to the last character that begins with the same UTF-8 byte.
        """
        largest = chr(min(self.bpe.get_vocab_size(), _LAST_CHARACTER) - 1).encode()
        return ord((largest[:1] + b"\xbf" * (len(largest) - 1)).decode()) if len(largest) > 1 else 0x7F

    def save(self, folder: Path) -> None:
        """Writes a processor folder that `load_codec`, and the published processor class, read."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "processor_class": "UniversalActionProcessor",
            "auto_map": {"AutoProcessor": "processing_action_tokenizer.UniversalActionProcessor"},
            "scale": self.scale,
            "min_token": self.min_token,
            "vocab_size": self.bpe.get_vocab_size(),
            "action_dim": None,
            "time_horizon": None,
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        self.bpe.save(str(folder / _BPE_FILE))

    def id_table(self) -> IdTable:
        """What each id stands for, see `IdTable`."""
        is_byte_level = json.loads(self.bpe.to_str())["decoder"]["type"] == "ByteLevel"
        pieces = {i: piece for piece, i in self.bpe.get_vocab().items()}
        characters = np.zeros(len(pieces), np.int32)
        missing = np.full((4, len(pieces)), -1, np.int32)
        for i, piece in pieces.items():
            written = _bytes_of(piece) if is_byte_level else piece.encode()
            characters[i] = sum(byte & 0xC0 != 0x80 for byte in written)
            missing[:, i] = [_missing_after(written, before, self.largest_character) for before in range(4)]
        return IdTable(characters, missing)


class UndecodableActionsError(ValueError):
    """Generated tokens that are no action chunk."""


class IdTable(NamedTuple):
    """Ids as pieces of UTF-8, legend a ids.

    Attributes:
        num_characters: int32[a], characters (coefficients) that begin in the id.
        missing_bytes_after: int32[4, a], bytes that its last character still lacks, given how many the one before
            it lacked; -1 where the id cannot come next.
    """

    num_characters: np.ndarray
    missing_bytes_after: np.ndarray


def fit_codec(chunks: np.ndarray, *, vocab_size: int = 1024, scale: float = 10) -> FastCodec:
    """Trains a codec on float[n, t, d] normalised chunks, as the published one was trained.

    Unlike there every byte is in the vocabulary, so that no coefficient within the range of characters is ever lost.
    That range has room on both sides of what was trained on, and pairs are made anywhere in a chunk.

    Raises:
        ValueError: the chunks are empty, not finite, or rougher than the vocabulary can hold.
    """
    if chunks.ndim != 3 or not len(chunks):
        raise ValueError(f"chunks have shape {chunks.shape}; expected (n, t, d) with at least one chunk")
    if not np.isfinite(chunks).all():
        raise ValueError("chunks hold values that are not finite; look at them with `openpi explain`")
    coefficients = np.around(_dct(chunks.shape[1]) @ chunks.astype(np.float64) * scale).astype(int)
    smallest, spread = int(coefficients.min()), int(np.ptp(coefficients))
    if spread > vocab_size:
        raise ValueError(
            f"the coefficients of the chunks span {spread} values and the vocabulary has {vocab_size}: single actions "
            "lie far outside the normalised range. Look for outliers with `openpi stats`, or lower the scale "
            f"({scale:g}), or raise the vocabulary size"
        )
    # Room on both sides for what other episodes hold, as far as that costs no second byte.
    min_token = smallest - max(0, (_ONE_BYTE - spread) // 2)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # As it is for text, it would cut where letters, digits and blanks meet, which here stand for coefficients.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=10_000,
        show_progress=False,
    )
    texts = ("".join(map(chr, chunk.ravel() - min_token)) for chunk in coefficients)
    bpe.train_from_iterator(texts, trainer, length=len(coefficients))
    return FastCodec(bpe=bpe, scale=scale, min_token=min_token)


def load_codec(path: str | Path) -> FastCodec:
    """Reads a processor folder, local or by its name on the Hugging Face hub.

    Raises:
        FileNotFoundError: a local folder lacks one of the two files.
        ConnectionError: a hub name, neither cached nor reachable.
        ValueError: a file is not what it should be.
    """
    config_file, bpe_file = _in_folder(Path(path)) if Path(path).is_dir() else _from_hub(str(path))
    file = config_file
    try:
        config = strict_json.read(config_file)
        scale = fitted(config["scale"], float, "scale")
        min_token = fitted(config["min_token"], int, "min_token")
        if not 0 < scale < np.inf or abs(min_token) > _LAST_CHARACTER:
            raise ValueError(f"scale is {scale} and min_token {min_token}; expected a scale above 0 and a small number")
        file = bpe_file
        bpe = tokenizers.Tokenizer.from_file(str(bpe_file))
    except Exception as error:  # the tokenizer library raises no type of its own
        raise ValueError(
            f"{file} of a FAST processor cannot be read: {found_instead(file) or first_line(error)}"
        ) from error
    return FastCodec(bpe=bpe, scale=scale, min_token=min_token)


def codec_urls(path: str | Path) -> list[str]:
    """The files that `load_codec` fetches; none if the processor is a local folder."""
    return [] if Path(path).is_dir() else [f"hf://{path}/{name}" for name in (_CONFIG_FILE, _BPE_FILE)]


def _in_folder(folder: Path) -> list[Path]:
    files = [folder / _CONFIG_FILE, folder / _BPE_FILE]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {file.name}; expected the folder of a FAST processor")
    return files


def _from_hub(repo_id: str) -> list[Path]:
    try:
        return [download.maybe_download(url) for url in codec_urls(repo_id)]
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        raise ConnectionError(
            f"action tokenizer '{repo_id}' is neither a local folder nor cached, and the hub cannot be reached "
            f"({first_line(error)}). Make one of your own with `openpi tokenizer fit`, and set "
            "--model.action-tokenizer-path"
        ) from error


def _dct(num_steps: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) as a matrix [f, t]; its transpose is the inverse."""
    f, t = np.mgrid[:num_steps, :num_steps]
    basis = np.sqrt(2 / num_steps) * np.cos(np.pi * (t + 0.5) * f / num_steps)
    basis[0] /= np.sqrt(2)
    return basis


def _bytes_of(piece: str) -> bytes:
    """What a piece of a byte-level vocabulary is decoded to; a piece with other characters stands for itself."""
    if all(c in _BYTE_OF_CHARACTER for c in piece):
        return bytes(_BYTE_OF_CHARACTER[c] for c in piece)
    return piece.encode()


def _printable_bytes() -> dict[str, int]:
    """Characters that stand for bytes in byte-level vocabularies: printable ones for themselves, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _printable_bytes()


def _missing_after(written: bytes, missing: int, largest: int) -> int:
    """Continuation bytes that the last character lacks after `written`.

    -1 if this is no UTF-8, or surely a character above `largest`; a bound below 0x800 leaves no room for the byte
    sequences that are well-formed and yet mean nothing, but for overlong ones, which begin with C0, C1 or E0.
    """
    for byte in written:
        is_continuation = byte & 0xC0 == 0x80
        if is_continuation != (missing > 0) or byte in (0xC0, 0xC1) or byte > _lead_byte(largest):
            return -1
        missing = missing - 1 if is_continuation else max(0, f"{byte:08b}".index("0") - 1)
    return missing


def _lead_byte(character: int) -> int:
    """The first byte of a character's UTF-8; continuation bytes are below every lead byte of more than one."""
    return max(chr(min(character, _LAST_CHARACTER)).encode()[0], 0xBF)
