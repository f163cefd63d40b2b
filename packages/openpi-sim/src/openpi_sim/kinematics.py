"""Inverse kinematics of the arm: joint angles that bring the end effector to a pose."""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

import mujoco
import numpy as np

from openpi_sim import poses

_MAX_ITERATIONS = 200
_POSITION_TOLERANCE_M = 5e-4
_ROTATION_TOLERANCE_RAD = 5e-3
_ROTATION_WEIGHT = 0.5  # of a radian against a metre
_DAMPING = 1e-2  # keeps steps finite where the arm is stretched out
_MAX_STEP_RAD = 0.2
_REST_GAIN = 0.05  # the seventh joint's freedom is spent on staying near the middle of the ranges


class InverseKinematics:
    """Damped least squares on a model of its own, so that the simulation is not touched.

    Args:
        model: has the joints, whose limits are kept, and the site.
        joint_names: of the arm, in order.
        site: the end effector.
    """

    def __init__(self, model: mujoco.MjModel, joint_names: tuple[str, ...], site: str):
        self._model, self._data = model, mujoco.MjData(model)
        joints = [model.joint(name) for name in joint_names]
        self._address = np.array([joint.qposadr[0] for joint in joints])
        self._columns = np.array([joint.dofadr[0] for joint in joints])
        self._low, self._high = np.array([joint.range for joint in joints]).T
        self._middle = (self._low + self._high) / 2
        self._site = model.site(site).id
        self._jacobian = np.empty((6, model.nv))
        self._weights = np.array([1.0] * 3 + [_ROTATION_WEIGHT] * 3)

    def pose(self, joints: np.ndarray) -> np.ndarray:
        """Forward: the pose float64[7] of the site at these angles."""
        self._data.qpos[self._address] = joints
        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        return poses.pose_of(self._data.site_xpos[self._site], self._data.site_xmat[self._site])

    def joints(self, target: np.ndarray, start: np.ndarray) -> np.ndarray | None:
        """Angles float64[7] within the limits at which the site has the pose `target`, found from `start`.

        None if there are none near, within 0.5 mm and 5 mrad.
        """
        joints = np.clip(start, self._low, self._high)
        for _ in range(_MAX_ITERATIONS):
            error = poses.difference(target, self.pose(joints))
            if (
                np.linalg.norm(error[:3]) < _POSITION_TOLERANCE_M
                and np.linalg.norm(error[3:]) < _ROTATION_TOLERANCE_RAD
            ):
                return joints
            joints = np.clip(joints + self._step(error, joints), self._low, self._high)
        return None

    def _step(self, error: np.ndarray, joints: np.ndarray) -> np.ndarray:
        mujoco.mj_jacSite(self._model, self._data, self._jacobian[:3], self._jacobian[3:], self._site)
        jacobian = self._jacobian[:, self._columns] * self._weights[:, None]
        inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + _DAMPING**2 * np.eye(6))
        step = inverse @ (error * self._weights)
        free = np.eye(len(joints)) - inverse @ jacobian
        step += free @ (_REST_GAIN * (self._middle - joints))
        return step * min(1.0, _MAX_STEP_RAD / max(np.abs(step).max(), 1e-12))
