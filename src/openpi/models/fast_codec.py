"""The FAST action codec: a chunk's cosine transform, rounded, as byte-pair encoded text.

Source: the model specification, section 8.3. Legend: t time, d dimension, f frequency.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import tokenizers

logger = logging.getLogger("openpi")

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

    def encode(self, actions: np.ndarray) -> list[int]:
        """Ids of float[t, d]; coefficients outside the trained range are lost."""
        actions = np.asarray(actions, dtype=np.float64)
        coefficients = np.around(_dct(len(actions)) @ actions * self.scale).astype(int)
        characters = np.maximum(coefficients.ravel() - self.min_token, 0)
        return self.bpe.encode("".join(map(chr, characters)), add_special_tokens=False).ids

    def decode(self, ids: list[int], num_steps: int, dim: int) -> np.ndarray:
        """float64[num_steps, dim]; zeros, with a warning, when the ids do not make exactly such a chunk."""
        # Generated ids may lie outside the codec's vocabulary.
        known = [i for i in ids if 0 <= i < self.bpe.get_vocab_size()]
        text = self.bpe.decode(known, skip_special_tokens=False)
        if len(known) != len(ids) or len(text) != num_steps * dim:
            logger.warning("generated tokens are no chunk of %d x %d actions: using zeros", num_steps, dim)
            return np.zeros((num_steps, dim))
        coefficients = np.array([ord(c) + self.min_token for c in text], dtype=np.float64)
        return _dct(num_steps).T @ (coefficients.reshape(num_steps, dim) / self.scale)


def load_codec(path: str | Path) -> FastCodec:
    """Reads a processor folder, local or by its name on the Hugging Face hub.

    Raises:
        FileNotFoundError: a local folder lacks one of the two files.
        ImportError: a hub name, and `huggingface_hub` is not installed.
    """
    folder = Path(path) if Path(path).is_dir() else _from_hub(str(path))
    for name in (_CONFIG_FILE, _BPE_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; expected the folder of a FAST processor")
    config = json.loads((folder / _CONFIG_FILE).read_text())
    bpe = tokenizers.Tokenizer.from_file(str(folder / _BPE_FILE))
    return FastCodec(bpe=bpe, scale=config["scale"], min_token=config["min_token"])


def _from_hub(repo_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"FAST processor '{repo_id}' is no local folder, and fetching it from the Hugging Face hub needs "
            "`pip install 'openpi[hub]'`"
        ) from error
    return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[_CONFIG_FILE, _BPE_FILE]))


def _dct(num_steps: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II) as a matrix [f, t]; its transpose is the inverse."""
    f, t = np.mgrid[:num_steps, :num_steps]
    basis = np.sqrt(2 / num_steps) * np.cos(np.pi * (t + 0.5) * f / num_steps)
    basis[0] /= np.sqrt(2)
    return basis
