"""JAX and PyTorch: which of them are here, and what to say where one is wanted and is not. Neither is imported."""

from __future__ import annotations

import importlib.util
from typing import Literal

from openpi.shared.errors import install_hint

Backend = Literal["jax", "pytorch"]

PACKAGES: dict[Backend, str] = {"jax": "jax", "pytorch": "torch"}  # what is imported, and the extra that brings it
NAMES: dict[Backend, str] = {"jax": "JAX", "pytorch": "PyTorch"}


def installed() -> tuple[Backend, ...]:
    return tuple(backend for backend in PACKAGES if is_installed(backend))


def is_installed(backend: Backend) -> bool:
    try:
        return importlib.util.find_spec(PACKAGES[backend]) is not None
    except ImportError:  # of a finder that refuses it
        return False


def require(backend: Backend, wanted_by: str, *, instead: str = "") -> None:
    """
    Args:
        wanted_by: subject of the message, such as `backend=jax`.
        instead: what does the same with the other framework, as a command or flag.
    Raises:
        ImportError: the framework is not installed; its extra is named, and what to do with the one that is.
    """
    if is_installed(backend):
        return
    other = _other(backend)
    way_out = f". {NAMES[other]} is installed: {instead}" if instead and is_installed(other) else ""
    raise ImportError(f"{wanted_by} needs {NAMES[backend]}; {install_hint(PACKAGES[backend])}{way_out}")


def require_backend(backend: Backend) -> None:
    """As `require`, for what has a flag `--backend`."""
    require(backend, f"backend={backend}", instead=f"--backend={_other(backend)}")


def choose(preferred: Backend, wanted_by: str) -> Backend:
    """The preferred framework, or the one that is installed.

    Raises:
        ImportError: neither is; both extras are named.
    """
    for backend in (preferred, _other(preferred)):
        if is_installed(backend):
            return backend
    raise ImportError(
        f"{wanted_by} needs {' or '.join(NAMES.values())}, and neither is installed; "
        f"{install_hint(PACKAGES[preferred])}; or the extra '{PACKAGES[_other(preferred)]}'"
    )


def _other(backend: Backend) -> Backend:
    return "pytorch" if backend == "jax" else "jax"
