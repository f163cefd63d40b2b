"""Why two pictures of the same moments differ: colors, cameras, turned, resized in another way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from openpi.shared.image_tools import channels_last, resize_with_pad

_SIDE = 24  # pixels each way, at which pictures of any size are compared
_SAME = 6.0  # grey levels by which small pictures of one scene may differ, resized by another method
_CLEARLY = 0.4  # another explanation fits better by this factor
_ROUNDING = 1.5  # grey levels

_TURNS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "red and blue are exchanged (BGR)": lambda p: p[..., ::-1],
    "turned by 180 degrees": lambda p: p[..., ::-1, ::-1, :],
    "upside down": lambda p: p[..., ::-1, :, :],
    "mirrored": lambda p: p[..., ::-1, :],
}


def levels(image: np.ndarray) -> np.ndarray:
    """float[h w 3], 0..255, of uint8 or of floats in [-1, 1] or [0, 1], in either layout."""
    hwc = channels_last(image)
    if hwc.dtype.kind != "f":
        return hwc.astype(np.float64)
    low, high = float(hwc.min()), float(hwc.max())
    if high > 2:
        return hwc.astype(np.float64)
    return (hwc.astype(np.float64) + 1) * 127.5 if low < 0 else hwc.astype(np.float64) * 255


def are_same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(levels(a) - levels(b)).max(initial=0.0) <= _ROUNDING)


def explain(key: str, trained: Mapping[str, Sequence[np.ndarray]], served: Sequence[np.ndarray]) -> str:
    """What the served pictures of a camera are, in words.

    Args:
        trained: pictures by camera, of the same moments.
        served: of the camera `key`.
    """
    small = {name: np.stack([_small(picture) for picture in pictures]) for name, pictures in trained.items()}
    found = np.stack([_small(picture) for picture in served])
    candidates = {words: turn(small[key]) for words, turn in _TURNS.items()}
    others = {name: pictures for name, pictures in small.items() if name != key}
    candidates |= {f"shows what training has in '{name}'": pictures for name, pictures in others.items()}
    itself = _distance(found, small[key])
    costs = {words: _distance(found, pictures) for words, pictures in candidates.items()}
    best = min(costs, key=lambda words: costs[words], default=None)
    if best is not None and costs[best] < _CLEARLY * itself:
        return best
    if itself < _SAME:
        return f"the same picture in another form ({_form(served[0])} instead of {_form(trained[key][0])})"
    return f"another picture (mean difference {itself:.0f} grey levels)"


def explain_resize(raw: Sequence[np.ndarray], served: Sequence[np.ndarray]) -> str:
    """How pictures were brought to the model's size, where it was not by `resize_with_pad`."""
    height, width = levels(served[0]).shape[:2]
    ways: dict[str, Callable[[Image.Image], Image.Image]] = {
        "stretched to the model's size, not padded": lambda p: p.resize((width, height), Image.Resampling.BILINEAR),
        "the middle is cropped, not padded": lambda p: _cropped(p, width, height),
    }
    for name in ("NEAREST", "BICUBIC", "LANCZOS", "BOX", "HAMMING"):
        method = Image.Resampling[name]
        ways[f"resized by the method {name.lower()} instead of bilinear"] = lambda p, m=method: Image.fromarray(
            resize_with_pad(np.asarray(p), height, width, m)
        )
    costs = {}
    for words, resize in ways.items():
        made = [np.asarray(resize(Image.fromarray(levels(p).round().astype(np.uint8))), np.float64) for p in raw]
        costs[words] = float(np.mean([np.abs(m - levels(s)).mean() for m, s in zip(made, served, strict=True)]))
    ours = [resize_with_pad(levels(p).round().astype(np.uint8), height, width).astype(float) for p in raw]
    itself = float(np.mean([np.abs(m - levels(s)).mean() for m, s in zip(ours, served, strict=True)]))
    best = min(costs, key=lambda words: costs[words])
    return best if costs[best] < _CLEARLY * itself else f"other pixels (mean difference {itself:.1f} grey levels)"


def _small(picture: np.ndarray) -> np.ndarray:
    """Without the black bars of a letterbox, which would move the picture."""
    full = levels(picture)
    shown = np.argwhere(full.max(axis=-1) > 0)
    if len(shown):
        (top, left), (bottom, right) = shown.min(0), shown.max(0) + 1
        full = full[top:bottom, left:right]
    image = Image.fromarray(full.round().clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def _form(picture: np.ndarray) -> str:
    return f"{picture.dtype} {' x '.join(map(str, picture.shape))}"


def _cropped(picture: Image.Image, width: int, height: int) -> Image.Image:
    scale = max(width / picture.width, height / picture.height)
    w, h = width / scale, height / scale
    left, top = (picture.width - w) / 2, (picture.height - h) / 2
    return picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
