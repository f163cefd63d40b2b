"""Simulators that come with the extra `sim`."""

from __future__ import annotations

import importlib.util

from openpi.shared.errors import install_hint


def check(module: str, world: str) -> None:
    """
    Raises:
        ImportError: `module`, which the world needs, is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"the world '{world}' needs the package '{module}', which is not installed: {install_hint('sim')}"
        )
