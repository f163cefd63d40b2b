"""One ray per pixel: what a MuJoCo camera sees, without OpenGL.

`mujoco.mj_multiRay` returns which geometry each ray meets, how far away and the surface's normal; the rest is
Lambert's law. No graphics library is needed, and pictures come out alike on every machine.
"""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

import functools
from dataclasses import dataclass

import mujoco
import numpy as np

_AMBIENT = 0.50
_DIFFUSE = 0.55
_LIGHT = np.array([0.35, 0.25, 0.90]) / np.linalg.norm([0.35, 0.25, 0.90])  # towards the light
_BACKGROUND_RGB = np.array([0.74, 0.82, 0.90])
_FAR_M = 5.0


@dataclass(frozen=True)
class Hits:
    """Where the rays of one picture end, row by row from the top left; arrays are overwritten by the next picture.

    geom_id: int32[n], -1 for nothing. distance: float64[n], metres. normal: float64[n, 3].
    origin: float64[3], of the camera. directions: float64[n, 3], unit length, world frame.
    """

    geom_id: np.ndarray
    distance: np.ndarray
    normal: np.ndarray
    origin: np.ndarray
    directions: np.ndarray

    def points(self, index: np.ndarray) -> np.ndarray:
        """Where these rays end, float64[k, 3]."""
        return self.origin + self.directions[index] * self.distance[index, None]


class RayCaster:
    """Pictures of one size. Buffers are reused, so one instance serves one thread."""

    def __init__(self, width: int, height: int):
        if width < 1 or height < 1:
            raise ValueError(f"image size is {width} x {height}; expected at least 1 pixel.")
        self.width, self.height = width, height
        count = width * height
        self._geom_id = np.empty(count, dtype=np.int32)
        self._distance = np.empty(count)
        self._normal = np.empty((count, 3))

    def cast(self, model: mujoco.MjModel, data: mujoco.MjData, camera: str) -> Hits:
        """Sends the rays of a camera of the model through the world as it is."""
        view = data.camera(camera)
        fovy_rad = float(np.deg2rad(model.camera(camera).fovy[0]))
        directions = _camera_rays(self.width, self.height, fovy_rad) @ view.xmat.reshape(3, 3).T
        origin = view.xpos.copy()
        mujoco.mj_multiRay(
            model,
            data,
            origin,
            directions.ravel(),
            None,
            True,
            -1,
            self._geom_id,
            self._distance,
            self._normal.reshape(-1),
            len(directions),
            _FAR_M,
        )
        return Hits(self._geom_id, self._distance, self._normal, origin, directions)

    def shade(self, hits: Hits, colour: np.ndarray) -> np.ndarray:
        """A picture uint8[h, w, 3], RGB, of hits in the colours float64[n, 3], 0 to 1, before light falls on them."""
        light = _AMBIENT + _DIFFUSE * np.maximum(hits.normal @ _LIGHT, 0.0)
        light[hits.geom_id < 0] = 1.0
        picture = np.minimum(colour * light[:, None], 1.0) * 255 + 0.5
        return picture.astype(np.uint8).reshape(self.height, self.width, 3)


def hit_colours(model: mujoco.MjModel, hits: Hits) -> np.ndarray:
    """float64[n, 3], 0 to 1, a new array."""
    return _geom_colours(model)[hits.geom_id]


def add_checks(colour: np.ndarray, hits: Hits, geom_id: int, *, size_m: float, contrast: float) -> None:
    """Darkens every other square of a level geometry, in place: it gives a sense of place and scale."""
    index = np.flatnonzero(hits.geom_id == geom_id)
    squares = np.floor(hits.points(index)[:, :2] / size_m).astype(np.int64)
    colour[index] *= (1.0 - contrast * (squares.sum(axis=-1) & 1))[:, None]


@functools.lru_cache(maxsize=16)
def _camera_rays(width: int, height: int, fovy_rad: float) -> np.ndarray:
    """Unit directions through the pixel centres, camera frame, float64[height * width, 3], row by row."""
    columns, rows = np.meshgrid(
        ((np.arange(width) + 0.5) - width / 2) / (height / 2), (np.arange(height) + 0.5) / (height / 2) - 1.0
    )
    tangent = np.tan(fovy_rad / 2)
    rays = np.stack([columns * tangent, -rows * tangent, -np.ones_like(columns)], axis=-1).reshape(-1, 3)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


@functools.lru_cache(maxsize=64)
def _geom_colours(model: mujoco.MjModel) -> np.ndarray:
    """float64[ngeom + 1, 3]; the last row, reached by id -1, is the background."""
    return np.concatenate([model.geom_rgba[:, :3].astype(np.float64), _BACKGROUND_RGB[None]])
