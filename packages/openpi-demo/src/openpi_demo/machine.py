"""On what the demo ran."""

import importlib.metadata
import os
import platform
from pathlib import Path

from openpi.shared.frameworks import Backend

_PACKAGES = ("openpi", "openpi-client", "numpy", "mujoco", "av", "pyarrow")
_OF_BACKENDS: dict[Backend, tuple[str, ...]] = {"jax": ("jax", "optax", "orbax-checkpoint"), "pytorch": ("torch",)}


def describe_machine() -> dict[str, str]:
    """Short texts by name: processor, cores, memory, operating system."""
    return {
        "processor": _processor(),
        "cores": str(_num_cores()),
        "memory": f"{_memory_bytes() / 2**30:.1f} GiB",
        "system": platform.platform(),
    }


def versions(backend: Backend = "jax") -> dict[str, str]:
    """Python and the packages that matter here."""
    packages = (*_PACKAGES, *_OF_BACKENDS[backend])
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
