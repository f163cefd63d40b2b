"""Positronic's protocol, as the policy server speaks it at `/api/v1/session[/ID]`."""

from __future__ import annotations

from dataclasses import dataclass

from openpi.serving.frames import Frame
from openpi_positronic.codecs import catalog
from openpi_positronic.codecs.codec import Codec
from openpi_positronic.session import PositronicSession
from openpi_positronic.session_parameters import SessionParameters


@dataclass(frozen=True)
class PositronicProtocol:
    """See `openpi.serving.protocols.ServerProtocol`.

    Attributes:
        codec: raw observation -> the policy's, its actions -> robot commands; None = both as they are.
    """

    codec: Codec | None = None
    path: str = "/api/v1/session"

    @classmethod
    def named(cls, codec: str | None) -> PositronicProtocol:
        """With the codec of a name; the published ones speak the keys of the recipes, whichever those of the dataset
        are.

        Raises:
            ValueError, OSError, ImportError: there is none of that name.
        """
        if codec is None:
            return cls()
        found = catalog.get_codec(codec)
        is_published = codec.removeprefix("older/") in catalog.PUBLISHED
        return cls(catalog.for_slash_keys(found) if is_published else found)

    def session(self, query: str, *, debug: bool) -> PositronicSession:
        return PositronicSession(self.codec, SessionParameters.of_query(query), debug=debug)

    def refused(self, error: BaseException) -> list[Frame]:
        return PositronicSession().refused(error)
