"""What other distributions bring: entry points, by group and name.

This is the only way from a name, of a command line, a file or a message, to code that is not ours: what runs is what
somebody installed under that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib import metadata

# Where names of this project's own packages come from. For messages only.
_PACKAGES: Mapping[str, Mapping[str, str]] = {
    "openpi.commands": {"demo": "openpi-demo"},
    "openpi.formats": {"libero-rlds": "openpi-rlds", "positronic": "openpi-positronic"},
    "openpi.modules": {
        "openpi.codecs": "openpi-positronic",
        "openpi.convert.positronic": "openpi-positronic",
        "openpi.data.raw_episodes": "openpi-positronic",
        "openpi.demo": "openpi-demo",
        "openpi.envs.franka": "openpi-positronic",
        "openpi.envs.tabletop": "openpi-demo",
        "openpi.evaluation.franka": "openpi-positronic",
        "openpi.policies.positronic_policy": "openpi-positronic",
        "openpi.training.recipes.positronic": "openpi-positronic",
    },
    "openpi.protocols": {"positronic": "openpi-positronic"},
    "openpi.recipes": {"pi05_positronic_lowmem": "openpi-positronic"},
    "openpi.recipe_types": dict.fromkeys(
        (
            *("data.LeRobotPositronicDataConfig", "robot.PositronicInputs", "robot.PositronicOutputs"),
            *("codec.Vector", "codec.Camera", "codec.ObservationCodec", "codec.Rename", "codec.CartesianPose"),
            *("codec.JointPositions", "codec.JointDelta", "codec.BinariseGrip", "codec.Timing"),
        ),
        "openpi-positronic",
    ),
    "openpi.streams": {"droid_rlds": "openpi-rlds"},
    "openpi.worlds": {
        "aloha": "openpi-sim",
        "franka": "openpi-positronic",
        "libero": "openpi-sim",
        "tabletop": "openpi-demo",
    },
}


def names(group: str) -> list[str]:
    """Of what is installed."""
    return sorted(_points(group))


def load(group: str, name: str) -> Any:
    """The object that was installed under a name.

    Raises:
        ImportError: nothing was; the message names the package, where it is one of ours.
        ValueError: two distributions bring the name.
    """
    points = _points(group)
    if name not in points:
        raise ImportError(f"'{name}' of {group} is not installed{hint(group, name)}")
    return points[name].load()


def value(group: str, name: str) -> str | None:
    """Where an entry point leads, without going there; None = there is none."""
    point = _points(group).get(name)
    return None if point is None else point.value


def hint(group: str, name: str) -> str:
    """How to install what brings a name, to end a message with; empty if it is none of ours."""
    package = _PACKAGES.get(group, {}).get(name)
    return "" if package is None else f"; it is in the package {package}: {install(package)}"


def install(package: str) -> str:
    """The command that installs one of this project's packages."""
    return f"in the checkout: `uv sync --inexact`, or `pip install ./packages/{package}`"


def _points(group: str) -> dict[str, metadata.EntryPoint]:
    from importlib import metadata

    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise ValueError(
                f"'{point.name}' of {group} is both {other.value} and {point.value}; uninstall one of the distributions"
            )
    return found
