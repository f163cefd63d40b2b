"""Libraries of robots, which are there where the robot is."""

import importlib
from types import ModuleType


def need(module: str, install: str) -> ModuleType:
    """Imports a module.

    Args:
        install: what brings it, as a sentence: "pip install ur-rtde".
    Raises:
        ImportError: it is not there, or does not load; the message has `install`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this robot needs the Python module '{module}' ({error}). To get it: {install}") from error
