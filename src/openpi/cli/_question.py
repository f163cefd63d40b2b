"""What a command asks, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class Question(str):
    """The text of a question, as a terminal shows it; with what a page makes of it.

    Attributes:
        title: the same for a page, which has buttons.
        about: what it is about.
        note: what went wrong before.
        choices: answers by what is written on their buttons.
        takes_text: other answers may be typed.
    """

    __slots__ = ("about", "choices", "note", "takes_text", "title")

    title: str
    about: str
    note: str
    choices: Mapping[str, str]
    takes_text: bool

    def __new__(
        cls,
        text: str,
        *,
        title: str = "",
        about: str = "",
        note: str = "",
        choices: Mapping[str, str] = MappingProxyType({}),
        takes_text: bool = False,
    ) -> Question:
        made = super().__new__(cls, text)
        made.title, made.about, made.note = title or text, about, note
        made.choices, made.takes_text = choices, takes_text
        return made

    def again(self, note: str) -> Question:
        """The same with another note."""
        more = {name: getattr(self, name) for name in self.__slots__} | {"note": note}
        return Question(str(self), **more)
