"""Which products of a model bear FP8, and how large their inputs are: measured on samples.

1. All products run as they are, and note the largest magnitude of their inputs.
2. They run once more, and each notes the error that FP8 would make of its outputs.
3. All are replaced, and whole action chunks are compared. If one is less alike than the target, each kind of product
   (such as `experts.0.self_attn.qkv_proj`, of all layers) is replaced alone, and the kinds that cost most stay as they
   are, as many as it takes. Errors of outputs do not tell which: they are much the same for all, and what becomes of
   them is not.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from openpi.models_pytorch import fp8
from openpi.models_pytorch.fp8_file import Calibration, Layer
from openpi.models_pytorch.siglip import Linear

_LAYER = re.compile(r"(layers|blocks)\.\d+\.")
_HOPELESS = 2.0  # so many times what may be lost; costs of kinds about add up


def calibrate(
    model: nn.Module, run: Callable[[], np.ndarray], *, target: float, about: Mapping[str, object]
) -> Calibration:
    """
    Args:
        model: of a sampler, fused and not compiled; it is left as it was.
        run: action chunks f[n ah ad] of the samples, from the same noise each time.
    Raises:
        ValueError: actions or inputs are not finite, or nothing can be made in FP8.
    """
    found = fp8.candidates(model)
    if not found:
        raise ValueError("none of the model's products can be made in FP8; widths have to be multiples of 16")
    plain, amax = _largest_inputs(found, run)
    found = {name: linear for name, linear in found.items() if name in amax}  # of the last layer not all is read
    made = {name: fp8.Fp8Linear(linear, amax[name]) for name, linear in found.items()}
    errors = _errors(found, made, run)

    def likeness_of(chosen: Sequence[str]) -> np.ndarray:
        with _replaced(model, {name: made[name] for name in chosen}):
            return cosines(run(), plain) if chosen else cosines(plain, plain)

    chosen, likeness, costs = _most(list(found), likeness_of, target)
    layers = {
        name: Layer(amax[name], float(linear.weight.abs().amax()), errors[name], name in chosen)
        for name, linear in found.items()
    }
    told = {**about, **({"costs of kinds": costs} if costs else {})}
    return Calibration(layers, float(likeness.min()), float(likeness.mean()), target, told)


def _most(
    names: Sequence[str], likeness_of: Callable[[Sequence[str]], np.ndarray], target: float
) -> tuple[Sequence[str], np.ndarray, dict[str, float]]:
    """Which products are replaced, how alike chunks are then, and what each kind costs where not all are."""
    likeness = likeness_of(names)
    if likeness.min() >= target:
        return names, likeness, {}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_LAYER.sub("", name), []).append(name)
    costs = {kind: float(1 - likeness_of(alike).min()) for kind, alike in kinds.items()}
    left = sorted(kinds, key=lambda kind: costs[kind])
    chosen = names
    while chosen and likeness.min() < target:
        left.pop()
        chosen = [name for kind in left for name in kinds[kind]]
        if sum(costs[kind] for kind in left) <= _HOPELESS * (1 - target):
            likeness = likeness_of(chosen)
    return chosen, likeness, costs


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of the angle between chunks, f[n]; in float64.

    Raises:
        ValueError: one is not finite.
    """
    a, b = (np.asarray(chunks, np.float64).reshape(len(chunks), -1) for chunks in (found, expected))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the model's actions are not finite; its weights or the samples are damaged")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)


def _largest_inputs(layers: Mapping[str, Linear], run: Callable[[], np.ndarray]) -> tuple[np.ndarray, dict[str, float]]:
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        del y
        amax = x.detach().abs().amax().float()
        largest[name] = torch.maximum(largest.get(name, amax), amax)

    with _seen(layers, note):
        plain = run()
    amax = {name: float(value) for name, value in largest.items()}
    bad = [name for name, value in amax.items() if not (np.isfinite(value) and value > 0)]
    if bad:
        raise ValueError(
            f"inputs of '{bad[0]}' and {len(bad) - 1} more are all zero or not finite; the weights or the samples are "
            "damaged"
        )
    return plain, amax


def _errors(
    layers: Mapping[str, Linear], made: Mapping[str, fp8.Fp8Linear], run: Callable[[], np.ndarray]
) -> dict[str, float]:
    sums: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        wrong = made[name](x).float() - y.float()
        pair = torch.stack([wrong.square().sum(), y.float().square().sum()]).double()
        sums[name] = sums.get(name, torch.zeros_like(pair)) + pair

    with _seen(layers, note):
        run()
    return {name: float((pair[0] / pair[1].clamp(min=1e-300)).sqrt()) for name, pair in sums.items()}


@contextlib.contextmanager
def _seen(layers: Mapping[str, Linear], note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `note` with the name, inputs and outputs of every product."""

    def hook_of(name: str) -> Callable[[object, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: note(name, args[0], output)

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    before = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            fp8.set_module(model, name, layer)
        yield
    finally:
        for name, layer in before.items():
            fp8.set_module(model, name, layer)


def table(calibration: Calibration) -> str:
    """For people: what became of each product, the worst first."""
    rows: Sequence[tuple[str, Layer]] = sorted(calibration.layers.items(), key=lambda row: -row[1].error)
    width = max(len(name) for name, _ in rows)
    lines = [f"{'layer':<{width}}  error   largest input  in FP8"]
    lines += [
        f"{name:<{width}}  {layer.error:6.4f}  {layer.amax:13.4g}  {'yes' if layer.is_fp8 else 'no, kept as it is'}"
        for name, layer in rows
    ]
    return "\n".join(lines)
