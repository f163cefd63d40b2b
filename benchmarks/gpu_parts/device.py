"""The machine: what it is, and the rates that it reaches."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

from gpu_parts import models
from gpu_parts.records import Records, figure, times_ms
from gpu_parts.sizes import Size
from gpu_parts.work import work

_PACKAGES = ("torch", "triton", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy")
_ASKED = (
    *("name", "driver_version", "memory.total", "memory.used", "power.limit", "temperature.gpu", "utilization.gpu"),
    *("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
)


def environment(size: Size, records: Records) -> None:
    """Versions, and the state in which the card is found."""
    del size
    records.write("environment", "machine", texts=_machine() | _versions())
    records.write("environment", "card", texts=nvidia_smi())


def _machine() -> dict[str, str]:
    lines = _lines("/proc/cpuinfo")
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "load average": f"{os.getloadavg()[0]:.1f}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:  # noqa: PTH123
            return file.read().splitlines()
    except OSError:
        return []


def nvidia_smi() -> dict[str, str]:
    """What the driver says of the first card; changes nothing."""
    if shutil.which("nvidia-smi") is None:
        return {"name": "no nvidia-smi here"}
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = done.stdout.splitlines()[0].split(", ") if done.stdout.strip() else []
    if len(values) != len(_ASKED):
        return {"name": f"nvidia-smi failed: {(done.stdout + done.stderr).strip()[:200]}"}
    return dict(zip(_ASKED, values, strict=True))


def ceilings(size: Size, records: Records) -> None:
    """Rates of a product of random bfloat16 matrices, of copies on the device and to it; and the work of a call."""
    import torch

    on_gpu = models.on_gpu()
    device = torch.device("cuda" if on_gpu else "cpu")
    a, b = (torch.randn(size.gemm_side, size.gemm_side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 256, (size.copy_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    host = torch.empty(min(size.copy_bytes, 256 << 20), dtype=torch.uint8, pin_memory=on_gpu)
    part = target[: len(host)]

    def ended(call: Callable[[], Any]) -> list[float]:
        def to_its_end() -> None:
            call()
            if on_gpu:
                torch.cuda.synchronize()

        return times_ms(to_its_end, seconds=size.seconds / 4, at_most=100)

    product = figure([2 * size.gemm_side**3 / ms / 1e9 for ms in ended(lambda: a @ b)], "TFLOP/s")
    clocks = nvidia_smi()
    copied = figure([2 * size.copy_bytes / ms / 1e9 for ms in ended(lambda: target.copy_(source))], "TB/s")
    sent = figure([len(host) / ms / 1e6 for ms in ended(lambda: part.copy_(host, non_blocking=True))], "GB/s")
    read = figure([len(host) / ms / 1e6 for ms in ended(lambda: host.copy_(part, non_blocking=True))], "GB/s")
    rates = {"bf16 GEMM": product, "copy on the device": copied, "pinned host to device": sent, "device to host": read}
    device_name = torch.cuda.get_device_name() if on_gpu else "CPU"
    records.write(
        "ceilings", device_name, figures=rates, note=f"clocks after the products: {clocks.get('clocks.sm', '?')}"
    )
    for name, shape in size.shapes.items():
        records.write("ceilings", f"work of {name}", work=work(shape))
