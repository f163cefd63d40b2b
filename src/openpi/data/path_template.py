"""Format strings in a dataset's metadata that name its files: they may hold the documented fields only.

Sources: `data_path` and `video_path` of LeRobot's `meta/info.json`, `filepathTemplate` of TFDS.
"""

import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from openpi.shared.errors import listed

_FIELD = re.compile(r"\{([^{}]*)\}")
_INTEGER_FORMAT = re.compile(r"(?::(?:0?[1-9])?d)?")


class PathTemplate:
    """A template that was checked: it only takes numbers and names, and stays in the dataset.

    Args:
        text: as in the file.
        where: the file and the entry, for messages.
        required, optional: names of its fields.
        names: those of its fields that are texts, which have no format; the others are integers.
    Raises:
        ValueError: another field, a format that is not one digit's width, or a path that leads elsewhere.
    """

    def __init__(
        self,
        text: object,
        where: str,
        *,
        required: Collection[str],
        optional: Collection[str] = (),
        names: Collection[str] = (),
    ):
        self._where = where
        known = {*required, *optional}
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where} is {text!r}; expected a path with the fields {_braced(required)}")
        fields = [_checked_field(field, text, where, known, names) for field in _FIELD.findall(text)]
        if set("{}") & set(_FIELD.sub("", text)):
            raise ValueError(f"{where} is '{text}', which has a brace too many; allowed are {_braced(known)}")
        if missing := sorted(set(required) - set(fields)):
            raise ValueError(
                f"{where} is '{text}', without {_braced(missing)}: several parts of the dataset would share one file. "
                "Correct the entry"
            )
        self._text = text
        self._sample: dict[str, int | str] = {name: "x" if name in names else 0 for name in known}
        _check_relative(self.format(**self._sample), where)

    def format(self, **values: int | str) -> str:
        """The path of one file, relative to the dataset."""
        return self._text.format(**values)

    def check_name(self, field: str, value: str) -> None:
        """Raises ValueError if this text in a field leads elsewhere."""
        if "/" in value or "\\" in value or value in ("", ".", ".."):
            raise ValueError(f"{self._where} takes the name {value!r} for {{{field}}}, which is no name of a folder")
        _check_relative(self.format(**{**self._sample, field: value}), self._where)


def inside(root: Path, name: str, where: str) -> Path:
    """The file of a dataset that one of its entries names.

    Raises:
        ValueError: an absolute path, or one that leads out of the dataset.
    """
    _check_relative(name, where)
    return root / name


def _checked_field(field: str, text: str, where: str, known: Collection[str], names: Collection[str]) -> str:
    name = re.split(r"[:!.\[]", field, maxsplit=1)[0]
    rest = field[len(name) :]
    if name not in known:
        raise ValueError(f"{where} is '{text}' with the field '{{{field}}}'; expected {_braced(known)}")
    if rest and (name in names or not _INTEGER_FORMAT.fullmatch(rest)):
        expected = f"{{{name}}}" if name in names else f"{{{name}}} or a width such as {{{name}:06d}}"
        raise ValueError(f"{where} is '{text}' with the field '{{{field}}}'; expected {expected}")
    return name


def _check_relative(path: str, where: str) -> None:
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path or ":" in parts[0]:
        raise ValueError(
            f"{where} leads to {path!r}, out of the dataset; expected a path relative to its folder, without '..'"
        )


def _braced(names: Collection[str]) -> str:
    return listed(f"{{{name}}}" for name in sorted(names))
