"""Which OpenGL draws the pictures of simulators that bring their own renderers, on machines without a screen.

`dm_control` and `robosuite` read the choice when they are imported, and cannot take it back: call `choose` first.
"""

from __future__ import annotations

import ctypes
import os
import sys

VARIABLE = "MUJOCO_GL"
INSTALL = "apt-get install -y libegl1 libgl1-mesa-dri   (or, without EGL: apt-get install -y libosmesa6)"

_EGL_PLATFORM_DEVICE_EXT = 0x313F
_MAX_DEVICES = 16


def choose() -> str:
    """Sets `MUJOCO_GL`, unless it is set, to what works here: `egl`, which uses a GPU where there is one, or `osmesa`.

    Returns:
        what it is set to; "" on other systems than Linux, where the simulators know better.
    Raises:
        RuntimeError: neither is there; the message says how to install one.
    """
    if not sys.platform.startswith("linux"):
        return os.environ.get(VARIABLE, "")
    wanted = os.environ.get(VARIABLE, "").lower() or _first_that_works()
    os.environ[VARIABLE] = wanted
    if wanted in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", wanted)
    return wanted


def _first_that_works() -> str:
    if has_egl():
        return "egl"
    if _load("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so") is not None:
        return "osmesa"
    raise RuntimeError(
        "the simulator's pictures need OpenGL without a screen, and neither EGL nor OSMesa works here; install one: "
        f"{INSTALL}"
    )


def has_egl() -> bool:
    """Whether EGL can be initialized on some device, as MuJoCo does it: the library alone does not tell."""
    egl = _load("libEGL.so.1", "libEGL.so")
    if egl is None:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * _MAX_DEVICES)(), ctypes.c_int()
    ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)(
        _MAX_DEVICES, devices, ctypes.byref(count)
    )
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    displays = (get_display(_EGL_PLATFORM_DEVICE_EXT, device, None) for device in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)


def _load(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
