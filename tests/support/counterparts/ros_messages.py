"""Classes of messages as ROS generates them: fields with defaults, and no others."""

from typing import Any


def message(name: str, /, **defaults: Any) -> type:
    def __init__(self: Any, /, **fields: Any) -> None:
        unknown = set(fields) - set(defaults)
        assert not unknown, f"{name} has no fields {unknown}"
        self.__dict__.update({**defaults, **fields})

    return type(name, (), {"__init__": __init__})


def service(name: str, /, **fields: Any) -> type:
    return type(name, (), {"Request": message(f"{name}_Request", **fields), "Response": message(f"{name}_Response")})
