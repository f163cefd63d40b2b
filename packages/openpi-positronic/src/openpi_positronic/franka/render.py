"""Cameras of the Franka world, by ray casting (anywhere) or by OpenGL (faster where there is a GPU)."""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

from typing import Protocol

import mujoco
import numpy as np

from openpi.shared.errors import listed
from openpi_positronic.franka.world import FrankaWorld
from openpi_sim import rays

WIDTH, HEIGHT = 320, 240
RENDERERS = ("rays", "gl")

_FLOOR = "floor"
_SQUARE_M, _CONTRAST = 0.2, 0.1


class Renderer(Protocol):
    """Takes pictures of a world."""

    def render(self, camera: str) -> np.ndarray:
        """uint8[height, width, 3], RGB."""
        ...


def make_renderer(world: FrankaWorld, kind: str = "rays", *, width: int = WIDTH, height: int = HEIGHT) -> Renderer:
    """`rays` needs no graphics library and is the same on every machine; `gl` needs one (see `MUJOCO_GL`).

    Raises:
        ValueError: an unknown kind.
        RuntimeError: `gl` found no OpenGL.
    """
    if kind not in RENDERERS:
        raise ValueError(f"renderer is {kind!r}; expected one of {listed(RENDERERS)}")
    return (_Rays if kind == "rays" else _Gl)(world, width, height)


def check_camera(world: FrankaWorld, camera: str) -> None:
    """
    Raises:
        ValueError: the model has no such camera.
    """
    names = [world.model.camera(i).name for i in range(world.model.ncam)]
    if camera not in names:
        raise ValueError(f"{world.model_path} has no camera {camera!r}; there are {listed(names)}")


class _Rays:
    def __init__(self, world: FrankaWorld, width: int, height: int):
        self._world = world
        self._rays = rays.RayCaster(width, height)
        self._floor = mujoco.mj_name2id(world.model, mujoco.mjtObj.mjOBJ_GEOM, _FLOOR)

    def render(self, camera: str) -> np.ndarray:
        hits = self._rays.cast(self._world.model, self._world.data, camera)
        colour = rays.hit_colours(self._world.model, hits)
        if self._floor >= 0:
            rays.add_checks(colour, hits, self._floor, size_m=_SQUARE_M, contrast=_CONTRAST)
        return self._rays.shade(hits, colour)


class _Gl:
    def __init__(self, world: FrankaWorld, width: int, height: int):
        self._world = world
        try:
            self._renderer = mujoco.Renderer(world.model, height, width)
        except (mujoco.FatalError, ImportError, AttributeError) as error:
            raise RuntimeError(
                f"renderer 'gl' found no OpenGL ({error}). Set MUJOCO_GL to egl, osmesa or glfw before Python starts, "
                "or use 'rays', which needs none"
            ) from error

    def render(self, camera: str) -> np.ndarray:
        self._renderer.update_scene(self._world.data, camera)
        return self._renderer.render()
