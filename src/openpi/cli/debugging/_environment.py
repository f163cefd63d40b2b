"""What of this machine decides whether models run: driver, CUDA, JAX, PyTorch; and what of it does not fit together."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping

_PACKAGES = (
    *("openpi", "openpi-client", "numpy", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "torch", "triton", "pyarrow", "av", "websockets"),
)
_CUDA_PARTS = ("nvidia-cuda-runtime", "nvidia-cudnn", "nvidia-cublas", "nvidia-nccl")
# Oldest driver for Linux, by the major version of CUDA (NVIDIA's CUDA compatibility guide).
_OLDEST_DRIVER = {12: (525, 60), 13: (580, 65)}
_ASK_TIMEOUT_S = 120.0
_ASKED = {
    "JAX": "import jax; print(', '.join(f'{d.device_kind} ({d.platform})' for d in jax.devices()))",
    "PyTorch": "import torch; print(', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))"
    " or 'no GPU: ' + ('built without CUDA' if torch.version.cuda is None else 'CUDA ' + torch.version.cuda))",
}
_VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")


@dataclasses.dataclass(frozen=True)
class Facts:
    """Attributes:
    system: name -> value.
    gpus: one line each; empty = none, or no driver.
    driver, driver_cuda: versions; None = no driver answers.
    driver_error: what its tool said instead.
    packages: name -> version, of what is installed.
    devices: framework -> what it sees, where there is a GPU to see.
    variables: of the environment, those that are set.
    problems: what does not fit, each with its fix.
    """

    system: Mapping[str, str]
    gpus: tuple[str, ...]
    driver: str | None
    driver_cuda: str | None
    driver_error: str | None
    packages: Mapping[str, str]
    devices: Mapping[str, str]
    variables: Mapping[str, str]

    @property
    def problems(self) -> list[str]:
        return judge(self)

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "problems": self.problems}

    def as_text(self) -> str:
        """Markdown for an issue."""
        rows = dict(self.system)
        rows["GPU"] = "; ".join(self.gpus) or "none"
        rows["driver"] = self.driver_error or (
            f"{self.driver}, CUDA up to {self.driver_cuda}" if self.driver else "none"
        )
        rows |= self.packages
        rows |= {f"{name} sees": seen for name, seen in self.devices.items()}
        rows |= {f"${name}": value for name, value in self.variables.items()}
        table = ["| what | here |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())]
        problems = [f"- {problem}" for problem in self.problems] or ["Nothing was found that does not fit."]
        return "\n".join([*table, "", *problems])


def look() -> Facts:
    """Starts the driver's tool, and where there is a GPU a process for each framework."""
    gpus, driver, cuda, error = _driver()
    packages = {name: version for name in (*_PACKAGES, *_cuda_packages()) if (version := _version(name))}
    has_gpu = bool(gpus) or error is not None
    names = {"JAX": "jax", "PyTorch": "torch"}
    devices = {name: _seen(code) for name, code in _ASKED.items() if has_gpu and names[name] in packages}
    system = {
        "system": platform.platform(),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "CPU": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    variables = {name: value for name in _VARIABLES if (value := os.environ.get(name))}
    return Facts(system, gpus, driver, cuda, error, packages, devices, variables)


def judge(facts: Facts) -> list[str]:
    """What does not fit, in sentences."""
    broken = [_broken(facts.driver_error)] if facts.driver_error else []
    return [*broken, *_versions(facts), *_gpu(facts)]


def _broken(error: str) -> str:
    hint = "restart the machine: the driver was updated while it ran" if "mismatch" in error else "reinstall the driver"
    return f"The driver does not answer ({error}); {hint}."


def _versions(facts: Facts) -> list[str]:
    found, packages = [], facts.packages
    jaxlib = packages.get("jaxlib")
    if "jax" in packages and jaxlib is None:
        found.append("jax is installed without jaxlib; install openpi again.")
    for name, version in packages.items():
        is_plugin = re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)
        if is_plugin and jaxlib is not None and _numbers(version)[:2] != _numbers(jaxlib)[:2]:
            found.append(f"{name} is {version} and jaxlib {jaxlib}; install the same version of both.")
    if jaxlib is not None and _numbers(packages.get("jax", jaxlib))[:2] != _numbers(jaxlib)[:2]:
        found.append(f"jax is {packages['jax']} and jaxlib {jaxlib}; install the same version of both.")
    plugins = {name.split("-")[1] for name in packages if re.fullmatch(r"jax-cuda\d+-plugin", name)}
    if len(plugins) > 1:
        found.append(f"JAX has plugins for {' and '.join(sorted(plugins))}; uninstall one of them.")
    return found


def _gpu(facts: Facts) -> list[str]:
    if not facts.gpus or facts.driver is None:
        return []
    found, packages = [], facts.packages
    majors = {int(m.group(1)): name for name in packages if (m := re.fullmatch(r"jax-cuda(\d+)-plugin", name))}
    if "jax" in packages and not majors:
        found.append("JAX has no CUDA plugin, so it runs on the CPU; install openpi with the extra 'cuda'.")
    for major, name in majors.items():
        found += _too_old(facts.driver, major, name)
    if torch := packages.get("torch"):
        build = torch.partition("+")[2]
        if build == "cpu":
            found.append(f"PyTorch is {torch}, built without CUDA, so it runs on the CPU; install a build for CUDA.")
        elif match := re.fullmatch(r"cu(\d\d)\d+", build):
            found += _too_old(facts.driver, int(match.group(1)), f"torch {torch}")
    for name, seen in facts.devices.items():
        if "(cpu)" in seen or seen.startswith(("no GPU", "failed")):
            variables = [v for v in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES") if v in facts.variables]
            why = f"; ${variables[0]} is {facts.variables[variables[0]]!r}" if variables else ""
            found.append(f"{name} does not see the GPU: {seen}{why}.")
    if "cuda" in facts.variables.get("LD_LIBRARY_PATH", "").lower():
        found.append("LD_LIBRARY_PATH names a CUDA of the system, which may hide the one that JAX brings; unset it.")
    return found


def _too_old(driver: str, major: int, what: str) -> list[str]:
    oldest = _OLDEST_DRIVER.get(major)
    if oldest is None or tuple(_numbers(driver)[:2]) >= oldest:
        return []
    version = ".".join(map(str, oldest))
    return [
        f"{what} needs CUDA {major}, and so a driver of at least {version}; this one is {driver}. Update the driver."
    ]


def _driver() -> tuple[tuple[str, ...], str | None, str | None, str | None]:
    """GPUs, version of the driver, the newest CUDA that it runs, and what went wrong."""
    if shutil.which("nvidia-smi") is None:
        return (), None, None, None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        asked, page = (
            subprocess.run(command, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=False)
            for command in (query, ["nvidia-smi"])
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), None, None, str(error)
    if asked.returncode:
        return (), None, None, " ".join((asked.stdout + asked.stderr).split())[:200]
    rows = [[part.strip() for part in line.split(",")] for line in asked.stdout.splitlines() if line.strip()]
    gpus = tuple(f"{name}, {memory}, compute capability {capability}" for name, memory, capability, _ in rows)
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", page.stdout)
    return gpus, rows[0][3] if rows else None, cuda.group(1) if cuda else "unknown", None


def _seen(code: str) -> str:
    """By a process of its own: a framework keeps what it takes of a GPU."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_ASK_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"failed: no answer within {_ASK_TIMEOUT_S:.0f} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1][:200]}"
    return done.stdout.strip()


def _cuda_packages() -> list[str]:
    names = {str(d.metadata["Name"]).lower() for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return sorted(name for name in names if name.startswith(_CUDA_PARTS))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
