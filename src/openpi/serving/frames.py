"""What a session sends: values, so that protocols are tested without sockets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Binary:
    """A binary frame."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Text:
    """A text frame."""

    text: str


@dataclasses.dataclass(frozen=True)
class Close:
    """The end of the connection, from our side.

    Attributes:
        linger_s: how long to wait for the client to leave by itself: some look at the socket once more before they
            read the error that came before this, and would report a broken socket instead.
    """

    code: int
    reason: str
    linger_s: float = 0.0


Frame = Binary | Text | Close
