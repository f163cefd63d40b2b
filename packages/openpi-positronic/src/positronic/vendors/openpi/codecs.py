"""The codecs by their published names; `fps`, `horizon_sec` and `binarise_observation` are their fields."""

from __future__ import annotations

import configuronic as cfn

from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.codec import Codec


def _timed(name: str, fps: float, horizon_sec: float | None, **options: object) -> Codec:
    return get_codec(name, fps=fps, horizon_s=horizon_sec, **options)


def _trajectory(name: str, fps: float, horizon_sec: float | None, binarise_observation: bool) -> Codec:
    return _timed(name, fps, horizon_sec, observed_binary=binarise_observation)


ee = cfn.Config(_timed, name="ee", fps=15.0, horizon_sec=1.0)
ee_joints = ee.override(name="ee_joints")
ee_traj = cfn.Config(_trajectory, name="ee_traj", fps=15.0, horizon_sec=1.0, binarise_observation=False)
ee_joints_traj = ee_traj.override(name="ee_joints_traj")
joints_traj = ee_traj.override(name="joints_traj")
droid = ee.override(name="droid", horizon_sec=8 / 15)
ee_flip_grip = ee.override(name="ee_flip_grip")
phail_v1 = ee.override(name="phail_v1")
joints_ik = ee.override(name="joints_ik")
joints_ik_sim = ee.override(name="joints_ik_sim")
droid_jointpos = ee_traj.override(name="droid_jointpos", horizon_sec=None)
libero = ee.override(name="libero", fps=20.0, horizon_sec=0.25)

# Of older releases.
eepose = ee
eepose_absolute = cfn.Config(get_codec, name="eepose_absolute")
eepose_q = cfn.Config(get_codec, name="eepose_q")
joints = cfn.Config(get_codec, name="joints")
openpi_positronic = cfn.Config(get_codec, name="openpi_positronic")
