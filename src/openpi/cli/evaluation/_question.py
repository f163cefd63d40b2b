"""What a command asks, for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


class Question(str):
    """The text of a question, as a terminal shows it; with what a page makes of it.

    Attributes:
        shown: the same for a page, which has buttons.
        about: what it is about.
        note: what went wrong before.
        choices: answers by what is written on their buttons.
        takes_text: other answers may be typed.
    """

    __slots__ = ("about", "choices", "note", "shown", "takes_text")

    shown: str
    about: str
    note: str
    choices: Mapping[str, str]
    takes_text: bool

    def __new__(
        cls,
        text: str,
        *,
        shown: str = "",
        about: str = "",
        note: str = "",
        choices: Mapping[str, str] = MappingProxyType({}),
        takes_text: bool = False,
    ) -> Question:
        made = super().__new__(cls, text)
        made.shown, made.about, made.note = shown or text, about, note
        made.choices, made.takes_text = choices, takes_text
        return made

    def again(self, note: str) -> Question:
        """The same with another note."""
        return Question(
            str(self),
            shown=self.shown,
            about=self.about,
            note=note,
            choices=self.choices,
            takes_text=self.takes_text,
        )
