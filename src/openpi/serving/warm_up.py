"""Warms a policy up with an observation made from what is known about its robot."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from openpi.policies.policy import ExampleError, Policy
from openpi.policies.robot_spec import CameraSpec, VectorSpec
from openpi.shared.tree import unflatten

logger = logging.getLogger(__name__)

# Images are resized to the model's resolution, so any size compiles the same program.
_IMAGE_SIZE = (224, 224)
_MAX_RGB = 255


def warm_up(policy: Policy, cameras: Sequence[CameraSpec], state: Sequence[VectorSpec]) -> bool:
    """Compiles what a robot with these cameras and state vectors will need.

    Returns false, and logs it, if the transforms do not take a made-up observation; what the model raises is raised.
    """
    start_s = time.monotonic()
    logger.info("The weights are loaded; warming up, which compiles the model")
    flat = example_observation(cameras, state)
    open_layout = [replace(camera, layout="chw") if camera.layout == "any" else camera for camera in cameras]
    turned = example_observation(open_layout, state)
    error: Exception | None = None
    # A key such as `images/cam_high` is a nested dict for one robot, and one text key for another. Transforms of a
    # user's own may turn [3, h, w] round without looking.
    for observation in (flat, unflatten(flat), turned, unflatten(turned)):
        try:
            policy.warm_up(observation)
        except ExampleError as raised:
            error = raised
        else:
            logger.info("Warmed up in %.1f s", time.monotonic() - start_s)
            return True
    logger.warning("The first request will compile: warming up failed (%s)", error)
    return False


def example_observation(cameras: Sequence[CameraSpec], state: Sequence[VectorSpec]) -> dict:
    """Noise for images, zeros for the state, some prompt, under '/'-joined keys."""
    rng = np.random.default_rng(0)
    images = {camera.key: _image(camera, rng) for camera in cameras if camera.slot or camera.required}
    vectors = {vector.key: np.zeros(vector.width, np.float32) for vector in state}
    return {**images, **vectors, "prompt": "do something"}


def _image(camera: CameraSpec, rng: np.random.Generator) -> np.ndarray:
    size = camera.shape or _IMAGE_SIZE
    shape = (3, *size) if camera.layout == "chw" else (*size, 3)
    return rng.integers(0, _MAX_RGB, shape, np.uint8, endpoint=True)
