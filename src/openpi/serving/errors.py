"""Errors as clients and the log see them: who can correct it decides how much is said to whom."""

import secrets
import traceback
from collections.abc import Sequence
from types import TracebackType

from openpi.models.fast_codec import UndecodableActionsError
from openpi.policies.guards import ObservationError
from openpi.policies.policy import ActionsError
from openpi.shared.errors import MissingKeyError

_LONGEST_TRACEBACK = 20_000


class ServerBusyError(ConnectionError):
    """A limit of the server is reached; asking again later helps."""


class ModelGoneError(ConnectionError):
    """The thread of a model is over, and answers no more."""


class UnknownModelError(LookupError):
    """No model of that name.

    Attributes:
        requested: the name; None = the default, of a server that has no models.
    """

    def __init__(self, requested: str | None, known: Sequence[str] = ()) -> None:
        """
        Args:
            known: what there is, as far as it can be told.
        """
        there = f"; there are {', '.join(known)}" if known else ""
        super().__init__("There are no checkpoints." if requested is None else f"no model '{requested}'{there}")
        self.requested = requested


def is_explained(error: BaseException) -> bool:
    """Whether the message alone says what happened and what to do."""
    known = (ObservationError, MissingKeyError, ActionsError, UndecodableActionsError)
    return isinstance(error, (*known, ServerBusyError, UnknownModelError))


def error_text(error: BaseException) -> str:
    """One line or more, never empty, and not long, whatever the client has sent that it tells of."""
    return shortened(str(error) or type(error).__name__)


def shortened(text: str, most: int = 2000) -> str:
    """The text, or its first `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... (of {len(text)} characters)"


def error_number() -> str:
    """A name for one failure, to find in the log what a client was not told."""
    return secrets.token_hex(4)


def traceback_text(error: BaseException, number: str, *, whole: bool) -> str:
    """In the form of a Python traceback, which clients of the openpi protocol expect: it ends with the reason.

    Args:
        number: under which the log has the failure.
        whole: with the frames of the policy (those of the server tell a robot's programmer nothing); they show paths
            and code of this machine.
    """
    if whole:
        return shortened(
            "".join(traceback.format_exception(type(error), error, _from_policy(error))), _LONGEST_TRACEBACK
        )
    hint = f"  (error {number} in the server's log; openpi serve --debug sends it here)\n"
    return "Traceback (most recent call last):\n" + hint + shortened("".join(traceback.format_exception_only(error)))


def _from_policy(error: BaseException) -> TracebackType | None:
    frame = error.__traceback__
    while frame and frame.tb_frame.f_globals.get("__name__", "").startswith(__package__):
        frame = frame.tb_next
    return frame or error.__traceback__
