"""Messages for wrong input: what was found, what was expected, what is there instead."""

import difflib
from collections.abc import Iterable
from urllib.parse import urlsplit


class MissingKeyError(KeyError):
    """A `KeyError` that prints its message as it is, without the quotes `KeyError` puts around it."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


def missing_key(
    key: str, found: Iterable[object], *, wanted_by: str, fix: str = "", in_use: Iterable[object] = ()
) -> MissingKeyError:
    """The error for a key that is not there, to be raised by the caller.

    Args:
        found: the keys that are there.
        wanted_by: who reads the key, as the subject of the message.
        fix: a sentence that says what to do.
        in_use: keys of `found` that are read for something else, so that they are not the one that is meant.
    """
    names = sorted(str(name) for name in found)
    others = {str(name) for name in in_use}
    closest = closest_name(key, [name for name in names if name not in others])
    suggestion = f" Did you mean '{closest}'?" if closest else ""
    message = f"{wanted_by} needs the key '{key}', found: {listed(names)}.{suggestion} {fix}"
    return MissingKeyError(message.rstrip())


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow; its type if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def with_notes(error: BaseException) -> str:
    """What an error says, and what was noted of it on its way."""
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{error} ({type(error).__name__}, {notes})" if notes else str(error)


def printable(text: str) -> str:
    """What others wrote, with escapes for all that would end a line or move a cursor."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shown_url(url: object) -> str:
    """An address without its login and its query, which may be keys (signed links), for messages that are kept."""
    try:
        parts = urlsplit(str(url))
    except ValueError:  # of a bracket in the host
        return "an address that is none"
    query = "?..." if parts.query else ""
    return printable(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()) + query


def install_hint(extra: str) -> str:
    """How to add an extra, for the end of a message. Without `--inexact`, uv removes the extras that are not named."""
    return f"in the checkout: `uv sync --extra {extra} --inexact`, or `pip install '.[{extra}]'`"


def closest_name(name: str, names: Iterable[str]) -> str | None:
    """The name most like the given one, or None when nothing is similar."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return matches[0] if matches else None


def listed(names: Iterable[object]) -> str:
    """`'a', 'b'`, or `nothing`."""
    return ", ".join(f"'{name}'" for name in names) or "nothing"
