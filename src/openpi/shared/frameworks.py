"""JAX and PyTorch: which of them are here, what to say where one is wanted and is not, and what both are told before
they start. Neither is imported.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from openpi.shared.errors import install_hint

Backend = Literal["jax", "pytorch"]

PACKAGES: dict[Backend, str] = {"jax": "jax", "pytorch": "torch"}  # what is imported, and the extra that brings it
NAMES: dict[Backend, str] = {"jax": "JAX", "pytorch": "PyTorch"}
COMPILED_IN = {"JAX_COMPILATION_CACHE_DIR": "jax", "TORCHINDUCTOR_CACHE_DIR": "openpi/torch_inductor"}


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


def use_compilation_cache() -> None:
    """Makes JAX keep what it compiles in `~/.cache/jax`, and PyTorch in `~/.cache/openpi/torch_inductor`; what the user
    set wins. A server that is started again, or a run that continues, then compiles nothing anew.
    """
    for variable, folder in COMPILED_IN.items():
        os.environ.setdefault(variable, str(Path.home() / ".cache" / folder))


def split_processor(parts: int) -> None:
    """Makes JAX see the processor as so many devices; see `TrainConfig.cpu_devices`.

    Accelerators are not affected; flags that the user set win. XLA shares only matrix products between cores, whole
    steps on parts of the batch share everything. Measured on two cores with the 1.5 M parameter model: 0.62 s per
    step as one device, 0.34 s as two.
    """
    if parts > 1:
        flags = f"--xla_force_host_platform_device_count={parts} --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


def wait_asleep() -> None:
    """Makes PyTorch's threads sleep, not spin, while they wait for each other; what the user set wins.

    Loading data, a simulator or a robot's drivers need the same cores. Threads that spin in their way cost much more
    than waking costs. Measured on two cores that other programs use, too, with the 1.5 M parameter model: 2.3 s per
    step spinning, 0.25 s sleeping.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
