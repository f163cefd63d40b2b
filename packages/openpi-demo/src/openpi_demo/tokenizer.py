"""The small tokenizer of the shipped base: sentencepiece, laid out like PaliGemma's, one token per state bin.

Special ids, byte fallback and white-space handling are PaliGemma's, so `PaligemmaTokenizer` serves both.
"""

import io
from pathlib import Path

import sentencepiece

# Everything the table-top's prompts may need, and some neighbours for users' own tasks; other text falls back to
# letters and bytes.
WORDS = [
    "Task",
    "State",
    "Action",
    "pick",
    "up",
    "put",
    "place",
    "push",
    "pull",
    "open",
    "close",
    "move",
    "lift",
    "stack",
    "the",
    "a",
    "an",
    "and",
    "then",
    "to",
    "from",
    "on",
    "in",
    "into",
    "of",
    "off",
    "at",
    "block",
    "blocks",
    "cube",
    "plate",
    "bowl",
    "cup",
    "box",
    "tray",
    "drawer",
    "table",
    "left",
    "right",
    "front",
    "back",
    "top",
    "bottom",
    "red",
    "green",
    "blue",
    "white",
    "black",
    "yellow",
    "orange",
    "purple",
    "grey",
    "brown",
    "pink",
    "it",
    "them",
    "first",
    "second",
    "near",
    "far",
    "next",
]
_STATE_BINS = range(-1, 256)
_SPACE = "\u2581"  # sentencepiece's mark for a blank


def train(path: Path) -> None:
    """Writes the tokenizer model; the same bytes of vocabulary on every run."""
    symbols = [_SPACE + str(b) for b in _STATE_BINS]
    symbols += [_SPACE + word for word in WORDS] + ["Task:", "State:", "Action:", ",", ";", "\n"]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-.:'?!"))
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(letters)] * 4),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=4 + 256 + len(symbols) + len(letters) + 1,
        hard_vocab_limit=True,
        character_coverage=1.0,
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path.write_bytes(buffer.getvalue())
