"""All parts, the most valuable first, with what each may take."""

import dataclasses
import functools
from collections.abc import Callable

from gpu_parts import device, gpu_tests, latency, serving, start, tokens, training
from gpu_parts.records import Records
from gpu_parts.sizes import Size

Run = Callable[[Size, Records], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """Attributes:
    limit_s: it is stopped then.
    least_s: it is not begun with less time left.
    framework: whose import it needs; parts of one can share a process.
    """

    name: str
    run: Run
    limit_s: float
    least_s: float
    framework: str


def _part(name: str, function: Callable[..., None], limit_s: float, least_s: float, framework: str, **fixed) -> Part:
    run = functools.partial(_call, functools.partial(function, name, **fixed))
    return Part(name, run, limit_s, least_s, framework)


def _call(function: Callable[..., None], size: Size, records: Records) -> None:
    function(size=size, records=records)


def _training(backend: str, case: str, limit_s: float, *, is_compiled: bool = False) -> Part:
    name = f"training/{backend}-{case.lower().replace(' ', '')}{'-compiled' * is_compiled}"
    return _part(name, training.steps, limit_s, 30, backend, backend=backend, case=case, is_compiled=is_compiled)


_GRAPH = {"uses_graphs": True}
_PARTS = (
    Part("environment", device.environment, 30, 5, "pytorch"),
    Part("ceilings", device.ceilings, 60, 15, "pytorch"),
    _part("latency/pytorch-graph", latency.pytorch, 110, 40, "pytorch", compile_mode=None, **_GRAPH),
    _part("latency/pytorch-compiled-graph", latency.pytorch, 160, 45, "pytorch", compile_mode="default", **_GRAPH),
    _part("latency/pytorch-fp8", latency.fp8, 160, 50, "pytorch"),
    _part("latency/jax", latency.jax, 110, 45, "jax"),
    Part("tests", gpu_tests.run, 90, 30, "pytorch"),
    _training("pytorch", "full", 60),
    _part("serving", serving.clients, 90, 40, "pytorch"),
    _training("jax", "full", 80),
    _training("pytorch", "full", 100, is_compiled=True),
    _part("tokens/pytorch", tokens.tokens, 45, 20, "pytorch", backend="pytorch"),
    _training("pytorch", "24 GB", 50),
    _training("pytorch", "libero", 60),
    _training("pytorch", "lora", 50),
    _training("pytorch", "LoRA 24 GB", 50),
    _part("start/pytorch", start.again, 60, 25, "pytorch", backend="pytorch"),
    _part("start/jax", start.again, 60, 25, "jax", backend="jax"),
    _part("tokens/jax", tokens.tokens, 70, 30, "jax", backend="jax"),
    _training("jax", "24 GB", 80),
    _training("jax", "libero", 80),
    _training("jax", "lora", 80),
    _part("latency/pytorch-eager", latency.pytorch, 60, 25, "pytorch", compile_mode=None, uses_graphs=False),
    _part("latency/pytorch-compiled", latency.pytorch, 90, 40, "pytorch", compile_mode="default", uses_graphs=False),
    _part(
        "latency/pytorch-max-autotune-graph", latency.pytorch, 240, 90, "pytorch", compile_mode="max-autotune", **_GRAPH
    ),
)
PARTS = {part.name: part for part in _PARTS}
