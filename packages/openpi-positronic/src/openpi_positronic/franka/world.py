"""A Franka Panda at a table with a red and a green cube, as MuJoCo physics, 2 ms a step.

Commands are those of a real arm: a pose, joint angles, differences of joint angles, and the gripper's opening.
They hold until the next one. A model of your own works as well if it has the names below.

Frames: origin at the foot of the arm, x over the table, z up. Gripper: 0 closed, 1 open (4 cm a finger), as in
Positronic's simulator; its real gripper counts the other way. Source: the spec, section 6.8.
"""

# The MuJoCo bindings are compiled and ship no type stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from openpi.shared.errors import listed
from openpi_client.base_policy import Metadata
from openpi_sim import poses
from openpi_sim.kinematics import InverseKinematics

MODEL_PATH = Path(__file__).parent / "stack.xml"

NUM_JOINTS = 7
JOINTS = tuple(f"joint{i}_ph" for i in range(1, NUM_JOINTS + 1))
ACTUATORS = tuple(f"actuator{i}_ph" for i in range(1, NUM_JOINTS + 1))
GRIPPER, FINGER = "actuator8_ph", "finger_joint1_ph"
SITE = "end_effector_ph"
RED, GREEN = "box_0", "box_1"
WRIST_CAMERA, EXTERIOR_CAMERA = "handcam_left_ph", "back_view_ph"

FINGER_TRAVEL_M = 0.04
START_JOINTS = np.array([0.3314, -0.4919, -0.5844, -2.0910, -0.2424, 1.7946, 0.6114])

_CUBES_LOW, _CUBES_HIGH = np.array([0.31, -0.28]), np.array([0.69, 0.28])
_CUBE_Z_M = 0.31
_MIN_CUBE_DISTANCE_M = 0.10  # room for an open finger beside the neighbour
_WARM_UP_STEPS = 1000
_NS_PER_S = 1_000_000_000


class FrankaWorld:
    """Physics; one instance serves one thread.

    Attributes:
        model, data: of MuJoCo; to look at.
        model_path: file that the model is of.
        step_ns: simulated time that a step takes.
        time_ns: simulated time since the start; never goes back.
        has_failed: the arm could not follow the last pose, and waits for `recover`.
    Raises:
        FileNotFoundError: no such model.
        ValueError: a model without one of the names above.
    """

    def __init__(self, model_path: Path | str = MODEL_PATH):
        self.model_path = Path(model_path).expanduser()
        self.model = _load(self.model_path)
        self.data = mujoco.MjData(self.model)
        self.step_ns = round(self.model.opt.timestep * _NS_PER_S)
        self.time_ns = 0
        self.has_failed = False
        self._kinematics = InverseKinematics(self.model, JOINTS, SITE)
        self._q_address = np.array([self.model.joint(name).qposadr[0] for name in JOINTS])
        self._dq_address = np.array([self.model.joint(name).dofadr[0] for name in JOINTS])
        self._finger_address = self.model.joint(FINGER).qposadr[0]
        self._actuators = np.array([self.model.actuator(name).id for name in ACTUATORS])
        self._gripper = self.model.actuator(GRIPPER).id
        self._site = self.model.site(SITE).id

    def reset(self, rng: np.random.Generator) -> None:
        """The arm at its start, and the cubes where `rng` says; two seconds pass until all is at rest."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._q_address] = START_JOINTS
        for name, (x, y) in zip((RED, GREEN), _draw_cubes(rng), strict=True):
            address = self.model.joint(name).qposadr[0]
            self.data.qpos[address : address + 7] = [x, y, _CUBE_Z_M, 1, 0, 0, 0]
        self.go_to_start()
        self.set_gripper(0.0)
        mujoco.mj_step(self.model, self.data, nstep=_WARM_UP_STEPS)
        self.time_ns += _WARM_UP_STEPS * self.step_ns
        mujoco.mj_forward(self.model, self.data)
        self.cube_starts = {name: self.cube_position(name) for name in (RED, GREEN)}

    def step(self, count: int = 1) -> None:
        """Lets `count` steps pass."""
        mujoco.mj_step(self.model, self.data, nstep=count)
        self.time_ns += count * self.step_ns
        # Positions that states, cameras and scores read are those of the step before until this is called.
        mujoco.mj_kinematics(self.model, self.data)

    # --- commands -------------------------------------------------------------------------------------------

    def move_to_pose(self, pose: np.ndarray) -> None:
        """Goes to a pose float64[7]; `has_failed` is set if there is no way for the arm to have it."""
        joints = self._kinematics.joints(poses.checked(pose, 7, "pose"), self.commanded_q)
        if joints is None:
            self.has_failed = True
        else:
            self._set_joints(joints)

    def move_to_joints(self, joints: np.ndarray) -> None:
        """Goes to joint angles float64[7], radians, cut to their limits."""
        self._set_joints(poses.checked(joints, NUM_JOINTS, "positions"))

    def move_joints_by(self, deltas: np.ndarray) -> None:
        """Goes to the measured joint angles plus float64[7], radians."""
        self._set_joints(self.q + poses.checked(deltas, NUM_JOINTS, "joint deltas"))

    def go_to_start(self) -> None:
        """Goes to the joint angles that episodes start at."""
        self.has_failed = False
        self._set_joints(START_JOINTS)

    def recover(self) -> None:
        """After a failure: stays where it is, and takes commands again."""
        self.has_failed = False
        self._set_joints(self.q)

    def set_gripper(self, opening: float) -> None:
        """Opens to 0 (closed) ... 1 (open), cut to that."""
        (opening,) = poses.checked(np.array([opening]), 1, "target_grip")
        self.data.ctrl[self._gripper] = FINGER_TRAVEL_M * min(max(opening, 0.0), 1.0)

    # --- what is measured -----------------------------------------------------------------------------------

    @property
    def q(self) -> np.ndarray:
        """Joint angles, float64[7], radians, a new array."""
        return self.data.qpos[self._q_address]

    @property
    def dq(self) -> np.ndarray:
        """Joint velocities, float64[7], radians per second."""
        return self.data.qvel[self._dq_address]

    @property
    def commanded_q(self) -> np.ndarray:
        """The joint angles that the arm goes to, float64[7]."""
        return self.data.ctrl[self._actuators]

    @property
    def ee_pose(self) -> np.ndarray:
        """Of the end effector, float64[7]: metres, quaternion scalar first."""
        return poses.pose_of(self.data.site_xpos[self._site], self.data.site_xmat[self._site])

    @property
    def grip(self) -> float:
        """Measured opening, 0 closed to 1 open."""
        return float(self.data.qpos[self._finger_address]) / FINGER_TRAVEL_M

    def cube_position(self, name: str) -> np.ndarray:
        """Centre, float64[3], metres, a new array."""
        return self.data.body(name).xpos.copy()

    def cube_speed(self, name: str) -> float:
        """Metres per second."""
        address = self.model.joint(name).dofadr[0]
        return float(np.linalg.norm(self.data.qvel[address : address + 3]))

    def _set_joints(self, joints: np.ndarray) -> None:
        low, high = self.model.actuator_ctrlrange[self._actuators].T
        self.data.ctrl[self._actuators] = np.clip(joints, low, high)


def signals(world: FrankaWorld) -> dict[str, np.ndarray | float]:
    """What the robot measures of itself, by the names of its recordings."""
    return {
        "robot_state.q": world.q,
        "robot_state.dq": world.dq,
        "robot_state.ee_pose": world.ee_pose,
        "grip": world.grip,
    }


def execute(world: FrankaWorld, command: Metadata) -> None:
    """Carries out a `robot_command` as codecs decode them. Source: the spec, section 6.2.

    Raises:
        ValueError: an unknown type, or values of another number or that are not finite.
    """
    match command.get("type"):
        case "cartesian_pos":
            world.move_to_pose(poses.pose_of_command(_payload(command, "pose")))
        case "joint_pos":
            world.move_to_joints(_payload(command, "positions"))
        case "joint_delta":
            world.move_joints_by(_payload(command, "velocities"))
        case "reset":
            world.go_to_start()
        case "recover":
            world.recover()
        case other:
            known = "cartesian_pos, joint_pos, joint_delta, reset, recover"
            raise ValueError(f"robot_command has the type {other!r}; expected one of {known}")


def _payload(command: Mapping[str, object], name: str) -> Any:
    if name not in command:
        raise ValueError(f"robot_command {command['type']!r} lacks {name!r}; it has {listed(command)}")
    return command[name]


def _draw_cubes(rng: np.random.Generator) -> np.ndarray:
    """Centres float64[2, 2] on the table, metres, far enough apart."""
    while True:
        red, green = rng.uniform(_CUBES_LOW, _CUBES_HIGH, (2, 2))
        if np.linalg.norm(red - green) >= _MIN_CUBE_DISTANCE_M:
            return np.array([red, green])


def _load(path: Path) -> mujoco.MjModel:
    if not path.is_file():
        raise FileNotFoundError(f"MuJoCo model {path} does not exist")
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a model that MuJoCo can load: {error}") from error
    wanted = [
        *((mujoco.mjtObj.mjOBJ_JOINT, name) for name in (*JOINTS, FINGER, RED, GREEN)),
        *((mujoco.mjtObj.mjOBJ_ACTUATOR, name) for name in (*ACTUATORS, GRIPPER)),
        *((mujoco.mjtObj.mjOBJ_BODY, name) for name in (RED, GREEN)),
        (mujoco.mjtObj.mjOBJ_SITE, SITE),
    ]
    if missing := [name for kind, name in wanted if mujoco.mj_name2id(model, kind, name) < 0]:
        raise ValueError(f"{path} lacks {listed(missing)}, which the Franka world uses; {MODEL_PATH} shows them")
    return model
