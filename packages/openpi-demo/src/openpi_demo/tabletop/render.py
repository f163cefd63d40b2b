"""Camera pictures by ray casting (`openpi_sim.rays`), or by OpenGL.

Two 64x64 pictures take about 2 ms on one core, and come out alike on every machine, which is what a shipped
checkpoint needs: it sees again what it was trained on.
"""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

from typing import Protocol

import mujoco
import numpy as np

from openpi_demo.tabletop.world import TabletopWorld
from openpi_sim import rays

_CHECKER_M = 0.05  # faint squares on the table give a sense of place and scale
_CHECKER_CONTRAST = 0.07


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
        self.size = size
        self._rays = rays.RayCaster(size, size)

    def render(self, world: TabletopWorld, camera: str) -> np.ndarray:
        """uint8[size, size, 3], RGB."""
        return self.render_with_ids(world, camera)[0]

    def render_with_ids(self, world: TabletopWorld, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Picture uint8[h, w, 3] and the geometry seen in each pixel, int32[h, w] (-1: nothing)."""
        hits = self._rays.cast(world.model, world.data, camera)
        colour = rays.hit_colours(world.model, hits)
        table = world.model.geom("table").id
        rays.add_checks(colour, hits, table, size_m=_CHECKER_M, contrast=_CHECKER_CONTRAST)
        return self._rays.shade(hits, colour), hits.geom_id.reshape(self.size, self.size).copy()


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
