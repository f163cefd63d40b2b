"""Camera pictures without OpenGL: one ray per pixel, shaded with NumPy.

`mujoco.mj_multiRay` returns which geometry each ray meets, how far away and the surface's normal; the rest is
Lambert's law. Two 64x64 pictures take about 2 ms on one core, need no graphics library, and come out alike
on every machine, which is what a shipped checkpoint needs: it sees again what it was trained on.
"""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

import functools
from typing import Protocol

import mujoco
import numpy as np

from openpi.envs.tabletop.world import TabletopWorld

_AMBIENT = 0.50
_DIFFUSE = 0.55
_LIGHT = np.array([0.35, 0.25, 0.90]) / np.linalg.norm([0.35, 0.25, 0.90])  # towards the light
_BACKGROUND_RGB = np.array([0.74, 0.82, 0.90])
_CHECKER_M = 0.05  # faint squares on the table give a sense of place and scale
_CHECKER_CONTRAST = 0.07
_FAR_M = 5.0


class Renderer(Protocol):
    """Turns a world into pictures; `size` pixels wide and high."""

    size: int

    def render(self, world: TabletopWorld, camera: str) -> np.ndarray:
        """uint8[size, size, 3], RGB."""
        ...


def make_renderer(kind: str = "rays", size: int = 64) -> Renderer:
    """`rays` (ray casting, anywhere) or `gl` (MuJoCo's OpenGL; set `MUJOCO_GL` before any import)."""
    renderers = {"rays": RayRenderer, "gl": GlRenderer}
    if kind not in renderers:
        raise ValueError(f"renderer={kind!r} is unknown; expected one of {sorted(renderers)}.")
    return renderers[kind](size)


class RayRenderer:
    """Ray casting; deterministic. Buffers are reused, so one instance serves one thread."""

    def __init__(self, size: int = 64):
        if size < 1:
            raise ValueError(f"image size is {size}; expected at least 1 pixel.")
        self.size = size
        self._geom_id = np.empty(size * size, dtype=np.int32)
        self._distance = np.empty(size * size)
        self._normal = np.empty((size * size, 3))

    def render(self, world: TabletopWorld, camera: str) -> np.ndarray:
        """uint8[size, size, 3], RGB."""
        return self.render_with_ids(world, camera)[0]

    def render_with_ids(self, world: TabletopWorld, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Picture uint8[h, w, 3] and the geometry seen in each pixel, int32[h, w] (-1: nothing)."""
        position, rotation = world.camera_pose(camera)
        rays = _camera_rays(self.size, world.camera_fovy_rad(camera)) @ rotation.T
        mujoco.mj_multiRay(
            world.model,
            world.data,
            position,
            rays.ravel(),
            None,
            True,
            -1,
            self._geom_id,
            self._distance,
            self._normal.reshape(-1),
            len(rays),
            _FAR_M,
        )
        colour = _geom_colours(world.model)[self._geom_id]
        table = np.flatnonzero(self._geom_id == world.model.geom("table").id)
        hit = position[:2] + rays[table, :2] * self._distance[table, None]
        colour[table] *= _checker(hit)[:, None]
        shade = _AMBIENT + _DIFFUSE * np.maximum(self._normal @ _LIGHT, 0.0)
        shade[self._geom_id < 0] = 1.0
        picture = np.minimum(colour * shade[:, None], 1.0) * 255 + 0.5
        shape = (self.size, self.size)
        return picture.astype(np.uint8).reshape(*shape, 3), self._geom_id.reshape(shape).copy()


class GlRenderer:
    """MuJoCo's own OpenGL renderer: needs a working GL library and is not what the shipped base saw."""

    def __init__(self, size: int = 64):
        self.size = size
        self._model: mujoco.MjModel | None = None
        self._renderer: mujoco.Renderer | None = None

    def render(self, world: TabletopWorld, camera: str) -> np.ndarray:
        """uint8[size, size, 3], RGB."""
        if self._renderer is None or self._model is not world.model:
            if self._renderer is not None:
                self._renderer.close()
            self._renderer = _gl_renderer(world.model, self.size)
            self._model = world.model
        self._renderer.update_scene(world.data, camera)
        return self._renderer.render()


def _gl_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    try:
        return mujoco.Renderer(model, size, size)
    except mujoco.FatalError as error:
        raise RuntimeError(
            f"renderer='gl' found no OpenGL ({error}). Set MUJOCO_GL to egl, osmesa or glfw before Python "
            "starts, or use renderer='rays', which needs none."
        ) from error


def project(world: TabletopWorld, camera: str, point: np.ndarray, size: int) -> np.ndarray | None:
    """Pixel (column, row), float64[2], of a world point; None behind the camera or outside the picture.

    Column 0.0 is the picture's left edge and row 0.0 its top; pixel centres lie at halves.
    """
    position, rotation = world.camera_pose(camera)
    right, up, backward = rotation.T @ (np.asarray(point) - position)
    if backward >= 0:
        return None
    focal = size / 2 / np.tan(world.camera_fovy_rad(camera) / 2)
    pixel = size / 2 + focal * np.array([right, -up]) / -backward
    return pixel if np.all((pixel >= 0) & (pixel < size)) else None


@functools.lru_cache(maxsize=16)
def _camera_rays(size: int, fovy_rad: float) -> np.ndarray:
    """Unit directions through the pixel centres, camera frame, float64[size * size, 3], row by row."""
    offsets = (np.arange(size) + 0.5) / (size / 2) - 1.0
    columns, rows = np.meshgrid(offsets, offsets)
    tangent = np.tan(fovy_rad / 2)
    rays = np.stack([columns * tangent, -rows * tangent, -np.ones_like(columns)], axis=-1).reshape(-1, 3)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


@functools.lru_cache(maxsize=64)
def _geom_colours(model: mujoco.MjModel) -> np.ndarray:
    """float64[ngeom + 1, 3]; the last row, reached by id -1, is the background."""
    return np.concatenate([model.geom_rgba[:, :3].astype(np.float64), _BACKGROUND_RGB[None]])


def _checker(xy: np.ndarray) -> np.ndarray:
    """Brightness float64[n] of the table at float64[n, 2] metres."""
    odd = np.floor(xy / _CHECKER_M).astype(np.int64).sum(axis=-1) & 1
    return 1.0 - _CHECKER_CONTRAST * odd
