"""What is told to a robot frame by frame, beside its task: language annotations, and the texts of subtasks.

Two columns of dtype `language` (LeRobot 0.6): `language_persistent`, the rows that hold for an episode, repeated in
each of its frames, and `language_events`, rows of the one frame in which they happen. A row is a dict of `role`,
`content`, `style` (`subtask`, `plan`, `memory`, `interjection`, `vqa`, ...), `timestamp` (seconds in the episode; of
persistent rows), `camera` and `tool_calls`. The subtask at a time is the last persistent row of that style that is not
later.

Source: the specification of training data, 13.2; "Data needed" of the pi0.5 paper's.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openpi.data.lerobot.files import read_parquet
from openpi.data.lerobot.meta_values import Rows, text

LANGUAGE = "language"
"""The dtype."""
SUBTASK, SUBTASK_INDEX = "subtask", "subtask_index"
SUBTASKS_FILE = "meta/subtasks.parquet"

LanguageRow = dict[str, Any]
_TEXTS = ("role", "content", "style")
_EVENTS = "language_events"  # whose rows have no time of their own
_ROW = "for each frame a list of dicts, such as {'role': 'assistant', 'content': 'reach', 'style': 'subtask'}"


def is_annotation(feature: Mapping[str, object]) -> bool:
    """True for columns of language rows."""
    return feature["dtype"] == LANGUAGE


def language_rows(values: pa.Array, name: str) -> np.ndarray:
    """A column of lists of rows, as objects [n], each a list of `LanguageRow`; frames that say the same share one.

    Raises:
        ValueError: it holds something else.
    """
    kind = values.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        raise ValueError(f"{name} holds {kind}; expected lists of rows with role and content, as LeRobot 0.6 writes")
    is_new = ~_repeats(values)
    told = np.empty(int(is_new.sum()), object)
    for place, frame in enumerate(np.flatnonzero(is_new).tolist()):
        told[place] = [_row(row, name) for row in values[frame].as_py() or ()]
    return told[np.cumsum(is_new) - 1]


def _repeats(values: pa.Array) -> np.ndarray:
    """bool[n]: where a frame says what the one before it says. Persistent rows are the same all through an episode, and
    as Python objects each frame's own would take a hundred times what the numbers of a dataset take."""
    lengths = values.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    rows, frame = values.flatten(), np.repeat(np.arange(len(lengths)), lengths)
    repeats = np.concatenate([[False], lengths[1:] == lengths[:-1]])[: len(lengths)]
    before = np.maximum(np.arange(len(rows)) - lengths[frame], 0)  # the same row of the frame before
    differs = np.zeros(len(rows), bool)
    for field in rows.flatten():
        codes = _codes(field)
        differs |= codes != codes[before]
    repeats[frame[differs]] = False
    return repeats


def _codes(field: pa.Array) -> np.ndarray:
    """int[n], equal where the values are; calls of tools, which are rare, equal none but empty ones."""
    if not pa.types.is_nested(field.type):
        return field.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    lengths = field.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(lengths > 0, np.arange(1, len(lengths) + 1), lengths)


def _row(row: LanguageRow, name: str) -> LanguageRow:
    """Calls of tools are stored as JSON."""
    calls = row.get("tool_calls")
    try:
        read = calls and [json.loads(call) if isinstance(call, str) else call for call in calls]
    except ValueError as error:
        raise ValueError(f"{name}: tool_calls holds {calls}; expected JSON ({error})") from error
    return {**row, "tool_calls": read} if "tool_calls" in row else row


def to_language(told: Sequence[Sequence[LanguageRow]], key: str) -> pa.Array:
    """Inverse of `language_rows`: the column of a table, in the type that LeRobot 0.6 gives a column of this name.

    Raises:
        ValueError: a row has other fields, or other values in them.
    """
    kind = _language_type(key, pa.string())
    fields = {field.name for field in kind.value_type}
    try:
        values = pa.array([[_stored_row(row, fields, key) for row in frame] for frame in told], kind)
    except (pa.ArrowException, TypeError, AttributeError) as error:
        raise ValueError(f"'{key}' has rows that are none of language ({error}); expected {_ROW}") from error
    has_json = hasattr(pa, "json_")  # since pyarrow 19; before, the same texts under no name
    return values.cast(_language_type(key, pa.json_(pa.string()))) if has_json else values


def _language_type(key: str, call: pa.DataType) -> pa.DataType:
    fields = [(name, pa.string()) for name in _TEXTS]
    fields += [] if key == _EVENTS else [("timestamp", pa.float32())]
    return pa.list_(pa.struct([*fields, ("camera", pa.string()), ("tool_calls", pa.list_(call))]))


def _stored_row(row: LanguageRow, fields: set[str], key: str) -> LanguageRow:
    if unknown := sorted(row.keys() - fields):
        raise ValueError(f"'{key}' has a row with {unknown}; expected {_ROW}, and none but {sorted(fields)}")
    calls = row.get("tool_calls")
    return {**row, "tool_calls": calls and [json.dumps(call, separators=(",", ":")) for call in calls]}


def copy_subtasks(root: Path, target: Path) -> None:
    """The texts of `subtask_index`, if a dataset has them, into another that has the same indices."""
    if (root / SUBTASKS_FILE).is_file():
        (target / SUBTASKS_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(root / SUBTASKS_FILE, target / SUBTASKS_FILE)


def read_subtasks(root: Path) -> dict[int, str]:
    """Subtask index -> text.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or an entry is no index or text.
    """
    file = root / SUBTASKS_FILE
    table = read_parquet(file)
    # The text is the pandas index, as that of tasks is: its column name depends on the versions of the writer.
    names = [name for name in table.column_names if name != SUBTASK_INDEX]
    rows = Rows.of_table(file, table)
    column = SUBTASK if SUBTASK in names or not names else names[0]
    return dict(zip(rows.integers(SUBTASK_INDEX), rows.each(column, text), strict=True))


def subtask_texts(indices: np.ndarray, texts: Mapping[int, str], root: Path) -> np.ndarray:
    """Objects [n], the text of each frame's subtask.

    Raises:
        ValueError: an index has no text.
    """
    known, places = np.unique(indices, return_inverse=True)
    if unknown := [index for index in known.tolist() if index not in texts]:
        raise ValueError(
            f"{root}: frames have {SUBTASK_INDEX} {unknown[0]}, and {SUBTASKS_FILE} has {sorted(texts)[:20]}. Add its "
            "text there"
        )
    return np.array([texts[index] for index in known.tolist()], object)[places]
