"""What a client of `/api/v1/session` sets for its own session, in the query of its address: `?codec.fps=10`.

Values are JSON, or text where they are not. The names are those of the codec's parameters behind `codec.`, and
`protocol_version`; others are refused, since a robot whose setting was ignored would move otherwise than it was told.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from openpi.policies.guards import ObservationError
from openpi.shared.errors import listed
from openpi_positronic.codecs.codec import Codec

PROTOCOL_VERSIONS = (1, 2, 3)
_VERSION, _CODEC = "protocol_version", "codec."


@dataclasses.dataclass(frozen=True)
class SessionParameters:
    """
    Attributes:
        protocol_version: that the session speaks.
        given: all that the client set, by name.
    """

    protocol_version: int = 1
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_query(cls, query: str) -> SessionParameters:
        """
        Raises:
            ObservationError: a name twice, or a protocol that there is not.
        """
        given: dict[str, Any] = {}
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name in given:
                raise ObservationError(f"the session parameter {name[:100]!r} is given twice; give it once")
            given[name] = _value(text)
        version = given.get(_VERSION, PROTOCOL_VERSIONS[0])
        if isinstance(version, bool) or version not in PROTOCOL_VERSIONS:
            raise ObservationError(f"{_VERSION} is {str(version)[:100]}; there are {listed(PROTOCOL_VERSIONS)}")
        return cls(int(version), given)

    def applied_to(self, codec: Codec | None) -> Codec | None:
        """The codec as this session wants it.

        Raises:
            ObservationError: a name or a value that it does not take.
        """
        names = [_VERSION, *(_CODEC + name for name in (codec.parameters if codec else ()))]
        unknown = [name for name in self.given if name not in names]
        if unknown:
            raise ObservationError(f"there is no session parameter {unknown[0][:100]!r}; there are {listed(names)}")
        values = {name.removeprefix(_CODEC): value for name, value in self.given.items() if name != _VERSION}
        if codec is None or not values:
            return codec
        try:
            return codec.with_parameters(values)
        except ValueError as error:
            raise ObservationError(f"a session parameter cannot be: {str(error)[:300]}") from error

    def told(self, codec: Codec | None) -> dict[str, object]:
        """What a client that set something is told of it.

        Args:
            codec: as the session has it.
        """
        if not self.given:
            return {}
        effective = {} if codec is None else {_CODEC + name: value for name, value in codec.parameters.items()}
        return {
            "session_params": dict(self.given),
            "effective_params": {**effective, _VERSION: self.protocol_version},
        }


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
