"""Simulators that come with the extra `sim`."""

from __future__ import annotations

import importlib.util

INSTALL = "uv sync --extra sim   (or: pip install 'openpi[sim]')"


def check(module: str, world: str) -> None:
    """
    Raises:
        ImportError: `module`, which the world needs, is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"the world '{world}' needs the package '{module}', which is not installed: {INSTALL}")
